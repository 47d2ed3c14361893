"""A cache in this process's memory: for tests, notebooks and single requests. Same behaviour as the Delta cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import (
    ENTRY_SCHEMA,
    TRACE_SCHEMA,
    Entry,
    Found,
    RunRecord,
    TraceRow,
    fitted,
)
from featurekit_spark.cache.current import to_entries
from featurekit_spark.cache.typed import typed_rows
from featurekit_spark.controller import BoundFeature

__all__ = ["MemoryCache"]

V = TypeVar("V")


class MemoryCache:
    """Entries in dictionaries. Safe for threads; pickles as a snapshot of its rows.

    `cache(Builder).get(key=..., context=...)` is the short form for one feature's bare value.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[tuple[str, str], Entry] = {}  # (builder, entry_id)
        self._rows: dict[str, list[Entry]] = {}
        self._current: dict[tuple[str, str, str], tuple[str | None, str | None, int]] = {}
        self._pointers: dict[tuple[str, str, str], TraceRow] = {}
        self._targets: dict[tuple[str, str], dict[tuple[str, str], TraceRow]] = {}
        self._runs: dict[str, list[RunRecord]] = {}
        self._marks: dict[str, Mapping[str, Any]] = {}
        self._clock = 0

    def __call__(self, builder: type[FeatureBuilder[V]]) -> BoundFeature[V]:
        return BoundFeature(builder, self)

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        found = {}
        with self._lock:
            for key, entry_id in wanted.items():
                entry = self._entries.get((builder, entry_id))
                if entry is not None and (entry.config_hash, entry.key) == (config_hash, key):
                    now, reads, _ = self._current[builder, config_hash, key]
                    found[key] = Found(entry, now == entry_id, reads if now == entry_id else None)
        return found

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        with self._lock:
            current = {key: self._current.get((builder, config_hash, key), (None,))[0] for key in keys}
            wanted = {key: entry_id for key, entry_id in current.items() if entry_id is not None}
            return self.find(builder, config_hash, wanted)

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        asked = set(keys)
        with self._lock:
            entries = [
                entry
                for (name, _), entry in self._entries.items()
                if name == builder and entry.config_hash == config_hash and entry.key in asked
            ]
            return [self.find(builder, config_hash, {e.key: e.entry_id})[e.key] for e in entries]

    def has(self, builder: str) -> bool:
        return bool(self._rows.get(builder))

    def by_id(self, builder: str, entry_ids: Iterable[str]) -> dict[str, Entry]:
        with self._lock:
            return {i: self._entries[builder, i] for i in entry_ids if (builder, i) in self._entries}

    def ids(self, builder: str) -> pa.Array:
        with self._lock:
            return pa.array([entry_id for name, entry_id in self._entries if name == builder], pa.string())

    def append(self, entries: pa.Table | None = None, traces: Sequence[TraceRow] | pa.Table = ()) -> None:
        if isinstance(traces, pa.Table):
            traces = [TraceRow(**row) for row in traces.select(list(TraceRow.__slots__)[:-1]).to_pylist()]
        with self._lock:
            stamp = self._stamp()
            for entry in to_entries(_stamped(entries, stamp)) if entries is not None else ():
                self._rows.setdefault(entry.builder, []).append(entry)
                if entry.status == "ok":
                    self._entries[entry.builder, entry.entry_id] = entry
                    self._current[entry.builder, entry.config_hash, entry.key] = (entry.entry_id, None, stamp)
            for row in traces:
                row = replace(row, recorded=stamp)
                if row.kind != "pointer":
                    self._targets.setdefault((row.builder, row.group), {})[row.kind, row.key] = row
                if row.kind != "group" and row.status == "ok":
                    self._current[row.builder, row.config_hash, row.key] = (row.entry_id, row.reads, stamp)
                    self._pointers[row.builder, row.config_hash, row.key] = row

    def traces(self, builder: str, group: str) -> pa.Table:
        with self._lock:
            return _traces([self._judged(row) for row in self._targets.get((builder, group), {}).values()])

    def history(self, builder: str, columns: Sequence[str] = ENTRY_SCHEMA.names) -> pa.Table:
        with self._lock:
            return _table(self._rows.get(builder, [])).select(list(columns))

    def newest(self, builder: str) -> pa.Table:
        with self._lock:
            newest: dict[str, tuple[int, Entry | None]] = {}
            for (name, _, key), (entry_id, _, stamp) in self._current.items():
                if name == builder and (key not in newest or newest[key][0] <= stamp):
                    newest[key] = (stamp, self._entries.get((builder, entry_id or "")))
            return _table([entry for _, entry in newest.values() if entry is not None])

    def read(self, builder: type[FeatureBuilder[Any]]) -> pa.Table:
        return typed_rows(self.newest(builder.name), builder)

    def mark(self, name: str) -> Mapping[str, Any] | None:
        return self._marks.get(name)

    def drop_marks(self) -> None:
        with self._lock:
            self._marks.clear()

    def put_mark(self, name: str, mark: Mapping[str, Any] | None) -> None:
        with self._lock:
            if mark is None:
                self._marks.pop(name, None)
            else:
                self._marks[name] = mark

    def rows(self, builder: str, config_hash: str, keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """(entries, pointers) of some keys under one config, pointers also to what is not here."""
        asked = set(keys)
        with self._lock:
            entries = [row for row in self._rows.get(builder, []) if row.config_hash == config_hash]
            pointers = [self._pointers.get((builder, config_hash, key)) for key in asked]
        return _table([e for e in entries if e.key in asked]), _traces([p for p in pointers if p is not None])

    def trace_rows(self, builder: str) -> pa.Table:
        """The trace rows of a builder that count: of each kind and key the newest (TRACE_SCHEMA)."""
        with self._lock:
            targets = [rows for (name, _), rows in self._targets.items() if name == builder]
            pointers = [row for row in self._pointers.values() if row.builder == builder]
            return _traces(
                [row for rows in targets for row in rows.values()]
                + [row for row in pointers if row.kind == "pointer"]
            )

    def since(self, builder: str, recorded: int) -> pa.Table:
        """What became current after this: key, config_hash, entry_id, recorded."""
        columns: dict[str, list[Any]] = {"key": [], "config_hash": [], "entry_id": [], "recorded": []}
        with self._lock:
            for (name, config, key), (entry_id, _, stamp) in self._current.items():
                if name == builder and stamp > recorded:
                    for column, value in zip(columns.values(), (key, config, entry_id, stamp), strict=True):
                        column.append(value)
        return pa.table(columns, schema=pa.schema([TRACE_SCHEMA.field(name) for name in columns]))

    def builders(self) -> list[str]:
        """Names of the builders that have entries or trace rows."""
        with self._lock:
            return sorted({*self._rows, *(name for name, *_ in (*self._targets, *self._pointers))})

    def record_run(self, record: RunRecord) -> None:
        with self._lock:
            self._runs.setdefault(record.group, []).append(replace(record, recorded=self._stamp()))

    def last_run(self, group: str) -> RunRecord | None:
        return next((run for run in self.runs(group) if run.finished), None)

    def runs(self, group: str) -> list[RunRecord]:
        with self._lock:
            return self._runs.get(group, [])[::-1]

    def _judged(self, row: TraceRow) -> TraceRow:
        """A trace row; a target's is superseded where another entry became current after it."""
        if row.kind != "target" or row.status != "ok":
            return row
        now, _, _ = self._current[row.builder, row.config_hash, row.key]
        return row if now == row.entry_id else replace(row, status="superseded")

    def _stamp(self) -> int:
        self._clock = max(self._clock + 1, time.time_ns())
        return self._clock

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


def _stamped(entries: pa.Table, stamp: int) -> pa.Table:
    rows = fitted(entries, pa.schema([field for field in ENTRY_SCHEMA if field.name != "recorded"]))
    return rows.append_column("recorded", pa.array([stamp] * len(rows), pa.int64()))


def _table(entries: Sequence[Entry]) -> pa.Table:
    columns = {name: [getattr(entry, name) for entry in entries] for name in ENTRY_SCHEMA.names}
    return pa.table(columns, schema=ENTRY_SCHEMA)


def _traces(rows: Sequence[TraceRow]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=TRACE_SCHEMA)
