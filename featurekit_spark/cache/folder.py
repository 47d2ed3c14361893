"""A folder on a disk, or a prefix in an object store: files by name, each of them whole or not there.

Knows paths, what opens them, and bytes; what is in a file it does not. Travels to workers, which open the storage for
themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from featurekit_spark.cache.storage import storage_of, without_secrets
from featurekit_spark.locks import local_path

__all__ = ["Folder"]

_AT_ONCE: Final = 16  # files that are read from an object store, where each costs a round trip


@dataclass(frozen=True)
class Folder:
    """`options`: as `deltalake` takes them. A value may be a reference (`${env:NAME}`), which is resolved where the
    storage is opened: what it refers to does not travel, and is shown nowhere.

    Raises OSError where the storage says no, ConfigError where a reference leads nowhere.
    """

    uri: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @classmethod
    def of(cls, place: str | Folder) -> Folder:
        """A path or URI that needs no options, or a folder as it is."""
        return place if isinstance(place, Folder) else cls(str(place))

    def __str__(self) -> str:
        return self.uri

    @property
    def local(self) -> Path | None:
        """The path, where processes of this machine can lock files in it."""
        return local_path(self.uri)

    @property
    def storage(self) -> Any:
        """pyarrow's filesystem over it."""
        return storage_of(self.uri, self.options)

    def infos(self, below: str = "", *, recursive: bool = False) -> list[Any]:
        """pyarrow's FileInfo of what is in it; nothing where it is not there."""
        from pyarrow import fs

        selector = fs.FileSelector(below, allow_not_found=True, recursive=recursive)
        return list(self.storage.get_file_info(selector))

    def info(self, name: str) -> Any:
        """pyarrow's FileInfo of one file, also of one that is not there."""
        return self.storage.get_file_info(name)

    def read(self, name: str) -> Any:
        """A file's bytes, as a buffer. FileNotFoundError where there is none."""
        with self.storage.open_input_file(name) as file:
            return file.read_buffer()

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Files in this order, each with its bytes, or with the OSError of one that cannot be read."""
        if self.local is not None:
            yield from ((name, self._read_or_error(name)) for name in names)
            return
        names = list(names)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="featurekit-read") as readers:
            yield from zip(names, readers.map(self._read_or_error, names), strict=True)

    def write(self, name: str, data: Any) -> None:
        """A file that is there once this returns, or not at all; it may replace another."""
        if self.local is None:
            self.put(name, data)
            return
        path = self.local / name
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

    def put(self, name: str, data: Any) -> None:
        """As `write`, where nobody looks before it is whole, and nothing is lost where the machine goes down."""
        out = self.storage.open_output_stream(name)
        out.write(data)  # an object is made when the stream is closed: after an error it is left open
        out.close()

    def remove(self, name: str) -> None:
        """One file, if it is there."""
        with suppress(FileNotFoundError):
            self.storage.delete_file(name)

    def remove_all(self, below: str) -> None:
        """A folder in it with all its files, if it is there."""
        with suppress(FileNotFoundError):
            self.storage.delete_dir(below)

    def make(self, below: str) -> None:
        """A folder in it, where folders are more than parts of names."""
        if self.local is not None:
            (self.local / below).mkdir(parents=True, exist_ok=True)

    def told(self, error: Exception) -> str:
        """What an error says, without what opens the storage."""
        return without_secrets(str(error), self.options)

    def _read_or_error(self, name: str) -> Any:
        try:
            return self.read(name)
        except OSError as error:
            return error
