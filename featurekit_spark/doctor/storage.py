"""Checks of the places that a run writes to: writable, safe for several writers, enough room.

Leaves nothing behind: what is written has a name of its own and is removed, and folders that are missing are tried
through the folder they would be made in. Knows paths, not what is kept there.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from featurekit_spark.cache.storage import storage_of, without_secrets
from featurekit_spark.doctor.base import Check, fail, ok, warn
from featurekit_spark.errors import ConfigError, LockedError
from featurekit_spark.locks import file_lock, local_path

__all__ = ["disk", "file_system_of", "several_writers", "writable"]

MOUNTS = Path("/proc/mounts")

_LITTLE_SPACE, _NO_SPACE = 2 << 30, 200 << 20
_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|9p|afs|ceph|gpfs|lustre|glusterfs|beegfs|davfs|fuse(\..+|blk)?")


def writable(name: str, uri: str, options: Mapping[str, str] | None = None) -> Check:
    """Write, rename and delete a small file where `uri` is or would be. `options`: of a store, as for the cache."""
    path = local_path(uri)
    if path is None:
        return _writable_store(name, uri, options or {})
    folder = _existing(path)
    advice = f"Make {str(folder)!r} writable for this user, or set another path."
    if not folder.is_dir():
        return fail(name, f"{str(folder)!r} is no folder", "Set another path.")
    probe = folder / f".featurekit-doctor-{uuid.uuid4().hex}"
    moved = probe.with_name(f"{probe.name}.moved")
    try:
        probe.write_bytes(b"probe")
        probe.replace(moved)
        if moved.read_bytes() != b"probe":
            return fail(name, f"a file in {str(folder)!r} is not what was written to it", advice)
        moved.unlink()
    except OSError as error:
        return fail(name, f"{str(folder)!r}: {error.strerror or error}", advice)
    finally:
        for left in (probe, moved):
            with suppress(OSError):
                left.unlink(missing_ok=True)
    made = "" if path.exists() else f"; {str(path)!r} will be made by the first run"
    return ok(name, f"write, rename and delete work in {str(folder)!r}{made}")


def several_writers(name: str, uri: str, mounts: str | None = None) -> Check:
    """Whether two processes that append at once are kept apart."""
    path = local_path(uri)
    if path is None:
        return _store_writers(name, uri)
    folder = _existing(path).resolve()
    if mounts is None:
        mounts = MOUNTS.read_text(errors="replace") if MOUNTS.is_file() else ""
    kind = file_system_of(folder, mounts)
    probe = folder / f".featurekit-doctor-{uuid.uuid4().hex}.lock"
    try:
        with file_lock(probe, timeout_s=0, owner="featurekit doctor"):
            try:
                with file_lock(probe, timeout_s=0):
                    excluded = False
            except LockedError:
                excluded = True
    except (ConfigError, OSError) as error:
        return fail(name, f"a lock cannot be taken: {error}", "Use a path on a file system that has locks.")
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    where = f"{str(folder)!r} ({kind or 'file system not known'})"
    if not excluded:
        return fail(
            name,
            f"two locks of one file were both granted in {where}",
            "Use a path on a file system whose locks work: two runs at once could lose a commit here.",
        )
    if kind is not None and _NETWORK.fullmatch(kind):
        return warn(
            name,
            f"locks exclude processes of this machine in {where}; between machines that is not sure",
            "Write from one machine at a time, or keep the cache in an object store.",
        )
    return ok(name, f"locks exclude other processes in {where}")


def disk(name: str, uri: str) -> Check:
    """Free space where `uri` is or would be."""
    path = local_path(uri)
    if path is None:
        return ok(name, f"{uri} is no local path")
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    told = f"{free / 1e9:.1f} GB free at {str(folder)!r}"
    if free < _NO_SPACE:
        return fail(name, told, "Make room, or set another path: a run would stop half-way.")
    if free < _LITTLE_SPACE:
        return warn(name, told, "Make room: Spark's own temporary files need some as well.")
    return ok(name, told)


def file_system_of(path: Path, mounts: str) -> str | None:
    """The type of the file system that holds an absolute path, by the text of /proc/mounts."""
    best, kind = -1, None
    for line in mounts.splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), parts[1]))
        # Of mounts on one point, the last one is seen.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), parts[2]
    return kind


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - links stay as they are
    return next((p for p in (whole, *whole.parents) if p.exists()), whole)


def _writable_store(name: str, uri: str, options: Mapping[str, str]) -> Check:
    from pyarrow import ArrowException

    try:
        store = storage_of(uri, options)
    except ConfigError as error:
        return fail(name, f"{uri}: {error}", "Set the variable, or correct cache.storage_options.")
    except (ArrowException, OSError, ValueError) as error:
        return warn(
            name,
            f"{uri} was not tried: pyarrow cannot open it ({without_secrets(str(error), options)})",
            "Run once with a small catalog: deltalake and Spark open more kinds of storage.",
        )
    return _probed_store(name, uri, store, f".featurekit-doctor-{uuid.uuid4().hex}")


def _probed_store(name: str, uri: str, store: Any, probe: str) -> Check:
    from pyarrow import ArrowException

    moved = f"{probe}.moved"
    try:
        with store.open_output_stream(probe) as file:
            file.write(b"probe")
        store.move(probe, moved)
        store.delete_file(moved)
    except (ArrowException, OSError) as error:
        for left in (probe, moved):
            with suppress(ArrowException, OSError):
                store.delete_file(left)
        return fail(
            name, f"{uri}: {error}", "Give these credentials the right to write, read and delete there."
        )
    return ok(name, f"write, rename and delete work in {uri}")


def _store_writers(name: str, uri: str) -> Check:
    scheme = uri.partition("://")[0]
    if scheme in {"s3", "s3a", "s3n"}:
        return warn(
            name,
            f"{uri}: commits of deltalake are conditional puts; Spark's own commits to S3 are not, unless configured",
            "Write with one Spark driver at a time, or configure Delta's S3DynamoDBLogStore for Spark.",
        )
    return ok(name, f"{uri}: a commit is a conditional put, so that one of two writers is told to try again")
