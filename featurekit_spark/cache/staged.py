"""What a stage's driver and workers give each other as files: inputs for a chunk of keys, and data files of new entries
that the driver commits.

Long values never pass through a JVM that way. A data file is no part of the table until a commit names it; one that
nobody names (a task that was tried again, a run that died) is waste, never wrong.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA
from featurekit_spark.errors import CacheError

__all__ = ["StagedFile", "StagedWriter", "Staging", "StagingCache", "filesystem_of", "stats_bound"]

_FILE_SCHEMA = pa.schema([field for field in ENTRY_SCHEMA if field.name != "builder"])  # the partition column
_COUNTED = ("key", "config_hash", "entry_id", "ts", "recorded", "run_id")
_SHORT = ["config_hash", "run_id", "status", "error"]
_LONGEST = 32  # characters of a bound, as other writers of Delta keep
_LAST_CHARACTER = "\U0010ffff"
_FOLDER = "_featurekit"  # care removes what is left in it for a day


@runtime_checkable
class StagingCache(Protocol):
    """A cache whose workers can write its data files."""

    def staging(self, run_id: str) -> Staging | None:
        """Where a stage's workers may write, ordered as of now; None where that is not possible."""

    def append_staged(self, files: Sequence[StagedFile]) -> None:
        """Make the rows of staged files entries, all of them or none."""


@dataclass(frozen=True)
class StagedFile:
    """One builder's rows in a file. `path`: below the table's folder; `stats`: Delta's, as JSON."""

    builder: str
    path: str
    size: int
    rows: int
    modified_ms: int
    stats: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StagedFile:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Staging:
    """Travels to workers. `uri`: the entries table; `recorded`: the order of every row of the stage; `mark`: a file
    whose presence tells a worker that it sees the driver's storage and not a folder of the same name."""

    uri: str
    run_id: str
    recorded: int
    mark: str = field(default_factory=lambda: f"{_FOLDER}/{uuid.uuid4().hex}")

    def open(self) -> Staging:
        """Put the mark down; the driver's side."""
        filesystem_of(self.uri).create_dir(_FOLDER, recursive=True)
        self._write(self.mark, b"")
        return self

    def close(self) -> None:
        """Take the mark and the inputs away."""
        from pyarrow import fs

        storage = filesystem_of(self.uri)
        for found in storage.get_file_info(fs.FileSelector(_FOLDER)):
            if found.path.startswith(self.mark):
                storage.delete_file(found.path)

    def writer(self) -> StagedWriter | None:
        """For one task; None where the storage is another one here, or is none."""
        try:
            storage = filesystem_of(self.uri)
            return StagedWriter(self, storage) if storage.get_file_info(self.mark).is_file else None
        except (OSError, pa.ArrowException):
            return None

    def hand_over(self, data: bytes) -> str:
        """Leave a chunk's inputs for whichever worker gets it; their name."""
        name = f"{self.mark}.{uuid.uuid4().hex}"
        self._write(name, data)
        return name

    def handed_over(self, name: str) -> bytes:
        """A chunk's inputs."""
        with filesystem_of(self.uri).open_input_stream(name) as file:
            return bytes(file.read())

    def _write(self, name: str, data: bytes) -> None:
        with filesystem_of(self.uri).open_output_stream(name) as file:
            file.write(data)

    def read(self, file: StagedFile) -> pa.Table:
        """The file's rows (ENTRY_SCHEMA), committed or not."""
        import pyarrow.parquet as pq

        rows = pq.read_table(file.path, filesystem=filesystem_of(self.uri), schema=_FILE_SCHEMA)
        names = pa.array([file.builder] * len(rows), pa.string())
        return rows.add_column(0, ENTRY_SCHEMA.field("builder"), names).cast(ENTRY_SCHEMA)


class StagedWriter:
    """Writes one file per builder, a row group for each `add`. CacheError where storage takes no more; what was written
    is then no file."""

    def __init__(self, staging: Staging, storage: Any) -> None:
        self._staging, self._storage = staging, storage
        self._open: dict[str, _OpenFile] = {}

    def add(self, entries: pa.Table) -> None:
        """Rows of any builders (ENTRY_SCHEMA less `run_id` and `recorded`)."""
        for name in entries["builder"].unique().to_pylist():
            rows = entries.filter(pc.equal(entries["builder"], name))
            constants = {"run_id": self._staging.run_id, "recorded": self._staging.recorded}
            columns = [
                pa.array([constants[f.name]] * len(rows), f.type)
                if f.name in constants
                else rows[f.name].cast(f.type)
                for f in _FILE_SCHEMA
            ]
            with self._told():
                if name not in self._open:
                    self._open[name] = _OpenFile(name, self._storage)
                self._open[name].write(pa.Table.from_arrays(columns, schema=_FILE_SCHEMA))

    def close(self) -> list[StagedFile]:
        """End the files and say what is in them."""
        with self._told():
            files = [file.close() for file in self._open.values()]
        self._open = {}
        return files

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise CacheError(
                f"new entries could not be written below {self._staging.uri}: {error}. Make room or make the folder "
                "writable, and run again."
            ) from error


class _OpenFile:
    def __init__(self, builder: str, storage: Any) -> None:
        import pyarrow.parquet as pq

        # Where other writers put the builder's files, unless writers differ in how they spell it in a path.
        folder = f"builder={builder}" if builder.isidentifier() and builder.isascii() else "staged"
        storage.create_dir(folder, recursive=True)
        self.builder, self.path = builder, f"{folder}/part-{uuid.uuid4().hex}.zstd.parquet"
        self._storage, self._rows = storage, 0
        self._bounds: dict[str, list[Any]] = {}
        self._writer = pq.ParquetWriter(
            self.path,
            _FILE_SCHEMA,
            filesystem=storage,
            compression="zstd",
            compression_level=1,
            use_dictionary=_SHORT,
            write_statistics=list(_COUNTED),
        )

    def write(self, rows: pa.Table) -> None:
        self._rows += len(rows)
        for name in _COUNTED:
            found = pc.min_max(rows[name]).as_py()
            self._bounds.setdefault(name, []).extend(x for x in found.values() if x is not None)
        self._writer.write_table(rows)

    def close(self) -> StagedFile:
        self._writer.close()
        found = self._storage.get_file_info(self.path)
        bounds = {name: values for name, values in self._bounds.items() if values}
        stats = {
            "numRecords": self._rows,
            "minValues": {name: stats_bound(min(values)) for name, values in bounds.items()},
            "maxValues": {name: stats_bound(max(values), highest=True) for name, values in bounds.items()},
            "nullCount": dict.fromkeys(bounds, 0),
        }
        return StagedFile(
            self.builder,
            self.path,
            found.size,
            self._rows,
            time.time_ns() // 1_000_000,
            json.dumps(stats, ensure_ascii=False),
        )


def stats_bound(value: Any, *, highest: bool = False) -> Any:
    """A bound as Delta's statistics have it: instants as text, long text cut so that it stays a bound."""
    if isinstance(value, str):
        if len(value) <= _LONGEST or (highest and value[_LONGEST] == _LAST_CHARACTER):
            return value
        return value[:_LONGEST] + (_LAST_CHARACTER if highest else "")
    if hasattr(value, "isoformat"):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value


def filesystem_of(uri: str) -> Any:
    """pyarrow's own filesystem over a table's folder: the one of `deltalake` can abort at interpreter exit."""
    from pyarrow import fs

    if "://" not in uri or uri.startswith("file://"):
        return fs.SubTreeFileSystem(uri.removeprefix("file://"), fs.LocalFileSystem())
    filesystem, path = fs.FileSystem.from_uri(uri)
    return fs.SubTreeFileSystem(path, filesystem)
