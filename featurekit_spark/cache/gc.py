"""Which entries a cache can do without, what recomputing them would cost, and taking them out.

The choice is a pure function of rows, run records, options and an instant. Traces go before the entries that they name,
so that a crash in between leaves a trace less and never one that leads nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.care import CARE_GROUP, alone, clear_state, record_care
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache

__all__ = [
    "ENTRY_COLUMNS",
    "TRACE_COLUMNS",
    "Doomed",
    "GcOptions",
    "choose",
    "collect",
    "cost_of",
    "current_marks",
    "run_records",
    "take_out",
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
_KEY = ["builder", "config_hash", "key"]


@dataclass(frozen=True)
class GcOptions:
    """What may go. `older_than`: since it was stored; `stale_configs`: of configs that no group's newest run had;
    `max_bytes`: oldest first until the entries take so much.

    Without `include_current` what traces and pointers name stays, except under a stale config; without
    `include_paid` so does what has tokens or a price.
    """

    older_than: timedelta | None = None
    stale_configs: bool = False
    max_bytes: int | None = None
    include_paid: bool = False
    include_current: bool = False


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
        if table is not None:
            rows += [row for part in files.file_rows(table, "runs", file) for row in part.to_pylist()]
    rows.sort(key=lambda row: row["recorded"])
    return [
        RunRecord(**{**row, "record": json.loads(row["record"])})
        for row in rows
        if row["group"] != CARE_GROUP
    ]


def collect(
    cache: DeltaCache,
    options: GcOptions,
    *,
    now: datetime,
    dry_run: bool = False,
    warehouse: str | None = None,
) -> dict[str, Any]:
    """Take out what `options` let go, and files that belong to nothing; a report of it, with its cost.

    Raises LockedError while a run reads the cache, CacheError where a table cannot be read.
    """
    if dry_run:
        doomed = choose(*_read(cache), options, now=now)
        unused = files.unused_files(cache, "entries", now=now, remove=False)
        return {**doomed.report, "dry_run": True, "unused_files": len(unused), "vacuumed_files": 0}
    with alone(cache, owner="cache gc", warehouse=warehouse):
        entries, traces, runs = _read(cache)
        doomed = choose(entries, traces, runs, options, now=now)
        take_out(cache, entries, traces, doomed)
        unused = files.unused_files(cache, "entries", now=now, remove=True)
        vacuumed = sum(files.vacuum(cache, name) for name in files.TABLES)
        report = {
            **doomed.report,
            "dry_run": False,
            "unused_files": len(unused),
            "vacuumed_files": vacuumed,
        }
        if doomed.report["rows"] or doomed.report["traces"]:
            record_care(cache, "gc", now, report)
    return report


def take_out(cache: DeltaCache, entries: pa.Table, traces: pa.Table, doomed: Doomed) -> None:
    """Take the chosen rows out: marks of runs, then traces, then entries."""
    clear_state(cache)
    for name, rows, mask, columns in (
        ("traces", traces, doomed.traces, TRACE_COLUMNS),
        ("entries", entries, doomed.entries, ENTRY_COLUMNS),
    ):
        if not mask.any():
            continue
        chosen = rows.filter(pa.array(mask))
        builders = set(chosen["builder"].unique().to_pylist())
        files.remove_rows(cache, name, _those(chosen), columns=columns, builders=builders)
    clear_state(cache)


def choose(
    entries: pa.Table,
    traces: pa.Table,
    runs: Sequence[RunRecord],
    options: GcOptions,
    *,
    now: datetime,
) -> Doomed:
    """Which rows go: ENTRY_COLUMNS and `bytes`, TRACE_COLUMNS, and the records of runs in. Pure."""
    ok = _np(pc.equal(entries["status"], "ok"))
    recorded = _np(entries["recorded"])
    stale = _stale(entries, runs) if options.stale_configs else np.zeros(len(entries), bool)
    paid = ok & _paid(entries, runs)
    kept_paid = np.zeros(len(entries), bool) if options.include_paid else paid

    repeated = _repeated(entries, ok)
    named = _np(pc.is_in(entries["entry_id"], _named(entries, traces)))
    safe = (named & ok) | (~ok & ~repeated)  # a key's newest error says why it has no value
    safe = np.zeros(len(entries), bool) if options.include_current else safe & ~stale

    aged = np.zeros(len(entries), bool)
    if options.older_than is not None:
        aged = (recorded < int((now - options.older_than).timestamp() * 1e9)) & ~safe
    reasons: dict[str, Any] = {
        "repeated": repeated,
        "stale_config": stale & ~kept_paid & ~repeated,
        "age": aged & ~kept_paid & ~repeated & ~stale,
    }
    doomed = np.logical_or.reduce(list(reasons.values()))
    sizes = _np(entries["bytes"])
    if options.max_bytes is not None:
        reasons["size"] = _oldest(
            recorded, sizes, ~doomed & ~safe & ~kept_paid, sizes[~doomed].sum() - options.max_bytes
        )
        doomed = doomed | reasons["size"]
    doomed = doomed & ~_would_uncover(entries, traces, ok, doomed)
    gone = _gone(entries, ok, doomed)
    trace_mask = _traces_of(traces, gone)
    kept = {"kept_paid": cost_of(entries.filter(pa.array(paid & ~doomed & (stale | aged))))}
    report = _report(entries, doomed, ok, gone, reasons, int(trace_mask.sum()))
    left = float(sizes[~doomed].sum())
    over = options.max_bytes is not None and left > options.max_bytes
    return Doomed(doomed, trace_mask, gone, {**report, **kept, "bytes_left": int(left), "still_over": over})


def current_marks(entries: pa.Table, traces: pa.Table) -> pa.Table:
    """The newest mark (entry_id, or null) of every builder, config and key: what is current there."""
    columns = [*_KEY, "entry_id", "recorded"]
    pointers = traces.filter(pc.and_(pc.not_equal(traces["kind"], "group"), pc.equal(traces["status"], "ok")))
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    return newest_rows(pa.concat_tables([ok.select(columns), pointers.select(columns)]), _KEY)


def cost_of(rows: pa.Table) -> dict[str, Any]:
    """What building these rows took: entries, seconds, tokens, usd (None where nothing has a price)."""
    priced = rows["usd"].null_count < len(rows)
    return {
        "entries": len(rows),
        "seconds": round(pc.sum(rows["seconds"]).as_py() or 0.0, 6),
        "tokens": pc.sum(rows["tokens"]).as_py() or 0,
        "usd": round(pc.sum(rows["usd"]).as_py() or 0.0, 6) if priced else None,
    }


def _read(cache: DeltaCache) -> tuple[pa.Table, pa.Table, list[RunRecord]]:
    # Entries first: a trace that is read later may name a newer entry, which then is not asked about.
    entries = files.rows_of(cache, "entries", ENTRY_COLUMNS)
    return entries, files.rows_of(cache, "traces", TRACE_COLUMNS), run_records(cache)


def _stale(entries: pa.Table, runs: Sequence[RunRecord]) -> Any:
    """Rows whose builder runs have had, but under another config in the newest run of every group."""
    newest: dict[str, Mapping[str, Any]] = {}
    known: set[str] = set()
    for run in runs:
        builders = run.record.get("builders")
        if builders:
            newest[run.group] = builders
            known |= set(builders)
    current = {facts.get("config_hash") for builders in newest.values() for facts in builders.values()}
    configs = pa.array(sorted(filter(None, current)), pa.string())
    of_runs = pc.is_in(entries["builder"], pa.array(sorted(known), pa.string()))
    return _np(pc.and_(of_runs, pc.invert(pc.is_in(entries["config_hash"], configs))))


def _paid(entries: pa.Table, runs: Sequence[RunRecord]) -> Any:
    """Rows with tokens or a price, and those of builders that runs counted calls for."""
    builders = {
        name
        for run in runs
        for name, facts in (run.record.get("builders") or {}).items()
        if facts.get("calls")
    }
    priced = pc.or_(
        pc.greater(pc.fill_null(entries["tokens"], 0), 0), pc.greater(pc.fill_null(entries["usd"], 0.0), 0.0)
    )
    return _np(pc.or_(priced, pc.is_in(entries["builder"], pa.array(sorted(builders), pa.string()))))


def _repeated(entries: pa.Table, ok: Any) -> Any:
    """Rows that say nothing more: an entry that is there again, an error after which its key has something newer."""
    again = _older(entries, ["entry_id"], ok)
    return (ok & again) | (~ok & _older(entries, _KEY, np.ones(len(entries), bool)))


def _older(rows: pa.Table, by: list[str], among: Any) -> Any:
    """Rows that are not the newest of their group, of those among which to look."""
    if not len(rows):
        return np.zeros(0, bool)
    some = rows.select([*by, "recorded"]).filter(pa.array(among))
    newest = some.group_by(by).aggregate([("recorded", "max")])
    stamps = dict(zip(_tuples(newest, by), newest["recorded_max"].to_pylist(), strict=True))
    own = _np(rows["recorded"])
    last = np.fromiter((stamps.get(key, 0) for key in _tuples(rows, by)), np.int64, len(rows))
    return own < last


def _named(entries: pa.Table, traces: pa.Table) -> pa.Array:
    """entry_ids that are current, or that the newest rows of targets and groups name."""
    targets = newest_rows(traces.filter(pc.equal(traces["kind"], "target")), ["builder", "group", "key"])
    groups = newest_rows(traces.filter(pc.equal(traces["kind"], "group")), ["builder", "group"])
    ids = [i for reads in groups["reads"].to_pylist() for i in _gathered(reads)]
    for rows in (current_marks(entries, traces), targets):
        ids += [i for i in rows["entry_id"].to_pylist() if i is not None]
    return pa.array(sorted(set(ids)), pa.string())


def _gathered(reads: str | None) -> list[str]:
    return [identity for *_, identity in json.loads(reads or "[]") if identity is not None]


def _oldest(recorded: Any, sizes: Any, candidates: Any, excess: float) -> Any:
    """Of the candidates the oldest that together take `excess` bytes."""
    chosen = np.zeros(len(recorded), bool)
    if excess > 0:
        order = np.flatnonzero(candidates)[np.argsort(recorded[candidates], kind="stable")]
        freed = np.cumsum(sizes[order])
        chosen[order[: int(np.searchsorted(freed, excess)) + 1]] = True
    return chosen


def _would_uncover(entries: pa.Table, traces: pa.Table, ok: Any, doomed: Any) -> Any:
    """Current entries without which an older answer would be the current one again: they stay."""
    marks = current_marks(entries, traces)
    current = _np(pc.is_in(entries["entry_id"], marks["entry_id"].combine_chunks())) & ok
    if not (current & doomed).any():
        return np.zeros(len(entries), bool)
    survivors = entries.filter(pa.array(ok & ~doomed))
    alive_ids = set(survivors["entry_id"].to_pylist())
    alive_keys = set(_tuples(survivors, _KEY))
    ids = entries["entry_id"].to_pylist()
    return np.fromiter(
        (
            bool(c and d) and key in alive_keys and i not in alive_ids
            for c, d, key, i in zip(current, doomed, _tuples(entries, _KEY), ids, strict=True)
        ),
        bool,
        len(entries),
    )


def _gone(entries: pa.Table, ok: Any, doomed: Any) -> pa.Array:
    going = set(entries["entry_id"].filter(pa.array(ok & doomed)).to_pylist())
    going -= set(entries["entry_id"].filter(pa.array(ok & ~doomed)).to_pylist())
    return pa.array(sorted(going - {None}), pa.string())


def _traces_of(traces: pa.Table, gone: pa.Array) -> Any:
    """Rows that name an entry that goes. Where that is the newest of a target's key, or of its group, all of them go:
    an older one would be taken for what holds now."""
    if not len(gone) or not len(traces):
        return np.zeros(len(traces), bool)
    lost = set(gone.to_pylist())
    direct = _np(pc.is_in(traces["entry_id"], gone))
    groups = _np(pc.equal(traces["kind"], "group"))
    if groups.any():
        reads = traces["reads"].to_pylist()
        direct = direct | np.fromiter(
            (bool(g) and not lost.isdisjoint(_gathered(r)) for g, r in zip(groups, reads, strict=True)),
            bool,
            len(traces),
        )
    by = ["builder", "kind", "group", "key"]
    newest = ~_older(traces, by, np.ones(len(traces), bool))
    pointers = _np(pc.equal(traces["kind"], "pointer"))
    broken = set(_tuples(traces.filter(pa.array(direct & newest & ~pointers)), by))
    whole = np.fromiter((key in broken for key in _tuples(traces, by)), bool, len(traces))
    return direct | whole


def _report(
    entries: pa.Table, doomed: Any, ok: Any, gone: pa.Array, reasons: Mapping[str, Any], traces: int
) -> dict[str, Any]:
    going = entries.filter(pa.array(doomed))
    lost = entries.filter(pa.array(doomed & ok & _np(pc.is_in(entries["entry_id"], gone))))
    lost = newest_rows(lost, "entry_id")
    builders = {}
    for name in sorted(going["builder"].unique().to_pylist()):
        own = going.filter(pc.equal(going["builder"], name))
        builders[name] = {
            "rows": len(own),
            "bytes": int(pc.sum(own["bytes"]).as_py()),
            **cost_of(lost.filter(pc.equal(lost["builder"], name))),
        }
    return {
        "rows": len(going),
        "traces": traces,
        "bytes": int(pc.sum(going["bytes"]).as_py() or 0),
        "reasons": {name: int((mask & doomed).sum()) for name, mask in reasons.items()},
        "recompute": cost_of(lost),
        "builders": builders,
    }


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


def _tuples(rows: pa.Table, columns: Iterable[str]) -> Iterable[tuple[Any, ...]]:
    return zip(*(rows[name].to_pylist() for name in columns), strict=True)


def _np(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_boolean(column.type):
        column = pc.fill_null(column, False)
    return column.to_numpy(zero_copy_only=False)
