"""The cache as three Delta tables, read and written in-process through `deltalake`, without a JVM.

Blind appends only, under a cross-process lock on local paths; protocol (1, 2), so that Spark writes the same tables.
Holds a path and settings; opens tables when asked, so that it can travel to workers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import (
    CACHE_SCHEMA_VERSION,
    ENTRY_SCHEMA,
    LATER_COLUMNS,
    RUN_SCHEMA,
    TRACE_SCHEMA,
    UNFINISHED,
    Entry,
    Found,
    RunRecord,
    TraceRow,
    fitted,
)
from featurekit_spark.cache.current import (
    candidates_in,
    current_in,
    found_in,
    newest_in,
    newest_rows,
    superseded,
    to_entries,
)
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.hashed import hashed_key, named
from featurekit_spark.cache.journal import Journal
from featurekit_spark.cache.marks import Marks
from featurekit_spark.cache.staged import StagedFile, Staging
from featurekit_spark.cache.storage import resolved, storage_of, without_secrets
from featurekit_spark.cache.typed import typed_rows
from featurekit_spark.controller import BoundFeature
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import local_path, table_lock

if TYPE_CHECKING:
    from deltalake import DeltaTable

__all__ = ["DeltaCache"]

V = TypeVar("V")
_TABLES = {
    "entries": (ENTRY_SCHEMA, ["builder"], "key,config_hash,entry_id,ts,recorded,run_id"),
    "traces": (TRACE_SCHEMA, ["builder"], "key,config_hash,group,kind,ts,recorded,run_id"),
    "runs": (RUN_SCHEMA, [], "group,ts,recorded,run_id"),
}
_SCHEMA_KEY = "featurekit.schema"
_HASHED_KEY = "featurekit.hashed"
# Above this many keys a look-up reads the builder's whole key column: one pass beats a long IN list.
_MANY = 5_000
_FEW = 64  # keys whose rows are read at once: little of a file is, where it is in order
_SORTED_BYTES = 1 << 30  # brought into order at a time: Arrow's offsets end at 2 GiB
_GROUP_ROWS = 4_096  # what a look-up of one key decodes of a file, as files are in order of keys


class DeltaCache:
    """`path`: a folder or object-store prefix that holds `entries`, `traces` and `runs`. `storage_options`: as
    `deltalake` takes them; `${env:NAME}` in one is a variable of whichever process opens the storage.

    `cache(Builder).get(key=..., context=...)` is the short form for one feature's bare value. Raises CacheError
    where the tables are damaged or written by a newer library.
    """

    def __init__(self, path: str, *, storage_options: Mapping[str, str] | None = None) -> None:
        self.path = str(path).rstrip("/")
        self.storage_options = dict(storage_options or {})
        self._marks = Marks(f"{self.path}/state", self.storage_options)
        self._ends = Marks(f"{self.path}/state/ends", self.storage_options)
        self._tables: dict[str, DeltaTable] = {}
        self._lock = threading.RLock()
        self._clock = 0

    def __call__(self, builder: type[FeatureBuilder[V]]) -> BoundFeature[V]:
        return BoundFeature(builder, self)

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        return found_in(*self._rows(builder, config_hash, list(wanted)), wanted)

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        return current_in(*self._rows(builder, config_hash, keys), keys)

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        return candidates_in(*self._rows(builder, config_hash, keys), keys)

    def has(self, builder: str) -> bool:
        with self._lock:
            table = self._open("entries")
            own = [("builder", "=", builder)]
            return table is not None and bool(table.file_uris(file_pruning_predicate=own))

    def by_id(self, builder: str, entry_ids: Iterable[str]) -> dict[str, Entry]:
        ids = pa.array(sorted(set(entry_ids)), pa.string())
        where = [pc.field("entry_id").isin(ids), pc.field("status") == "ok"]
        rows = newest_rows(self._read("entries", builder, where), "entry_id")
        return {entry.entry_id: entry for entry in to_entries(rows)}

    def ids(self, builder: str) -> pa.Array:
        rows = self._read("entries", builder, [pc.field("status") == "ok"], ["entry_id"])
        return rows["entry_id"].combine_chunks()

    def append(self, entries: pa.Table | None = None, traces: Sequence[TraceRow] | pa.Table = ()) -> None:
        if not isinstance(traces, pa.Table):
            traces = pa.Table.from_pylist([asdict(row) for row in traces], schema=TRACE_SCHEMA)
        with self._lock:
            for name, rows in (("entries", entries), ("traces", traces)):
                if rows is not None and len(rows):
                    self._write(name, rows)

    def staging(self, run_id: str) -> Staging | None:
        with self._lock:
            table = self._open("entries")
            if table is None:
                self.ensure("entries")
                table = self._open("entries")
                assert table is not None
            return Staging(table.table_uri, run_id, self._stamp(), options=self.storage_options).open()

    @property
    def journals(self) -> Folder:
        return Folder(f"{self.path}/journal", self.storage_options)

    def journal(self, run_id: str, *, size: int | None) -> Journal:
        return Journal(self.journals, run_id, size)

    def append_staged(self, files: Sequence[StagedFile]) -> None:
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import AddAction, RemoveAction

        actions: list[AddAction | RemoveAction] = [
            AddAction(
                file.path,
                file.size,
                {"builder": file.builder},
                file.modified_ms,
                True,
                file.stats,
            )
            for file in files
        ]
        try:
            with self._lock, table_lock(self.table_path("entries")):
                table = self._open("entries", create=True)
                assert table is not None
                table.create_write_transaction(actions, "append", table.schema(), ["builder"])
        except (DeltaError, OSError) as error:
            rows = sum(file.rows for file in files)
            path = self.table_path("entries")
            raise CacheError(f"{rows} rows could not be appended to {path}: {error}") from error

    def traces(self, builder: str, group: str) -> pa.Table:
        rows = self._read("traces", builder, [pc.field("group") == group, pc.field("kind") != "pointer"])
        rows = newest_rows(rows, ["kind", "key"])
        return superseded(rows, self.since(builder, pc.min(rows["recorded"]).as_py())) if len(rows) else rows

    def history(self, builder: str, columns: Sequence[str] = ENTRY_SCHEMA.names) -> pa.Table:
        return self._read("entries", builder, [], list(columns))

    def newest(self, builder: str) -> pa.Table:
        entries = self._read("entries", builder, [])
        return newest_in(entries, self._pointers(builder, []))

    def read(self, builder: type[FeatureBuilder[Any]]) -> pa.Table:
        return typed_rows(self.newest(builder.name), builder)

    def mark(self, name: str) -> Mapping[str, Any] | None:
        entries = local_path(self.table_path("entries"))
        if entries is not None and not (entries / "_delta_log").is_dir():
            return None
        return self._marks.get(name)

    def put_mark(self, name: str, mark: Mapping[str, Any] | None) -> None:
        if mark is None:
            self._marks.remove(name)
        elif mark != self._marks.get(name):
            self._marks.put(name, mark)

    def drop_marks(self) -> None:
        self._marks.drop()

    def ends(self, group: str) -> Mapping[str, Any]:
        """How the last runs of a group ended, by their targets."""
        return self._ends.get(group) or {}

    def put_ends(self, group: str, ends: Mapping[str, Any]) -> None:
        """Replace what `ends` gives."""
        self._ends.put(group, ends)

    def clear_marks(self) -> None:
        """Remove all marks, and the ends of runs, so that every next run looks at the rows."""
        self._marks.clear()

    def record_run(self, record: RunRecord) -> None:
        row = {**asdict(record), "record": json.dumps(record.record, sort_keys=True)}
        with self._lock:
            self._write("runs", pa.Table.from_pylist([row], schema=RUN_SCHEMA))

    def last_run(self, group: str) -> RunRecord | None:
        runs = self._runs(group)
        finished = runs.filter(pc.invert(pc.is_in(runs["status"], pa.array(UNFINISHED))))
        return next(iter(_records(newest_rows(finished, "group"))), None)

    def runs(self, group: str) -> list[RunRecord]:
        return _records(self._runs(group).sort_by([("recorded", "descending")]))

    def table_path(self, name: str) -> str:
        """Where one of the tables lies: for SQL, for Spark, for care commands."""
        return f"{self.path}/{name}"

    def table(self, name: str) -> DeltaTable | None:
        """One of the tables at its newest version, for care commands; None where it is missing."""
        with self._lock:
            return self._open(name)

    def storage(self, name: str) -> Any:
        """pyarrow's filesystem over the folder of one of the tables, for care commands."""
        table = self.table(name)
        return storage_of(self.table_path(name) if table is None else table.table_uri, self.storage_options)

    def entry_columns(self) -> list[str]:
        """Columns of the entries table, in order."""
        return list(ENTRY_SCHEMA.names)

    def group_row(self, builder: str, group: str) -> TraceRow | None:
        """The newest group row of a target."""
        where = [pc.field("group") == group, pc.field("kind") == "group"]
        rows = newest_rows(self._read("traces", builder, where), "key").to_pylist()
        return TraceRow(**rows[0]) if rows else None

    def ensure(self, name: str) -> None:
        """Create a table where it is missing, so that Spark finds one to append to."""
        with self._lock, table_lock(self.table_path(name)):
            self._open(name, create=True)

    def rows(self, builder: str, config_hash: str, keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """(entries, pointers) of at least these keys under one config, pointers also to what is not here."""
        stored, hashed = self._stored(builder, keys)
        near = self._near(config_hash, stored)
        entries = self._entries(builder, config_hash, near, stored)
        return named(entries, hashed), named(self._pointers(builder, near), hashed)

    def trace_rows(self, builder: str) -> pa.Table:
        """All trace rows of a builder, as they are stored (TRACE_SCHEMA)."""
        return self._read("traces", builder, [])

    def since(self, builder: str, recorded: int) -> pa.Table:
        """ok entries and pointers, less their values, recorded after this. After a whole run there are none, which
        the files' statistics tell."""
        columns = ["key", "config_hash", "entry_id", "recorded"]
        later = [pc.field("status") == "ok", pc.field("recorded") > recorded]
        pointers = self._read("traces", builder, [*later, pc.field("kind") == "pointer"], columns)
        return pa.concat_tables([self._read("entries", builder, later, columns), pointers])

    def current_rows(self, builder: str, config_hash: str, prefix: str = "") -> pa.Table:
        """Rows that make something current, less their values, of keys that begin with `prefix`."""
        columns = ["key", "entry_id", "value_hash", "recorded"]
        near = [pc.field("config_hash") == config_hash, pc.field("status") == "ok"]
        if prefix:
            near += [pc.field("key") >= prefix, pc.field("key") < prefix + chr(0x10FFFF)]
        marks = [pc.field("kind") != "group", *near]
        return pa.concat_tables(
            [self._read("entries", builder, near, columns), self._read("traces", builder, marks, columns)]
        )

    def hashed_builders(self) -> frozenset[str]:
        """Builders of which some keys are kept as hashes alone."""
        with self._lock:
            table = self._open("entries")
            told = "" if table is None else table.metadata().configuration.get(_HASHED_KEY, "")
        return frozenset(filter(None, told.split(",")))

    def mark_hashed(self, builders: Iterable[str]) -> None:
        """From now on look-ups of these builders' keys ask for their hashes as well."""
        known = self.hashed_builders()
        wanted = sorted(known.union(builders))
        if len(wanted) == len(known):
            return
        with self._lock, table_lock(self.table_path("entries")):
            table = self._open("entries", create=True)
            assert table is not None
            table.alter.set_table_properties({_HASHED_KEY: ",".join(wanted)}, raise_if_not_exists=False)

    def stamp(self) -> int:
        """Later than all rows that were appended here."""
        with self._lock:
            return self._stamp()

    def builders(self) -> list[str]:
        """Names of the builders that have entries or trace rows."""
        with self._lock:
            tables = [table for name in ("entries", "traces") if (table := self._open(name)) is not None]
            return sorted({part["builder"] for table in tables for part in table.partitions()})

    def exists(self) -> bool:
        """Whether anything was ever written here."""
        with self._lock:
            return self._open("entries") is not None

    def _runs(self, group: str) -> pa.Table:
        return self._read("runs", None, [pc.field("group") == group])

    def _rows(self, builder: str, config_hash: str, keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """As `rows`, without pointers where there is nothing to point to."""
        stored, hashed = self._stored(builder, keys)
        near = self._near(config_hash, stored)
        entries = self._entries(builder, config_hash, near, stored)
        pointers = self._pointers(builder, near) if len(entries) else TRACE_SCHEMA.empty_table()
        return named(entries, hashed), named(pointers, hashed)

    def _stored(self, builder: str, keys: Sequence[str]) -> tuple[Sequence[str], Mapping[str, str]]:
        """(the keys as they may be stored, which of them stand for which key)."""
        if builder not in self.hashed_builders():
            return keys, {}
        hashed = {hashed_key(key): key for key in keys}
        return [*keys, *hashed], hashed

    def _near(self, config_hash: str, keys: Sequence[str]) -> list[pc.Expression]:
        """A filter for some keys of one config; many keys are read as one range."""
        if not keys:
            return [pc.scalar(False)]
        near = [
            pc.field("config_hash") == config_hash,
            pc.field("key") >= min(keys),
            pc.field("key") <= max(keys),
        ]
        if len(keys) <= _MANY:
            near.append(pc.field("key").isin(pa.array(keys, pa.string())))
        return near

    def _entries(
        self, builder: str, config_hash: str, near: list[pc.Expression], keys: Sequence[str]
    ) -> pa.Table:
        if not keys:
            return ENTRY_SCHEMA.empty_table()
        if len(keys) > _FEW:
            # First whether there is any such key at all: values are long, and a cold run finds none.
            there = self._read("entries", builder, near, ["key"])["key"]
            if not len(there) or not pc.any(pc.is_in(there, pa.array(keys, pa.string()))).as_py():
                return ENTRY_SCHEMA.empty_table()
        if len(keys) <= _MANY:
            return self._read("entries", builder, near)
        # Whole files of which nearly all is wanted: a filter would copy every long value once more.
        rows = self._read("entries", builder, near, whole_files=True)
        own = pc.equal(rows["config_hash"], config_hash)
        return rows if pc.all(own).as_py() else rows.filter(own)

    def _pointers(self, builder: str, near: list[pc.Expression]) -> pa.Table:
        """Trace rows that make an entry current, or say that a key's value is null without one."""
        return self._read("traces", builder, [*near, pc.field("kind") != "group", pc.field("status") == "ok"])

    def _read(
        self,
        name: str,
        builder: str | None,
        where: list[pc.Expression],
        columns: list[str] | None = None,
        *,
        whole_files: bool = False,
    ) -> pa.Table:
        """Rows for which `where` holds; with `whole_files` all rows of the files in which there may be one."""
        schema = _TABLES[name][0]
        if columns is not None:
            schema = pa.schema([schema.field(column) for column in columns])
        with self._lock:
            table = self._open(name)
            if table is None:
                return schema.empty_table()
        own = [("builder", "=", builder)] if builder is not None else None
        try:
            with self._lock:
                dataset = table.to_pyarrow_dataset(
                    file_pruning_predicate=own, filesystem=storage_of(table.table_uri, self.storage_options)
                )
            wanted = reduce(and_, where) if where else None
            if whole_files:
                from pyarrow.dataset import FileSystemDataset

                files = list(dataset.get_fragments(wanted))
                dataset = FileSystemDataset(files, dataset.schema, dataset.format, dataset.filesystem)
                wanted = None
            there = [column for column in schema.names if column in dataset.schema.names]
            return fitted(dataset.to_table(columns=there, filter=wanted), schema)
        except (OSError, pa.ArrowException) as error:
            raise CacheError(
                f"{self.table_path(name)} cannot be read: {error}. Nothing was changed; move the damaged file away "
                "or restore the table to an earlier version."
            ) from error

    def _open(self, name: str, create: bool = False) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        path, options = self.table_path(name), resolved(self.storage_options) or None
        try:
            if name in self._tables:
                self._tables[name].update_incremental()
                if create:
                    _widen(self._tables[name], name)
                return self._tables[name]
            if create:
                schema, partitions, stats = _TABLES[name]
                table = DeltaTable.create(
                    path,
                    schema,
                    mode="ignore",
                    partition_by=partitions or None,
                    storage_options=options,
                    configuration={
                        _SCHEMA_KEY: str(CACHE_SCHEMA_VERSION),
                        "delta.dataSkippingStatsColumns": stats,
                    },
                    raise_if_key_not_exists=False,
                )
                _widen(table, name)
            else:
                table = DeltaTable(path, storage_options=options)
        except TableNotFoundError:
            self._tables.pop(name, None)
            return None
        except (DeltaError, OSError) as error:
            told = without_secrets(str(error), self.storage_options)
            raise CacheError(f"the cache table {path} cannot be opened: {told}") from error
        found = table.metadata().configuration.get(_SCHEMA_KEY, "0")
        if int(found) > CACHE_SCHEMA_VERSION:
            raise CacheError(
                f"the cache at {self.path} has schema {found}, this library knows {CACHE_SCHEMA_VERSION}. "
                "Upgrade featurekit_spark, or give this version a cache path of its own."
            )
        self._tables[name] = table
        return table

    def _write(self, name: str, rows: pa.Table) -> None:
        from deltalake import WriterProperties, write_deltalake
        from deltalake.exceptions import DeltaError

        schema = _TABLES[name][0]
        if "recorded" in rows.column_names:
            rows = rows.drop(["recorded"])
        try:
            with table_lock(self.table_path(name)):
                table = self._open(name, create=True)
                stamp = pa.array([self._stamp()] * len(rows), pa.int64())
                write_deltalake(
                    table if table is not None else self.table_path(name),
                    _in_order(fitted(rows.append_column("recorded", stamp), schema)),
                    mode="append",
                    writer_properties=WriterProperties(
                        compression="ZSTD", compression_level=1, max_row_group_size=_GROUP_ROWS
                    ),
                )
        except (DeltaError, OSError) as error:
            raise CacheError(
                f"{len(rows)} rows could not be appended to {self.table_path(name)}: {error}"
            ) from error

    def _stamp(self) -> int:
        self._clock = max(self._clock + 1, time.time_ns())
        return self._clock

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "storage_options": self.storage_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        DeltaCache.__init__(self, state["path"], storage_options=state["storage_options"])


def _in_order(rows: pa.Table) -> pa.Table:
    """Rows by key, those of one key as they are: a key is then in one row group of a file, others are not read."""
    if "key" not in rows.column_names or len(rows) <= _GROUP_ROWS:
        return rows
    size = max(_GROUP_ROWS, len(rows) * _SORTED_BYTES // max(rows.nbytes, 1))
    parts = (rows.slice(start, size) for start in range(0, len(rows), size))
    return pa.concat_tables(part.take(pc.array_sort_indices(part["key"])) for part in parts)


def _widen(table: DeltaTable, name: str) -> None:
    """Give a table of before there were some columns these columns."""
    from deltalake import Field
    from deltalake.schema import PrimitiveType

    there = {field.name for field in table.schema().fields} if name == "entries" else set()
    missing = [column for column in LATER_COLUMNS if name == "entries" and column not in there]
    if missing:
        table.alter.add_columns([Field(column, PrimitiveType("long")) for column in missing])


def _records(rows: pa.Table) -> list[RunRecord]:
    return [RunRecord(**{**row, "record": json.loads(row["record"])}) for row in rows.to_pylist()]
