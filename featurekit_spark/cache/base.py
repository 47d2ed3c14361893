"""What a cache is: entries, trace rows, run records, and the protocol that every implementation passes.

Append-only: nothing is ever updated in place, a row that was acknowledged stays. Knows nothing of graphs or Spark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, Protocol, runtime_checkable

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder

__all__ = [
    "CACHE_SCHEMA_VERSION",
    "ENTRY_SCHEMA",
    "LATER_COLUMNS",
    "RUN_SCHEMA",
    "TRACE_SCHEMA",
    "UNFINISHED",
    "Entry",
    "FeatureCache",
    "Found",
    "RunRecord",
    "TraceRow",
    "fitted",
]

CACHE_SCHEMA_VERSION: Final = 1
_INSTANT = pa.timestamp("us", tz="UTC")

ENTRY_SCHEMA: Final = pa.schema(
    [
        ("builder", pa.string()),
        ("key", pa.string()),
        ("config_hash", pa.string()),
        ("value", pa.binary()),
        ("ts", _INSTANT),
        ("entry_id", pa.string()),
        ("inputs_hash", pa.string()),
        ("value_hash", pa.string()),
        ("run_id", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("seconds", pa.float64()),
        ("tokens", pa.int64()),
        ("usd", pa.float64()),
        ("attempts", pa.int64()),  # requests that a paid builder made for it, those that failed among them
        ("estimated_tokens", pa.int64()),  # of `tokens`, how many the provider did not count; null: none
        # order of appends, wall clock in ns: `ts` is the run's clock and may stand still or go back
        ("recorded", pa.int64()),
    ]
)
"""One cached value: `key` canonical JSON, `value` canonical bytes by the builder's type, `ts` when computed."""

LATER_COLUMNS: Final = ("attempts", "estimated_tokens")
"""Of ENTRY_SCHEMA those that rows of before they existed do not have: there they are null."""

TRACE_SCHEMA: Final = pa.schema(
    [
        ("builder", pa.string()),
        ("kind", pa.string()),  # target | group | pointer
        ("group", pa.string()),
        ("key", pa.string()),
        ("config_hash", pa.string()),
        ("plan_hash", pa.string()),
        ("keyed_trace", pa.string()),
        ("group_trace", pa.string()),
        ("reads", pa.string()),
        ("epoch", pa.int64()),
        ("valid_until", _INSTANT),
        ("status", pa.string()),
        ("entry_id", pa.string()),
        ("value_hash", pa.string()),
        ("ts", _INSTANT),
        ("run_id", pa.string()),
        ("recorded", pa.int64()),
    ]
)
"""What a target read when it was last found valid; also which entry of a key is current (`pointer`)."""

UNFINISHED: Final = ("stopped", "failed")
"""What became of runs that did not come to their end: they say what was paid, and prove nothing."""

RUN_SCHEMA: Final = pa.schema(
    [
        ("run_id", pa.string()),
        ("group", pa.string()),
        ("ts", _INSTANT),
        ("status", pa.string()),
        ("record", pa.string()),  # JSON: counts, published outputs, each builder's type, config and version
        ("recorded", pa.int64()),
    ]
)


# Entries and what finds them are made by the hundred thousand: frozen ones take several times as long.
@dataclass(slots=True, unsafe_hash=True)
class Entry:
    """One row of ENTRY_SCHEMA. Only `ok` ones answer a request. The value of an error is none, or a model's text that
    could not be used; an expired entry's was taken away, and what it cost and hashed to is left."""

    builder: str
    key: str
    config_hash: str
    value: bytes | None
    ts: datetime
    entry_id: str
    inputs_hash: str
    value_hash: str | None
    run_id: str
    status: Literal["ok", "error", "expired"] = "ok"
    error: str | None = None
    seconds: float | None = None
    tokens: int | None = None
    usd: float | None = None
    attempts: int | None = None
    estimated_tokens: int | None = None
    recorded: int = 0


@dataclass(slots=True)
class Found:
    """A looked-up entry, whether it is the current one of its key, and the reads recorded with it."""

    entry: Entry
    current: bool = True
    reads: str | None = None


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One row of TRACE_SCHEMA."""

    builder: str
    kind: Literal["target", "group", "pointer"]
    key: str
    config_hash: str
    ts: datetime
    run_id: str
    group: str = ""
    plan_hash: str | None = None
    keyed_trace: str | None = None
    group_trace: str | None = None
    reads: str | None = None
    epoch: int = 0
    valid_until: datetime | None = None
    status: Literal["ok", "error", "superseded"] = "ok"
    entry_id: str | None = None
    value_hash: str | None = None
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of one group. `status`: ok, partial, stopped where its budget ended it before it had every key, or failed
    where an error did."""

    run_id: str
    group: str
    ts: datetime
    status: str
    record: Mapping[str, Any]
    recorded: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run looked at all of its keys."""
        return self.status not in UNFINISHED


@runtime_checkable
class FeatureCache(Protocol):
    """Where entries, traces and run records are kept. Every implementation passes `testing.CacheBehaviour`.

    Keys are canonical JSON. An entry is *current* for (builder, config_hash, key) when it is the newest of that
    key's ok entries and ok pointer and target rows. Such a row without an entry_id says that the value became null
    without a build: then no entry is current, and every reader leaves the key out.
    """

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        """ok entries by key, for key -> entry_id; keys without one are left out."""

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        """The current ok entry of each key, whatever its inputs; keys without one are left out."""

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        """All ok entries of some keys, one per entry_id: what a stage away from the cache may find."""

    def has(self, builder: str) -> bool:
        """Whether there is any entry of a builder; reads none."""

    def by_id(self, builder: str, entry_ids: Iterable[str]) -> dict[str, Entry]:
        """ok entries by entry_id, for ids that traces name."""

    def ids(self, builder: str) -> pa.Array:
        """entry_id of every ok entry of a builder: what still exists."""

    def append(self, entries: pa.Table | None = None, traces: Sequence[TraceRow] | pa.Table = ()) -> None:
        """Add rows (ENTRY_SCHEMA less `recorded`, which is set here): entries first, then the traces that name them."""

    def traces(self, builder: str, group: str) -> pa.Table:
        """The newest target row per key, and the newest group row, of one group (TRACE_SCHEMA, any order).

        An ok target row reads as `superseded` where another entry became current after it: it proves nothing.
        """

    def history(self, builder: str, columns: Sequence[str] = ENTRY_SCHEMA.names) -> pa.Table:
        """All entries of a builder as they are stored (these columns of ENTRY_SCHEMA)."""

    def newest(self, builder: str) -> pa.Table:
        """The current entry of every key of a builder; of several configs the newest (ENTRY_SCHEMA)."""

    def read(self, builder: type[FeatureBuilder[Any]]) -> pa.Table:
        """The current values of a builder, typed: its key fields, value, ts, value_hash, config_hash, run_id."""

    def mark(self, name: str) -> Mapping[str, Any] | None:
        """The mark of this name, while the entries that it vouches for are there."""

    def put_mark(self, name: str, mark: Mapping[str, Any] | None) -> None:
        """Replace a mark (JSON values); None removes it."""

    def drop_marks(self) -> None:
        """Forget all marks: rows were added outside of a run, and what is current may be another."""

    def record_run(self, record: RunRecord) -> None:
        """Keep one run record."""

    def last_run(self, group: str) -> RunRecord | None:
        """The newest record of a finished run of a group."""

    def runs(self, group: str) -> list[RunRecord]:
        """All run records of a group, those of stopped and failed runs among them, the newest first."""


def fitted(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of entries in the columns and types of `schema`, also rows of before there were LATER_COLUMNS."""
    columns = [
        pa.nulls(len(rows), field.type)
        if field.name in LATER_COLUMNS and field.name not in rows.column_names
        else rows[field.name].cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
