"""Puts published outputs of one merchant and market back to what an earlier run had published.

Everything is found before anything is changed. Takes sinks and a cache; must not know how rows are computed, nor where
the name of a run comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from featurekit_spark.cache.base import FeatureCache, RunRecord
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.pipelines.logic import published_group
from featurekit_spark.sinks.base import Publication, Sink
from featurekit_spark.sinks.delta import DeltaSink
from featurekit_spark.sinks.history import Held
from featurekit_spark.sinks.redis import RedisSink

__all__ = ["Step", "rollback"]


@dataclass(frozen=True)
class Step:
    """What a sink holds, and what becomes of it. `held`: the rows that are written; None where nothing is: the sink
    holds them already, or (`switch`) keeps them beside what is live."""

    sink: Sink
    found: str | None
    run_id: str
    rows: int
    how: str
    held: Held | None = None
    switch: bool = False


def rollback(
    sinks: Sequence[Sink],
    cache: FeatureCache,
    *,
    merchant: str,
    market: str,
    runs: Mapping[str, str],
    logic_builders: Sequence[str],
    run_id: str,
    now: datetime,
    dry_run: bool = False,
) -> list[Step]:
    """Each sink goes back to what `runs` says by its name. A Delta sink's history has the rows, for the others too; a
    versioned Redis may still have them itself.

    Rows keep the run and the time that they had. The marks of the sinks are dropped first, so that the next run
    publishes again, also where this one ends halfway. `run_id` and `now` name this going back in the runs table.
    Raises UsageError, before anything is changed, for a run that no sink has.
    """
    for sink in sinks:
        sink.check()
    steps = [_step(sink, sinks, merchant, market, runs[sink.name]) for sink in sinks]
    if dry_run:
        return steps
    group = published_group(merchant, market)
    last = cache.last_run(group)
    moved = {step.sink.name for step in steps if step.switch or step.held is not None}
    kept = {name: mark for name, mark in (last.record["sinks"] if last else {}).items() if name not in moved}
    if moved:
        cache.put_mark(group, None)
        cache.record_run(RunRecord(run_id, group, now, "rolled back", {"sinks": kept, "to": dict(runs)}))
    for step in steps:
        if step.held is not None:
            names = [*logic_builders, *(n for n in _builders(step.held) if n not in logic_builders)]
            held = step.held
            step.sink.publish(Publication(merchant, market, held.run_id, held.ts, tuple(names), held.rows))
        elif step.switch:
            _switch_back(step, merchant, market)
    return steps


def _step(sink: Sink, sinks: Sequence[Sink], merchant: str, market: str, run_id: str) -> Step:
    state = sink.state(merchant, market)
    found = state.run_id if state else None
    if state is not None and state.run_id == run_id:
        return Step(sink, found, run_id, state.rows, "holds it already")
    if isinstance(sink, RedisSink):
        back = sink.switch_back(merchant, market, run_id, dry_run=True)
        if back is not None:
            return Step(sink, found, run_id, back.rows, "its generation before", switch=True)
    tables = sorted((s for s in sinks if isinstance(s, DeltaSink)), key=lambda table: table is not sink)
    for table in tables:
        held = table.earlier(merchant, market, run_id)
        if held is not None:
            return Step(sink, found, run_id, len(held.rows), f"{table.name} version {held.version}", held)
    known = [name for table in tables for name in table.runs(merchant, market)]
    told = (
        f"Runs that are known: {', '.join(dict.fromkeys(known[:10]))}." if known else "No run is known there."
    )
    where = (
        f"in the history of {', '.join(table.name for table in tables)}" if tables else "without a Delta sink"
    )
    raise UsageError(
        f"{sink.name} cannot go back to run {run_id!r} of {merchant} in {market}: its rows are not found {where}. "
        f"{told} Nothing was changed."
    )


def _switch_back(step: Step, merchant: str, market: str) -> None:
    assert isinstance(step.sink, RedisSink)  # no other sink's step says so
    if step.sink.switch_back(merchant, market, step.run_id) is None:
        raise DataError(
            f"{step.sink.name}: what run {step.run_id!r} published was removed meanwhile; try again."
        )


def _builders(held: Held) -> list[str]:
    return [str(name) for name in held.rows["logic_builder"].unique().to_pylist()]
