"""Locks between processes on one machine, for paths on a local disk.

Owns how a lock is taken, waited for and released, and who is said to hold it. The operating system releases
a lock when its process ends, however it ends, so none is ever stale. It must not know what is locked.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from featurekit_spark.errors import ConfigError, LockedError

__all__ = ["file_lock", "local_path", "table_lock"]

_POLL_SECONDS = 0.02


def local_path(uri: str) -> Path | None:
    """The path behind a plain path or `file:` URI; None for an object store or any other scheme."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if "://" in uri else Path(uri)


@contextmanager
def file_lock(path: Path, *, timeout_s: float, owner: str = "", shared: bool = False) -> Iterator[None]:
    """Hold the lock file at `path`, made with its folders and left behind. Not reentrant; excludes threads.

    `shared`: together with others that ask for it shared, against one that does not; no holder is named then.

    Waits up to `timeout_s` seconds, then raises LockedError naming the holder: process, host, `owner` and
    since when. The lock is advisory: it works among those who ask for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(
            f"The lock file {str(path)!r} cannot be opened ({error.strerror}): make its folder writable."
        ) from error
    try:
        _acquire(handle, path, timeout_s, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if shared:
            yield
            return
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "owner": owner,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


@contextmanager
def table_lock(table_path: str, *, timeout_s: float = 600.0, owner: str = "") -> Iterator[None]:
    """Keep other processes from committing to a Delta table on a local path; elsewhere it does nothing.

    On `file:` two drivers that commit at once can both be told that they won. Object stores and HDFS have
    conditional writes, so a commit there needs no lock.
    """
    path = local_path(table_path)
    if path is None:
        yield
        return
    # Resolved, so that every spelling of the path is one lock; beside the table, which is only Delta's.
    path = path.resolve()
    with file_lock(path.with_name(f".{path.name}.lock"), timeout_s=timeout_s, owner=owner):
        yield


def _acquire(handle: int, path: Path, timeout_s: float, kind: int) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"{str(path)!r} is locked by {_holder(handle)}; waited {timeout_s:g} s. "
                    "Wait for it to finish, or end that process."
                ) from None
        except OSError as error:
            raise ConfigError(
                f"{str(path)!r} cannot be locked ({error.strerror}): use a file system that supports locks."
            ) from error
        time.sleep(_POLL_SECONDS)


def _holder(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        who = f" ({found['owner']})" if found["owner"] else ""
        return f"process {found['pid']} on {found['host']}{who} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it has the lock and has not written its name yet
