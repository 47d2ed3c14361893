"""What a stage's driver and workers give each other as files: inputs for a chunk of keys, and data files of new entries
that the driver commits.

Long values never pass through a JVM that way. A data file is no part of the table until a commit names it; one that
nobody names (a task that was tried again, a run that died) is waste, never wrong.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, fitted
from featurekit_spark.cache.folder import Folder
from featurekit_spark.errors import CacheError, ConfigError

__all__ = ["StagedFile", "StagedWriter", "Staging", "StagingCache", "stats_bound"]

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
    whose presence tells a worker that it sees the driver's storage and not a folder of the same name; `options`: what
    opens the storage."""

    uri: str
    run_id: str
    recorded: int
    mark: str = field(default_factory=lambda: f"{_FOLDER}/{uuid.uuid4().hex}")
    options: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def folder(self) -> Folder:
        """The table's."""
        return Folder(self.uri, self.options)

    def open(self) -> Staging:
        """Put the mark down; the driver's side. CacheError where it cannot be."""
        self.folder.make(_FOLDER)
        with _told(self.folder):
            self._write(self.mark, b"here")
        return self

    def close(self) -> None:
        """Take the mark and the inputs away."""
        for found in self.folder.infos(_FOLDER):
            if found.path.startswith(self.mark):
                self.folder.remove(found.path)

    def writer(self) -> StagedWriter | None:
        """For one task; None where the storage is another one here, or is none."""
        try:
            return StagedWriter(self) if self.folder.info(self.mark).is_file else None
        except (OSError, pa.ArrowException, ConfigError):
            return None

    def hand_over(self, data: bytes) -> str:
        """Leave a chunk's inputs for whichever worker gets it; their name."""
        name = f"{self.mark}.{uuid.uuid4().hex}"
        self._write(name, data)
        return name

    def handed_over(self, name: str) -> bytes:
        """A chunk's inputs."""
        return bytes(self.folder.read(name))

    def _write(self, name: str, data: bytes) -> None:
        self.folder.put(name, data)

    def read(self, file: StagedFile) -> pa.Table:
        """The file's rows (ENTRY_SCHEMA), committed or not."""
        import pyarrow.parquet as pq

        rows = pq.read_table(file.path, filesystem=self.folder.storage, schema=_FILE_SCHEMA)
        names = pa.array([file.builder] * len(rows), pa.string())
        return rows.add_column(0, ENTRY_SCHEMA.field("builder"), names).cast(ENTRY_SCHEMA)


class StagedWriter:
    """Writes one file per builder, a row group for each `add`. CacheError where storage takes no more; what was written
    is then no file."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._open: dict[str, _OpenFile] = {}

    def add(self, entries: pa.Table) -> None:
        """Rows of any builders (ENTRY_SCHEMA less `run_id` and `recorded`)."""
        for name in entries["builder"].unique().to_pylist():
            rows = entries.filter(pc.equal(entries["builder"], name))
            for column, value in (("run_id", self._staging.run_id), ("recorded", self._staging.recorded)):
                constant = pa.array([value] * len(rows), _FILE_SCHEMA.field(column).type)
                rows = rows.drop([column] if column in rows.column_names else []).append_column(
                    column, constant
                )
            with _told(self._staging.folder):
                if name not in self._open:
                    self._open[name] = _OpenFile(name, self._staging.folder)
                self._open[name].write(fitted(rows, _FILE_SCHEMA))

    def close(self) -> list[StagedFile]:
        """End the files and say what is in them."""
        with _told(self._staging.folder):
            files = [file.close() for file in self._open.values()]
        self._open = {}
        return files


@contextmanager
def _told(folder: Folder) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            f"new entries could not be written below {folder}: {folder.told(error)}. Make room or make the folder "
            "writable, and run again."
        ) from error


class _OpenFile:
    def __init__(self, builder: str, folder: Folder) -> None:
        import pyarrow.parquet as pq

        # Where other writers put the builder's files, unless writers differ in how they spell it in a path.
        part = f"builder={builder}" if builder.isidentifier() and builder.isascii() else "staged"
        folder.make(part)
        self.builder, self.path = builder, f"{part}/part-{uuid.uuid4().hex}.zstd.parquet"
        self._folder, self._rows = folder, 0
        self._bounds: dict[str, list[Any]] = {}
        self._writer = pq.ParquetWriter(
            self.path,
            _FILE_SCHEMA,
            filesystem=folder.storage,
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
        found = self._folder.info(self.path)
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
