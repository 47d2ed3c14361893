"""What the evaluator knows of one (builder, key): the Result; and the row form in which it travels and is cached.

Knows value types and entries, not graphs. A value is decoded only when somebody reads it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, TraceRow
from featurekit_spark.cache.current import listed
from featurekit_spark.failures import FailureKind, failure_in
from featurekit_spark.values import NULL_HASH, ValueType

__all__ = [
    "BUILT",
    "FAILED",
    "FAILURES",
    "ROW_SCHEMA",
    "Counts",
    "Origin",
    "Read",
    "Result",
    "count",
    "count_rows",
    "entry_rows",
    "from_entry",
    "new_entries",
    "new_pointers",
    "plain_entries",
    "results_by_key",
    "to_given",
    "to_rows",
    "without_known",
]

Read = tuple[str, str, str]
"""(source, key as JSON, value hash): what was read of the outside world."""


class Origin(StrEnum):
    """How a result came about."""

    HIT = "hit"
    COMPUTED = "computed"
    UPDATED = "updated"  # followed from the key's earlier value
    EMPTY = "empty"  # an input is null, so the value is null: nothing was looked up or built
    ERROR = "error"  # its own build failed
    UPSTREAM = "upstream"  # an input failed
    REMEMBERED = "remembered"  # its own paid build failed for good in an earlier run, and was not asked again
    STILL = "still"  # an input failed, and that is remembered
    MISS = "miss"  # dry walks only: a run would have to build it, so its value is unknown


BUILT: Final = (Origin.COMPUTED, Origin.UPDATED, Origin.ERROR)
"""A builder's code ran."""
FAILED: Final = (Origin.ERROR, Origin.UPSTREAM, Origin.REMEMBERED, Origin.STILL)
FAILURES: Final = tuple(kind.value for kind in FailureKind)

ROW_SCHEMA: Final = pa.schema(
    [
        *(ENTRY_SCHEMA.field(name) for name in ENTRY_SCHEMA.names if name not in ("run_id", "recorded")),
        ("origin", pa.string()),
        ("until", pa.timestamp("us", tz="UTC")),
        (
            "reads",
            pa.list_(pa.struct([("source", pa.string()), ("key", pa.string()), ("hash", pa.string())])),
        ),
        ("current", pa.bool_()),
        ("failure", pa.string()),
    ]
)
"""A result as a row: an entry's columns and how it came about; `failure`, the kind of a paid builder's own. Stages take
such rows in and give them out."""


def _is_fresh(rows: pa.Table) -> pa.ChunkedArray:
    # Not a constant of the module: making the first Arrow array imports pandas.
    return pc.is_in(rows["origin"], pa.array(["computed", "updated", "error", "upstream"]))


class Result:
    """One feature's answer for one key, inside a run.

    `until`: when the answer or anything it was made from expires (None: never). `reads`: sources reached by a value.
    `cause`: the exception behind `error`, in the process where it was raised.
    `current`: False where a hit is not yet the current entry of its key, or an empty one's key still has such an entry.
    """

    __slots__ = (
        "_payload",
        "_type",
        "_value",
        "attempts",
        "cause",
        "current",
        "entry_id",
        "error",
        "estimated_tokens",
        "inputs_hash",
        "origin",
        "reads",
        "seconds",
        "tokens",
        "ts",
        "until",
        "usd",
        "value_hash",
    )

    def __init__(
        self,
        origin: Origin,
        value_hash: str | None,
        *,
        value: Any = None,
        payload: bytes | None = None,
        kind: ValueType | None = None,
        ts: datetime | None = None,
        entry_id: str | None = None,
        inputs_hash: str | None = None,
        error: str | None = None,
        until: datetime | None = None,
        reads: tuple[Read, ...] = (),
        seconds: float | None = None,
        tokens: int | None = None,
        usd: float | None = None,
        current: bool = True,
        estimated_tokens: int = 0,
        attempts: int | None = None,
    ) -> None:
        self.origin, self.value_hash = origin, value_hash
        self._value, self._payload, self._type = value, payload, kind
        self.ts, self.entry_id, self.inputs_hash, self.error = ts, entry_id, inputs_hash, error
        self.until, self.reads, self.current = until, reads, current
        self.cause: Exception | None = None
        self.seconds, self.tokens, self.usd = seconds, tokens, usd
        self.estimated_tokens, self.attempts = estimated_tokens, attempts

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def unknown(self) -> bool:
        return self.origin is Origin.MISS

    @property
    def is_null(self) -> bool:
        return self.value_hash == NULL_HASH

    @property
    def value(self) -> Any:
        if self._value is None and self._payload is not None and self._type is not None:
            self._value = self._type.decode(self._payload)
        return self._value

    @property
    def payload(self) -> bytes | None:
        if self._payload is None and self._value is not None and self._type is not None:
            self._payload = self._type.encode(self._value)
        return self._payload

    def __repr__(self) -> str:
        return f"Result({self.origin}, {self.error or self._value!r})"


def _own_kind(result: Result) -> str | None:
    """The kind of a paid builder's own failure."""
    if result.origin not in (Origin.ERROR, Origin.REMEMBERED):
        return None
    told = failure_in(result.error)
    return None if told is None else told.kind.value


def from_entry(
    entry: Entry, kind: ValueType, *, current: bool = True, until: datetime | None = None
) -> Result:
    """A cached entry as a hit."""
    return Result(
        Origin.HIT,
        entry.value_hash,
        payload=entry.value,
        kind=kind,
        ts=entry.ts,
        entry_id=entry.entry_id,
        inputs_hash=entry.inputs_hash,
        until=until,
        current=current,
    )


def to_rows(builder: str, config_hash: str, results: Iterable[tuple[str, Result]]) -> pa.Table:
    """Results by key JSON as ROW_SCHEMA rows."""
    pairs = list(results)
    found = [result for _, result in pairs]
    columns: dict[str, list[Any]] = {
        "builder": [builder] * len(pairs),
        "key": [key for key, _ in pairs],
        "config_hash": [config_hash] * len(pairs),
        "ts": [r.ts for r in found],
        "entry_id": [r.entry_id for r in found],
        "inputs_hash": [r.inputs_hash for r in found],
        "status": ["error" if r.failed else "ok" for r in found],
        "seconds": [r.seconds for r in found],
        "tokens": [r.tokens for r in found],
        "usd": [r.usd for r in found],
        "origin": [r.origin.value for r in found],
        "current": [r.current for r in found],
        "failure": [_own_kind(r) for r in found],
        **_read_later(found),
    }
    if any(r.attempts is not None for r in found):
        columns["attempts"] = [r.attempts for r in found]
    if any(r.estimated_tokens for r in found):
        columns["estimated_tokens"] = [r.estimated_tokens or None for r in found]
    return _table(columns, len(pairs))


def to_given(builder: str, results: Iterable[tuple[str, Result]]) -> pa.Table:
    """Results as ROW_SCHEMA rows with what a reader of them needs, and nothing else."""
    pairs = list(results)
    found = [result for _, result in pairs]
    columns: dict[str, list[Any]] = {
        "builder": [builder] * len(pairs),
        "key": [key for key, _ in pairs],
        "origin": [r.origin.value for r in found],
        **_read_later(found),
    }
    return _table(columns, len(pairs))


def _read_later(found: Sequence[Result]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "value": [r.payload for r in found],
        "value_hash": [r.value_hash for r in found],
        "error": [r.error for r in found],
    }
    if any(r.until is not None for r in found):
        columns["until"] = [r.until for r in found]
    if any(r.reads for r in found):
        columns["reads"] = [[{"source": s, "key": k, "hash": h} for s, k, h in r.reads] for r in found]
    return columns


def _table(columns: Mapping[str, list[Any]], size: int) -> pa.Table:
    arrays = [
        pa.array(columns[f.name], type=f.type) if f.name in columns else pa.nulls(size, f.type)
        for f in ROW_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=ROW_SCHEMA)


def without_known(rows: pa.Table) -> pa.Table:
    """ROW_SCHEMA rows whose hits go back without values, to whom the entries came from: these may be many and long."""
    is_hit = pc.equal(rows["origin"], Origin.HIT.value).combine_chunks()
    # if_else would leave their bytes below the nulls
    values = pc.replace_with_mask(rows["value"].combine_chunks(), is_hit, pa.scalar(None, pa.binary()))
    return rows.set_column(rows.column_names.index("value"), "value", values)


def results_by_key(
    rows: pa.Table, kind: ValueType, known: Mapping[str, bytes | None] | None = None
) -> dict[tuple[Any, ...], Result]:
    """ROW_SCHEMA rows of one builder as Results. `known`: values of hits by entry_id, where rows came back without."""
    columns = [listed(rows[name]) for name in _RESULT_COLUMNS]
    results = {}
    for key, origin, value_hash, payload, ts, entry, inputs, error, until, reads, current in zip(
        *columns, strict=True
    ):
        if known is not None and origin == Origin.HIT:
            payload = known[entry]
        results[tuple(json.loads(key))] = Result(
            Origin(origin),
            value_hash,
            payload=payload,
            kind=kind if error is None else None,  # what an error keeps is a text that is no value
            ts=ts,
            entry_id=entry,
            inputs_hash=inputs,
            error=error,
            until=until,
            reads=tuple((r["source"], r["key"], r["hash"]) for r in reads) if reads else (),
            current=current is not False,
        )
    return results


_RESULT_COLUMNS = (
    "key",
    "origin",
    "value_hash",
    "value",
    "ts",
    "entry_id",
    "inputs_hash",
    "error",
    "until",
    "reads",
    "current",
)


def new_entries(rows: pa.Table, run_id: str) -> pa.Table:
    """Of ROW_SCHEMA rows those that a cache does not have yet, as ENTRY_SCHEMA rows less `recorded`."""
    fresh = rows.filter(_is_fresh(rows))
    columns = [
        pa.array([run_id] * len(fresh), pa.string()) if name == "run_id" else fresh[name]
        for name in ENTRY_SCHEMA.names
        if name != "recorded"
    ]
    return pa.Table.from_arrays(columns, names=[name for name in ENTRY_SCHEMA.names if name != "recorded"])


def plain_entries(rows: pa.Table, inline: Collection[str]) -> tuple[pa.Table, pa.Table]:
    """Of ROW_SCHEMA rows (those of which an entry says everything and which a cache does not have yet, the rest)."""
    no_reads = pc.equal(pc.fill_null(pc.list_value_length(rows["reads"]), 0), 0)
    plain = pc.and_(_is_fresh(rows), pc.and_(pc.is_null(rows["until"]), no_reads))
    kept = pc.invert(pc.is_in(rows["builder"], pa.array(sorted(inline), pa.string())))
    plain = pc.and_(plain, kept)
    return rows.filter(plain), rows.filter(pc.invert(plain))


def entry_rows(entries: pa.Table) -> pa.Table:
    """New entries (ENTRY_SCHEMA) as ROW_SCHEMA rows; whether an error is its own or an input's is not told."""
    is_ok = pc.equal(entries["status"], "ok")
    made = {"origin": pc.if_else(is_ok, Origin.COMPUTED.value, Origin.ERROR.value)}
    columns = [
        made[f.name]
        if f.name in made
        else entries[f.name]
        if f.name in entries.column_names
        else pa.nulls(len(entries), f.type)
        for f in ROW_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=ROW_SCHEMA)


def new_pointers(rows: pa.Table, by_hand: Collection[str], now: datetime, run_id: str) -> list[TraceRow]:
    """Pointer rows that a commit must add: hits that become current again, values that became null without a build
    (these point to nothing), and the reads of hand-written gets."""
    looked_up = pc.is_in(rows["origin"], pa.array([Origin.HIT.value, Origin.EMPTY.value]))
    again = pc.and_(looked_up, pc.invert(rows["current"]))
    hand = pc.and_(
        pc.is_in(rows["builder"], pa.array(sorted(by_hand), pa.string())),
        pc.equal(rows["origin"], Origin.COMPUTED.value),
    )
    columns = ["builder", "key", "config_hash", "entry_id", "value_hash", "reads"]
    marked = rows.filter(pc.or_(again, hand)).select(columns)
    return [
        TraceRow(
            row["builder"],
            "pointer",
            row["key"],
            row["config_hash"],
            now,
            run_id,
            entry_id=row["entry_id"],
            value_hash=row["value_hash"],
            reads=json.dumps([list(read.values()) for read in row["reads"] or ()])
            if row["builder"] in by_hand
            else None,
        )
        for row in marked.to_pylist()
    ]


@dataclass
class Counts:
    """What a run did for one builder. `computed`: built; `updated`: followed from their earlier values; `error`: keys
    without an answer, their own failures and their inputs'. Of a paid builder's own: how many are `retryable`,
    `terminal` and `quota`, and how many of all these are `remembered` and were not asked. `usd`: None where an answer
    has no price; of failed calls as far as it is known. `attempts`: requests that the calls took (one, where nobody
    counted); `failed_attempts`: those of them that led to no answer. What these cost is in the sums, where anybody
    knows. `estimated_tokens`: counted here and not by the provider."""

    hit: int = 0
    computed: int = 0
    updated: int = 0
    empty: int = 0
    error: int = 0
    calls: int = 0
    tokens: int = 0
    usd: float | None = field(default=0.0)
    seconds: float = 0.0
    retryable: int = 0
    terminal: int = 0
    quota: int = 0
    remembered: int = 0
    estimated_tokens: int = 0
    attempts: int = 0
    failed_attempts: int = 0

    @property
    def keys(self) -> int:
        return self.hit + self.computed + self.updated + self.empty + self.error

    def add(self, other: Counts) -> None:
        for name, amount in vars(other).items():
            if name != "usd":
                setattr(self, name, getattr(self, name) + amount)
        self.usd = None if self.usd is None or other.usd is None else self.usd + other.usd


def count(results: Sequence[Result], *, paid: bool) -> Counts:
    """Counts over results of one builder; `calls` are the paid builds among them, usd None once an answer has none."""
    counts = Counts()
    for result in results:
        match result.origin:
            case Origin.HIT:
                counts.hit += 1
            case Origin.EMPTY:
                counts.empty += 1
            case Origin.COMPUTED:
                counts.computed += 1
            case Origin.UPDATED:
                counts.updated += 1
            case origin if origin in FAILED:
                counts.error += 1
                counts.remembered += result.origin is Origin.REMEMBERED
                kind = _own_kind(result)
                if kind is not None:
                    setattr(counts, kind, getattr(counts, kind) + 1)
        if result.origin in BUILT:
            counts.seconds += result.seconds or 0.0
            counts.tokens += result.tokens or 0
            counts.estimated_tokens += result.estimated_tokens
            if paid:
                counts.calls += 1
                attempts = 1 if result.attempts is None else result.attempts
                counts.attempts += attempts
                counts.failed_attempts += attempts if result.failed else max(attempts - 1, 0)
                usd = 0.0 if result.failed and result.usd is None else result.usd
                counts.usd = None if counts.usd is None or usd is None else counts.usd + usd
    return counts


def count_rows(rows: pa.Table, *, paid: bool) -> Counts:
    """As `count`, over ROW_SCHEMA rows of one builder."""
    tallies = {row["values"]: row["counts"] for row in rows["origin"].value_counts().to_pylist()}
    kinds = {row["values"]: row["counts"] for row in rows["failure"].value_counts().to_pylist()}
    built = rows.filter(pc.is_in(rows["origin"], pa.array([origin.value for origin in BUILT])))
    calls = len(built) if paid else 0
    usd: float | None = 0.0
    attempts = failed_attempts = 0
    if calls:
        failed = pc.equal(built["origin"], Origin.ERROR.value)
        counted = pc.fill_null(built["attempts"], 1)
        attempts = pc.sum(counted).as_py()
        in_vain = pc.if_else(failed, counted, pc.max_element_wise(pc.subtract(counted, 1), 0))
        failed_attempts = pc.sum(in_vain).as_py()
        unpriced = pc.any(pc.and_(pc.is_null(built["usd"]), pc.invert(failed))).as_py()
        usd = None if unpriced else pc.sum(built["usd"]).as_py() or 0.0
    return Counts(
        hit=tallies.get("hit", 0),
        computed=tallies.get("computed", 0),
        updated=tallies.get("updated", 0),
        empty=tallies.get("empty", 0),
        error=sum(tallies.get(origin.value, 0) for origin in FAILED),
        remembered=tallies.get(Origin.REMEMBERED.value, 0),
        **{kind: kinds.get(kind, 0) for kind in FAILURES},
        calls=calls,
        tokens=pc.sum(built["tokens"]).as_py() or 0,
        estimated_tokens=pc.sum(built["estimated_tokens"]).as_py() or 0,
        usd=usd,
        seconds=pc.sum(built["seconds"]).as_py() or 0.0,
        attempts=attempts,
        failed_attempts=failed_attempts,
    )
