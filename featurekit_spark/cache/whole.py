"""Small files that are whole or not there, on local paths and object stores. Knows bytes, not what they mean."""

from __future__ import annotations

import os
from typing import Any

from featurekit_spark.cache.staged import filesystem_of
from featurekit_spark.locks import local_path

__all__ = ["write_whole"]


def write_whole(folder: str, name: str, data: Any) -> None:
    """A file below `folder` that is whole or not there, and is there once this returns; it may replace another."""
    local = local_path(folder)
    if local is None:  # one request, all or nothing
        with filesystem_of(folder).open_output_stream(name) as out:
            out.write(data)
        return
    path = local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # a name that no reader takes
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
