"""Making entries no longer answer, for a reason that is kept: the next run computes just those again.

An entry is never marked; it is taken out, after the traces by which runs prove keys without looking at it. Knows no
graph: in every group whose runs had the builder, each key is looked up once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord, TraceRow
from featurekit_spark.cache.care import alone, record_care
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.journal import take_in
from featurekit_spark.cache.rows import (
    ENTRY_COLUMNS,
    PLACE,
    TRACE_COLUMNS,
    Doomed,
    as_mask,
    cost_of,
    current_marks,
    gone_of,
    run_records,
    take_out,
    traces_of,
    tuples,
)
from featurekit_spark.errors import UsageError, known_names

__all__ = ["invalidate", "known_builders"]

_KEPT_KEYS = 1000  # of a record's keys; more are counted


def invalidate(
    cache: DeltaCache,
    builder: str,
    keys: Sequence[str] | None,
    *,
    reason: str,
    now: datetime,
    dry_run: bool = False,
    warehouse: str | None = None,
) -> dict[str, Any]:
    """Take out all entries of a builder (`keys` None) or those of some keys (canonical JSON); a report with their cost.

    Raises UsageError for a builder that has none, LockedError while a run reads the cache.
    """
    if builder not in known_builders(cache):
        raise UsageError(
            f"builder {builder!r} has no entries in {cache.path}. {known_names(builder, known_builders(cache))}"
        )
    if dry_run:
        return {**_chosen(cache, builder, keys)[2].report, "dry_run": True, "reason": reason}
    with alone(cache, owner="invalidate", warehouse=warehouse):
        take_in(cache, nobody_runs=True)  # else the next run would bring them back
        entries, traces, doomed = _chosen(cache, builder, keys)
        report = {**doomed.report, "dry_run": False, "reason": reason}
        if doomed.entries.any():
            # Which entry is current must not change for keys that only lose their proof.
            cache.append(None, _still_current(entries, traces, doomed))
            take_out(cache, entries, traces, doomed)
            asked = None if keys is None else list(keys)[:_KEPT_KEYS]
            report["run_id"] = record_care(cache, "invalidate", now, {**report, "keys_asked": asked})
    return report


def known_builders(cache: DeltaCache) -> list[str]:
    """Builders that have entries."""
    table = cache.table("entries")
    return sorted({file.builder for file in files.data_files(table)}) if table is not None else []


def _chosen(cache: DeltaCache, builder: str, keys: Sequence[str] | None) -> tuple[pa.Table, pa.Table, Doomed]:
    entries = files.rows_of(cache, "entries", ENTRY_COLUMNS)
    traces = files.rows_of(cache, "traces", (*TRACE_COLUMNS, "ts", "run_id"))
    own = pc.equal(entries["builder"], builder)
    if keys is not None:
        own = pc.and_(own, pc.is_in(entries["key"], pa.array(list(keys), pa.string())))
    mask = as_mask(own)
    gone = gone_of(entries, mask)
    proofs = _proofs(traces, builder, run_records(cache)) if mask.any() else None
    trace_mask = traces_of(traces, gone, also=proofs)
    lost = entries.filter(own)
    answers = newest_rows(lost.filter(pc.equal(lost["status"], "ok")), "entry_id")
    found = set(lost["key"].to_pylist())
    report = {
        "builder": builder,
        "rows": len(lost),
        "keys": len(found),
        "keys_without_entries": sorted(set(keys or ()) - found),
        "traces": int(trace_mask.sum()),
        "recompute": cost_of(answers),
    }
    return entries, traces, Doomed(mask, trace_mask, gone, report)


def _proofs(traces: pa.Table, builder: str, runs: Sequence[RunRecord]) -> Any:
    """Target and group rows of every group whose runs had the builder, or of which no run is recorded."""
    had: dict[str, bool] = {}
    for run in runs:
        builders = run.record.get("builders")
        if builders is not None:
            had[run.group] = had.get(run.group, False) or builder in builders
    free = pa.array([group for group, has in had.items() if not has], pa.string())
    proofs = pc.not_equal(traces["kind"], "pointer")
    return as_mask(pc.and_(proofs, pc.invert(pc.is_in(traces["group"], free))))


def _still_current(entries: pa.Table, traces: pa.Table, doomed: Doomed) -> list[TraceRow]:
    """Pointers that say of each key what its going target row said, where nothing else would."""
    going = traces.filter(pa.array(doomed.traces))
    targets = newest_rows(
        going.filter(pc.and_(pc.equal(going["kind"], "target"), pc.equal(going["status"], "ok"))), PLACE
    )
    now = _by_place(current_marks(entries, traces))
    kept = entries.filter(pa.array(~doomed.entries)), traces.filter(pa.array(~doomed.traces))
    then = _by_place(current_marks(*kept))
    # A target's reads are sources that values led to; a pointer's are what a hand-written get read.
    hand = traces.filter(pc.and_(pc.equal(traces["kind"], "pointer"), pc.is_valid(traces["reads"])))
    by_hand = set(hand["builder"].to_pylist())
    alive = {None, *kept[0]["entry_id"].to_pylist()}
    rows = []
    for row in targets.to_pylist():
        place = tuple(row[name] for name in PLACE)
        entry = now[place]
        if entry in alive and then.get(place, "") != entry and row["entry_id"] == entry:
            rows.append(
                TraceRow(
                    row["builder"],
                    "pointer",
                    row["key"],
                    row["config_hash"],
                    row["ts"],
                    row["run_id"],
                    reads=row["reads"] if row["builder"] in by_hand else None,
                    entry_id=entry,
                )
            )
    return rows


def _by_place(marks: pa.Table) -> dict[tuple[str, ...], str | None]:
    return dict(zip(tuples(marks, PLACE), marks["entry_id"].to_pylist(), strict=True))
