"""Stored rows as a whole: what is current, who names what, what it cost, and taking chosen rows out.

Traces go before the entries that they name, so that a crash in between leaves a trace less and never one that leads
nowhere. Knows no reason why a row should go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.care import CARE_GROUP
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache

__all__ = [
    "ENTRY_COLUMNS",
    "PLACE",
    "TRACE_COLUMNS",
    "Doomed",
    "as_mask",
    "cost_of",
    "current_marks",
    "gathered",
    "gone_of",
    "older",
    "run_records",
    "take_out",
    "traces_of",
    "tuples",
]

ENTRY_COLUMNS = (
    "builder",
    "key",
    "config_hash",
    "ts",
    "entry_id",
    "status",
    "seconds",
    "tokens",
    "usd",
    "recorded",
)
TRACE_COLUMNS = ("builder", "kind", "group", "key", "config_hash", "reads", "status", "entry_id", "recorded")
PLACE = ["builder", "config_hash", "key"]


@dataclass(frozen=True)
class Doomed:
    """What would go. `entries`: a mask over the entry rows given; `traces`: over the trace rows; `gone`: entry_ids
    of which no row stays; `report`: figures for people, per builder and in sum."""

    entries: Any
    traces: Any
    gone: pa.Array
    report: dict[str, Any] = field(default_factory=dict)


def run_records(cache: DeltaCache) -> list[RunRecord]:
    """All run records but care's own, oldest first."""
    table = cache.table("runs")
    rows: list[dict[str, Any]] = []
    for file in files.data_files(table) if table is not None else ():
        rows += [row for part in files.file_rows(cache, "runs", file) for row in part.to_pylist()]
    rows.sort(key=lambda row: row["recorded"])
    return [
        RunRecord(**{**row, "record": json.loads(row["record"])})
        for row in rows
        if row["group"] != CARE_GROUP
    ]


def take_out(cache: DeltaCache, entries: pa.Table, traces: pa.Table, doomed: Doomed) -> None:
    """Take the chosen rows out: marks of runs, then traces, then entries."""
    cache.clear_marks()
    for name, rows, mask, columns in (
        ("traces", traces, doomed.traces, TRACE_COLUMNS),
        ("entries", entries, doomed.entries, ENTRY_COLUMNS),
    ):
        if not mask.any():
            continue
        chosen = rows.filter(pa.array(mask))
        builders = set(chosen["builder"].unique().to_pylist())
        files.remove_rows(cache, name, _those(chosen), columns=columns, builders=builders)
    cache.clear_marks()


def current_marks(entries: pa.Table, traces: pa.Table) -> pa.Table:
    """The newest mark (entry_id, or null) of every builder, config and key: what is current there."""
    columns = [*PLACE, "entry_id", "recorded"]
    pointers = traces.filter(pc.and_(pc.not_equal(traces["kind"], "group"), pc.equal(traces["status"], "ok")))
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    return newest_rows(pa.concat_tables([ok.select(columns), pointers.select(columns)]), PLACE)


def cost_of(rows: pa.Table) -> dict[str, Any]:
    """What building these rows took: entries, seconds, tokens, usd (None where nothing has a price)."""
    priced = rows["usd"].null_count < len(rows)
    return {
        "entries": len(rows),
        "seconds": round(pc.sum(rows["seconds"]).as_py() or 0.0, 6),
        "tokens": pc.sum(rows["tokens"]).as_py() or 0,
        "usd": round(pc.sum(rows["usd"]).as_py() or 0.0, 6) if priced else None,
    }


def gone_of(entries: pa.Table, doomed: Any) -> pa.Array:
    """entry_ids of which no ok row stays."""
    ok = as_mask(pc.equal(entries["status"], "ok"))
    going = set(entries["entry_id"].filter(pa.array(ok & doomed)).to_pylist())
    going -= set(entries["entry_id"].filter(pa.array(ok & ~doomed)).to_pylist())
    return pa.array(sorted(going - {None}), pa.string())


def traces_of(traces: pa.Table, gone: pa.Array, *, also: Any = None) -> Any:
    """Rows that name an entry that goes, and those of the mask `also`. Where that is the newest of a target's key, or
    of its group, all of them go: an older one would be taken for what holds now."""
    direct = np.zeros(len(traces), bool) if also is None else also
    if not len(traces) or not (len(gone) or direct.any()):
        return direct
    lost = set(gone.to_pylist())
    direct = direct | as_mask(pc.is_in(traces["entry_id"], gone))
    groups = as_mask(pc.equal(traces["kind"], "group"))
    if groups.any():
        reads = traces["reads"].to_pylist()
        direct = direct | np.fromiter(
            (bool(g) and not lost.isdisjoint(gathered(r)) for g, r in zip(groups, reads, strict=True)),
            bool,
            len(traces),
        )
    by = ["builder", "kind", "group", "key"]
    newest = ~older(traces, by, np.ones(len(traces), bool))
    pointers = as_mask(pc.equal(traces["kind"], "pointer"))
    broken = set(tuples(traces.filter(pa.array(direct & newest & ~pointers)), by))
    whole = np.fromiter((key in broken for key in tuples(traces, by)), bool, len(traces))
    return direct | whole


def older(rows: pa.Table, by: list[str], among: Any) -> Any:
    """Rows that are not the newest of their group, of those among which to look."""
    if not len(rows):
        return np.zeros(0, bool)
    some = rows.select([*by, "recorded"]).filter(pa.array(among))
    newest = some.group_by(by).aggregate([("recorded", "max")])
    stamps = dict(zip(tuples(newest, by), newest["recorded_max"].to_pylist(), strict=True))
    own = as_mask(rows["recorded"])
    last = np.fromiter((stamps.get(key, 0) for key in tuples(rows, by)), np.int64, len(rows))
    return own < last


def gathered(reads: str | None) -> list[str]:
    """entry_ids of the gathers that a group row names."""
    return [identity for *_, identity in json.loads(reads or "[]") if identity is not None]


def _those(chosen: pa.Table) -> Callable[[pa.Table], Any]:
    marked = pc.unique(_identity(chosen))
    return lambda rows: pc.is_in(_identity(rows), marked)


def _identity(rows: pa.Table) -> Any:
    """One text per stored row. Copies of one row within an append are one."""
    parts = [rows["builder"], pc.cast(rows["recorded"], pa.string()), rows["status"], rows["config_hash"]]
    if "kind" in rows.column_names:
        parts += [rows["kind"], rows["group"], rows["key"]]
    identified = pc.coalesce(rows["entry_id"], pc.binary_join_element_wise("key ", rows["key"], ""))
    filled = [pc.fill_null(part, "") for part in parts]
    return pc.binary_join_element_wise(*filled, identified, "\n")


def tuples(rows: pa.Table, columns: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    """Rows as tuples of some columns."""
    return zip(*(rows[name].to_pylist() for name in columns), strict=True)


def as_mask(column: Any) -> Any:
    """A column as numpy; of booleans null is false."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_boolean(column.type):
        column = pc.fill_null(column, False)
    return column.to_numpy(zero_copy_only=False)
