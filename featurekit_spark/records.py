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

from featurekit_spark.cache.base import ENTRY_SCHEMA, FeatureCache, RunRecord
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.errors import BudgetReachedError, FeaturekitError
from featurekit_spark.execute import Execution
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.masks import masked
from featurekit_spark.results import Counts, Origin, count_rows, entry_rows
from featurekit_spark.watching import failed_calls

__all__ = ["EarlyEnd", "ended_early", "facts_of", "with_earlier_goes"]

_log = logging.getLogger(__name__)
_LONGEST: Final = 500  # characters of a message
_CALL: Final = (
    *("builder", "entry_id", "run_id", "status", "error"),
    *("seconds", "tokens", "usd", "attempts", "estimated_tokens"),
)
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
        counts |= {} if execution is None else _with_answers_kept(counts, cache, graph, execution)
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
        made = count_rows(entry_rows(_calls(cache, builder.name, run_id)), paid=True)
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


def _with_answers_kept(
    counts: Mapping[str, Counts], cache: FeatureCache, graph: Graph, execution: Execution
) -> dict[str, Counts]:
    """Of paid builders, with answers that no stage came to count: they are in the journal, or another run has taken
    them in out of it; and with calls that failed."""
    journal = execution.job.journal
    if journal is None:
        return {}
    # Before the cache is asked: whoever takes a journal in appends what is in it, and only then removes it.
    tables: list[pa.Table] = []
    with suppress(OSError):  # a record of less is better than none
        tables += [batch.rows.select(_CALL) for batch in journal.micro_batches()]
    tables += [calls.rows.select(_CALL) for calls in failed_calls(execution.evaluator, execution.job)]
    left = pa.concat_tables([ENTRY_SCHEMA.empty_table().select(_CALL), *tables])
    found = {}
    for name in (builder.name for builder in graph if builder.paid and not builder.inline):
        rows = _calls(cache, name, journal.run_id, left.filter(pc.equal(left["builder"], name)))
        last, made = counts[name], count_rows(entry_rows(rows), paid=True)
        if made.calls <= last.calls:
            continue
        own = set(rows["entry_id"].to_pylist())
        known = execution.evaluator.results.get(name, {}).values()
        found[name] = replace(
            last,
            hit=max(last.hit - sum(r.origin is Origin.HIT and r.entry_id in own for r in known), 0),
            computed=max(last.computed, made.computed),
            **{amount: getattr(made, amount) for amount in _PAID},
        )
    return found


def _calls(cache: FeatureCache, builder: str, run_id: str, left: pa.Table | None = None) -> pa.Table:
    """What a run made, by its entries and by what is `left` besides. An answer may be there more than once, as others
    have taken it in as well: it is one call."""
    rows = ENTRY_SCHEMA.empty_table().select(_CALL)
    if cache.has(builder):
        stored = cache.history(builder, _CALL)
        rows = stored.filter(pc.equal(stored["run_id"], run_id))
    entries = len(rows)
    rows = rows if left is None else pa.concat_tables([rows, left])
    seen: set[tuple[str, str]] = set()
    places = []
    columns = (rows[name].to_pylist() for name in ("entry_id", "status", "error"))
    for place, (identity, status, error) in enumerate(zip(*columns, strict=True)):
        is_ok = status == "ok"
        again = (identity, status) in seen and (is_ok or place >= entries)
        seen.add((identity, status))
        if not again and (is_ok or (error or "").startswith(f"{builder}[")):
            places.append(place)
    return rows.take(pa.array(places, pa.int64()))
