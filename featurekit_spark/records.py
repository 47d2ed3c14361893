"""What a run's record says: of each builder what its entries are found by and what was done; of a run that ended before
its end also why, and what was paid by then.

Knows executions, journals and caches; who ends a run, and who is told, it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import FeatureCache, RunRecord
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.errors import BudgetReachedError, FeaturekitError
from featurekit_spark.execute import Execution
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.masks import masked
from featurekit_spark.results import BUILT, Counts, count_rows, entry_rows

__all__ = ["EarlyEnd", "ended_early", "facts_of", "with_earlier_goes"]

_log = logging.getLogger(__name__)
_LONGEST: Final = 500  # characters of a message
_PAID: Final = ("calls", "tokens", "usd", "seconds", "attempts", "failed_attempts", "estimated_tokens")


@dataclass(frozen=True)
class EarlyEnd:
    """How far a run came that ended before its end. `builders`: what was done and paid, with answers that only its
    journal has."""

    builders: Mapping[str, Counts] = field(default_factory=dict)
    paid_twice: PaidTwice = field(default_factory=PaidTwice)


def facts_of(
    counts: Mapping[str, Counts], graph: Graph, job: Job, *, keys: int | None, unchanged: bool
) -> dict[str, Any]:
    """A run's record: of each builder what its entries are found by, and what was done."""
    builders = {}
    for builder in graph:
        bound = job.bindings[builder]
        builders[builder.name] = {
            "type": bound.type.text,
            "version": bound.version,
            "config_hash": bound.config_hash,
            "config": repr(bound.config),
            "paid": builder.paid,
            **asdict(counts[builder.name]),
        }
    told = {"keys": keys, "unchanged": unchanged, "builders": builders}
    return told if job.double is None else {**told, "paid_twice": asdict(job.double.found)}


def ended_early(
    cache: FeatureCache,
    graph: Graph,
    job: Job,
    group: tuple[Any, ...],
    execution: Execution | None,
    error: BaseException,
) -> EarlyEnd:
    """Keep a record of a run that `error` ended: `stopped` by its budget, else `failed`. `execution`: None where it did
    not come so far. Raises nothing: what goes wrong here is a warning, as the error is what has to be told."""
    end = EarlyEnd()
    try:
        counts = {builder.name: Counts() for builder in graph}
        counts |= {} if execution is None else execution.counts()
        for name, left in _left_in_journal(cache, execution).items():
            counts[name] = Counts(**asdict(counts[name]))
            counts[name].add(left)
        end = EarlyEnd(counts, PaidTwice() if job.double is None else job.double.found)
        facts = facts_of(counts, graph, job, keys=_keys(execution), unchanged=False)
        status = "stopped" if isinstance(error, BudgetReachedError) else "failed"
        facts["error"] = _told(error)
        cache.record_run(RunRecord(job.run_id, key_json(group), job.now, status, facts))
    except Exception as trouble:
        _log.warning("no record of run %s, which ended early, could be kept: %s", job.run_id, trouble)
    return end


def with_earlier_goes(
    counts: Mapping[str, Counts], cache: FeatureCache, graph: Graph, run_id: str
) -> dict[str, Counts]:
    """Counts of a run's last go, with the calls of those before: a run that waits for answers of a batch goes on with
    what came as with what was there before. An entry under its name is a call of its own."""
    found = dict(counts)
    for builder in graph:
        if not builder.paid or builder.inline or not cache.has(builder.name):
            continue
        rows = cache.history(builder.name)
        rows = rows.filter(pc.equal(rows["run_id"], run_id))
        own = pc.starts_with(pc.fill_null(rows["error"], ""), f"{builder.name}[")
        made = count_rows(entry_rows(rows.filter(pc.or_(pc.equal(rows["status"], "ok"), own))), paid=True)
        last = counts[builder.name]
        earlier = max(made.computed - last.computed, 0)
        found[builder.name] = replace(
            last,
            hit=max(last.hit - earlier, 0),
            computed=last.computed + earlier,
            remembered=max(last.remembered - made.error, 0),
            **{name: getattr(made, name) for name in _PAID},
        )
    return found


def _keys(execution: Execution | None) -> int | None:
    if execution is not None and execution.checks:
        with suppress(LookupError):
            return execution.keys
    return None


def _told(error: BaseException) -> str:
    message = str(error).strip()
    told = (
        message if isinstance(error, FeaturekitError) else f"{type(error).__name__}: {message}".rstrip(": ")
    )
    return masked(told)[:_LONGEST]


def _left_in_journal(cache: FeatureCache, execution: Execution | None) -> dict[str, Counts]:
    """Answers of workers that a stage did not come to commit: the next run takes them in, and they are paid for."""
    journal = None if execution is None else execution.job.journal
    if execution is None or journal is None:
        return {}
    tables = [batch.rows for batch in journal.micro_batches()]
    if not tables:
        return {}
    rows = pa.concat_tables(tables)
    found = {}
    for name in rows["builder"].unique().to_pylist():
        own = rows.filter(pc.equal(rows["builder"], name))
        stored = cache.history(name, ["entry_id", "run_id"])
        counted = set(stored.filter(pc.equal(stored["run_id"], journal.run_id))["entry_id"].to_pylist())
        known = execution.evaluator.results.get(name, {}).values()
        counted |= {result.entry_id for result in known if result.origin in BUILT}
        first = {identity: at for at, identity in reversed(list(enumerate(own["entry_id"].to_pylist())))}
        places = sorted(at for identity, at in first.items() if identity not in counted)
        if places:
            found[name] = count_rows(entry_rows(own.take(pa.array(places))), paid=True)
    return found
