"""Which runs go on: each says it by a lock on local paths, elsewhere by a file that it writes again and again.

A lock ends with its process, so that a dead run is told at once. An object store has none: there a run is dead when its
file is gone or has not been written for a while, by the store's own clock. Knows names of runs, not what they do.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, cast

from featurekit_spark.cache.folder import Folder
from featurekit_spark.errors import CacheError, LockedError
from featurekit_spark.locks import file_lock

__all__ = ["BEAT_S", "SILENCE_S", "alive", "claimed", "runs_among"]

BEAT_S: Final = 20.0
SILENCE_S: Final = 300.0
"""Seconds without a beat after which a run is taken for dead: far more than a store that answers slowly needs."""
_CLOCK: Final = ".clock"  # one name, so that none are left where nothing may be removed
_ASKED: Final = 5  # times, as runs that begin together remove each other's


def runs_among(infos: Iterable[Any]) -> set[str]:
    """Runs whose lock or beat is among these files, given as pyarrow's FileInfo."""
    found = (re.fullmatch(r"\.(.+)\.(lock|alive)", info.base_name) for info in infos)
    return {match[1] for match in found if match}


@contextmanager
def alive(folder: Folder, run_id: str) -> Iterator[None]:
    """Say that the run goes on. LockedError where another process says so, CacheError where nothing can be said."""
    if folder.local is None:
        with _beating(folder, f".{run_id}.alive"):
            yield
        return
    path = folder.local / f".{run_id}.lock"
    with file_lock(path, timeout_s=0.0, owner=f"run {run_id}"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Folder, run_id: str) -> Iterator[bool]:
    """Whether the run is over; where there are locks, it is kept from going on meanwhile."""
    if folder.local is None:
        name = f".{run_id}.alive"
        is_over = _is_silent(folder, name)
        yield is_over
        if is_over and _is_silent(folder, name):  # it may have slept, and go on
            _remove(folder, name)
        return
    try:
        with alive(folder, run_id):
            yield True
    except LockedError:
        yield False


@contextmanager
def _beating(folder: Folder, name: str) -> Iterator[None]:
    host, since = socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds")
    beat = json.dumps({"pid": os.getpid(), "host": host, "since": since}).encode()
    try:
        folder.write(name, beat)
    except OSError as error:
        raise CacheError(
            f"{folder} cannot be written to: {folder.told(error)}. Nothing was asked; see that the storage can be "
            "reached and that its options (cache.storage_options) may write there, and run again."
        ) from error
    ended = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(folder, name, beat, ended), name="featurekit-alive", daemon=True
    )
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        _remove(folder, name)


def _beat(folder: Folder, name: str, beat: bytes, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            folder.write(name, beat)
        except OSError:  # the next may come through; what is paid for says by itself that it cannot be kept
            continue


def _remove(folder: Folder, name: str) -> None:
    try:
        folder.remove(name)
    except OSError:  # it goes when it has been silent for long enough
        return


def _is_silent(folder: Folder, name: str) -> bool:
    last = folder.info(name)
    if not last.is_file:
        return True
    now = _now(folder)
    return now is not None and last.mtime is not None and (now - last.mtime).total_seconds() > SILENCE_S


def _now(folder: Folder) -> datetime | None:
    """By the store's clock; None where it does not tell, as then nobody is over."""
    for _ in range(_ASKED):
        folder.write(_CLOCK, b"now")
        written = folder.info(_CLOCK)
        _remove(folder, _CLOCK)
        if written.mtime is not None:
            return cast(datetime, written.mtime)
    return None
