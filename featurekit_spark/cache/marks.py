"""Marks: what a run proved as a whole, one small JSON file each, beside a cache's tables.

A mark lets the next run end before anything is read. It is a shortcut and no truth of its own: without it everything
is checked, so whoever takes entries away removes the marks first. Imports nothing slow.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from featurekit_spark.locks import local_path

__all__ = ["Marks"]


class Marks:
    """Marks by name in a folder or object-store prefix; one that cannot be read is none."""

    def __init__(self, uri: str, storage_options: Mapping[str, str] | None = None) -> None:
        self.uri = uri
        self.storage_options = dict(storage_options or {})

    def get(self, name: str) -> dict[str, Any] | None:
        """The mark of this name."""
        try:
            found = json.loads(self._read(name))
        except (OSError, ValueError):
            return None
        return found["mark"] if isinstance(found, dict) and found.get("name") == name else None

    def put(self, name: str, mark: Mapping[str, Any]) -> None:
        """Replace a mark as a whole."""
        data = json.dumps({"name": name, "mark": mark}).encode()
        folder = local_path(self.uri)
        if folder is None:
            with self._storage().open_output_stream(_file(name)) as file:
                file.write(data)
            return
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{uuid.uuid4().hex}"
        try:
            part.write_bytes(data)
            part.replace(folder / _file(name))
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Forget one mark, if it is there."""
        folder = local_path(self.uri)
        with suppress(OSError):
            if folder is not None:
                Path(folder / _file(name)).unlink()
            else:
                self._storage().delete_file(_file(name))

    def drop(self) -> None:
        """Forget those that lie here, and not what lies in folders below."""
        folder = local_path(self.uri)
        if folder is not None:
            for mark in folder.glob("*.json"):
                mark.unlink(missing_ok=True)
        else:
            from pyarrow import fs

            storage = self._storage()
            for mark in storage.get_file_info(fs.FileSelector("", allow_not_found=True)):
                if mark.is_file:
                    storage.delete_file(mark.path)

    def clear(self) -> None:
        """Forget all of them, also in folders below."""
        folder = local_path(self.uri)
        with suppress(FileNotFoundError):
            if folder is not None:
                shutil.rmtree(folder)
            else:
                from pyarrow import fs

                storage = self._storage()
                for mark in storage.get_file_info(fs.FileSelector("", allow_not_found=True, recursive=True)):
                    if mark.is_file:
                        storage.delete_file(mark.path)

    def _read(self, name: str) -> bytes:
        folder = local_path(self.uri)
        if folder is not None:
            return (folder / _file(name)).read_bytes()
        with self._storage().open_input_stream(_file(name)) as file:
            data: bytes = file.read()
        return data

    def _storage(self) -> Any:
        from featurekit_spark.cache.storage import storage_of

        return storage_of(self.uri, self.storage_options)


def _file(name: str) -> str:
    return f"{sha256(name.encode()).hexdigest()[:32]}.json"
