"""Which entries a cache can do without, and what recomputing them would cost.

The choice is a pure function of rows, run records, options and an instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.care import alone, record_care
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.rows import (
    ENTRY_COLUMNS,
    PLACE,
    TRACE_COLUMNS,
    Doomed,
    as_mask,
    cost_of,
    current_marks,
    gathered,
    gone_of,
    older,
    run_records,
    take_out,
    traces_of,
    tuples,
)
from featurekit_spark.cache.upkeep import unused_files, vacuum

__all__ = ["GcOptions", "choose", "collect"]


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
        unused = unused_files(cache, "entries", now=now, remove=False)
        return {**doomed.report, "dry_run": True, "unused_files": len(unused), "vacuumed_files": 0}
    with alone(cache, owner="cache gc", warehouse=warehouse):
        entries, traces, runs = _read(cache)
        doomed = choose(entries, traces, runs, options, now=now)
        take_out(cache, entries, traces, doomed)
        unused = unused_files(cache, "entries", now=now, remove=True)
        vacuumed = sum(vacuum(cache, name) for name in files.TABLES)
        report = {
            **doomed.report,
            "dry_run": False,
            "unused_files": len(unused),
            "vacuumed_files": vacuumed,
        }
        if doomed.report["rows"] or doomed.report["traces"]:
            record_care(cache, "gc", now, report)
    return report


def choose(
    entries: pa.Table,
    traces: pa.Table,
    runs: Sequence[RunRecord],
    options: GcOptions,
    *,
    now: datetime,
) -> Doomed:
    """Which rows go: ENTRY_COLUMNS and `bytes`, TRACE_COLUMNS, and the records of runs in. Pure."""
    ok = as_mask(pc.equal(entries["status"], "ok"))
    recorded = as_mask(entries["recorded"])
    stale = _stale(entries, runs) if options.stale_configs else np.zeros(len(entries), bool)
    paid = ok & _paid(entries, runs)
    kept_paid = np.zeros(len(entries), bool) if options.include_paid else paid

    repeated = _repeated(entries, ok)
    named = as_mask(pc.is_in(entries["entry_id"], _named(entries, traces)))
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
    sizes = as_mask(entries["bytes"])
    if options.max_bytes is not None:
        reasons["size"] = _oldest(
            recorded, sizes, ~doomed & ~safe & ~kept_paid, sizes[~doomed].sum() - options.max_bytes
        )
        doomed = doomed | reasons["size"]
    doomed = doomed & ~_would_uncover(entries, traces, ok, doomed)
    gone = gone_of(entries, doomed)
    trace_mask = traces_of(traces, gone)
    kept = {"kept_paid": cost_of(entries.filter(pa.array(paid & ~doomed & (stale | aged))))}
    report = _report(entries, doomed, ok, gone, reasons, int(trace_mask.sum()))
    left = float(sizes[~doomed].sum())
    over = options.max_bytes is not None and left > options.max_bytes
    return Doomed(doomed, trace_mask, gone, {**report, **kept, "bytes_left": int(left), "still_over": over})


def _read(cache: DeltaCache) -> tuple[pa.Table, pa.Table, list[RunRecord]]:
    # Entries first: a trace that is read later may name a newer entry, which then is not asked about.
    entries = files.rows_of(cache, "entries", ENTRY_COLUMNS)
    return entries, files.rows_of(cache, "traces", TRACE_COLUMNS), run_records(cache)


def _stale(entries: pa.Table, runs: Sequence[RunRecord]) -> Any:
    """Rows whose builder runs have had, but under another config in the newest run of every group. A run that stopped
    adds to the one before it, whose answers stand until it has gone on."""
    newest: dict[str, list[Mapping[str, Any]]] = {}
    known: set[str] = set()
    for run in runs:
        builders = run.record.get("builders")
        if builders:
            newest[run.group] = [builders] if run.finished else [*newest.get(run.group, []), builders]
            known |= set(builders)
    current = {
        facts.get("config_hash")
        for every in newest.values()
        for builders in every
        for facts in builders.values()
    }
    configs = pa.array(sorted(filter(None, current)), pa.string())
    of_runs = pc.is_in(entries["builder"], pa.array(sorted(known), pa.string()))
    return as_mask(pc.and_(of_runs, pc.invert(pc.is_in(entries["config_hash"], configs))))


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
    return as_mask(pc.or_(priced, pc.is_in(entries["builder"], pa.array(sorted(builders), pa.string()))))


def _repeated(entries: pa.Table, ok: Any) -> Any:
    """Rows that say nothing more: an entry that is there again, an error after which its key has something newer."""
    again = older(entries, ["entry_id"], ok)
    return (ok & again) | (~ok & older(entries, PLACE, np.ones(len(entries), bool)))


def _named(entries: pa.Table, traces: pa.Table) -> pa.Array:
    """entry_ids that are current, or that the newest rows of targets and groups name."""
    targets = newest_rows(traces.filter(pc.equal(traces["kind"], "target")), ["builder", "group", "key"])
    groups = newest_rows(traces.filter(pc.equal(traces["kind"], "group")), ["builder", "group"])
    ids = [i for reads in groups["reads"].to_pylist() for i in gathered(reads)]
    for rows in (current_marks(entries, traces), targets):
        ids += [i for i in rows["entry_id"].to_pylist() if i is not None]
    return pa.array(sorted(set(ids)), pa.string())


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
    current = as_mask(pc.is_in(entries["entry_id"], marks["entry_id"].combine_chunks())) & ok
    if not (current & doomed).any():
        return np.zeros(len(entries), bool)
    survivors = entries.filter(pa.array(ok & ~doomed))
    alive_ids = set(survivors["entry_id"].to_pylist())
    alive_keys = set(tuples(survivors, PLACE))
    ids = entries["entry_id"].to_pylist()
    return np.fromiter(
        (
            bool(c and d) and key in alive_keys and i not in alive_ids
            for c, d, key, i in zip(current, doomed, tuples(entries, PLACE), ids, strict=True)
        ),
        bool,
        len(entries),
    )


def _report(
    entries: pa.Table, doomed: Any, ok: Any, gone: pa.Array, reasons: Mapping[str, Any], traces: int
) -> dict[str, Any]:
    going = entries.filter(pa.array(doomed))
    lost = entries.filter(pa.array(doomed & ok & as_mask(pc.is_in(entries["entry_id"], gone))))
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
