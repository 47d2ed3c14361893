"""What all care of a cache shares: who may take rows away and when, and the record that they were taken.

Entries go only while no run reads the cache; marks of what was proven go before them. Knows no commands and not which
rows go: `gc`, `purge` and `invalidate` say that.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import LockedError
from featurekit_spark.locks import file_lock, local_path

__all__ = ["CARE_GROUP", "alone", "reading", "record_care"]

CARE_GROUP: Final = "care"
"""The group of care's own records in the runs table; no key, so no run's group."""
_WAIT_SECONDS = 600.0


@contextmanager
def reading(cache_path: str) -> Iterator[None]:
    """For a run: nothing is taken out of the cache meanwhile; waits for care that is going on.

    Only on local paths: an object store has no locks, and there the scheduler keeps care and runs apart.
    """
    path = _lock_path(cache_path)
    if path is None:
        yield
        return
    with file_lock(path, timeout_s=_WAIT_SECONDS, shared=True):
        yield


@contextmanager
def alone(cache: DeltaCache, *, owner: str, warehouse: str | None = None) -> Iterator[None]:
    """For care that takes rows away: no run reads the cache meanwhile, those that start wait. LockedError names the
    runs that go on. `warehouse`: where their locks are (None: the folder that the cache is in)."""
    path = _lock_path(cache.path)
    if path is None:
        yield
        return
    folder = path.parent if warehouse is None else local_path(warehouse)
    try:
        with file_lock(path, timeout_s=0, owner=owner):
            running = _running(folder)
            if running:
                raise _busy(owner, running)
            yield
    except LockedError as error:
        running = _running(folder)
        raise (_busy(owner, running) if running else error) from None


def record_care(cache: DeltaCache, action: str, now: datetime, facts: Mapping[str, Any]) -> str:
    """Keep in the runs table what care did, and why; the record's run_id."""
    run_id = f"{action}-{uuid.uuid4().hex[:12]}"
    cache.record_run(RunRecord(run_id, CARE_GROUP, now, "ok", {"care": action, **facts}))
    return run_id


def _lock_path(cache_path: str) -> Path | None:
    path = local_path(cache_path)
    if path is None:
        return None
    path = path.resolve()
    return path.with_name(f".{path.name}.care.lock")


def _running(warehouse: Path | None) -> list[str]:
    """Merchant and market of each run that holds its lock."""
    if warehouse is None:
        return []
    folder = warehouse / "locks"
    return [
        path.relative_to(folder).with_suffix("").as_posix()
        for path in sorted(folder.rglob("*.lock"))
        if _held(path)
    ]


def _held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _busy(owner: str, running: list[str]) -> LockedError:
    return LockedError(
        f"{owner} takes entries away, and these runs may be reading them: {', '.join(running)}. "
        "Try again when they are done."
    )
