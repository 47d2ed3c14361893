"""What a run needs before it pays for anything: its purse, the refusal of calls that are not allowed, and the journal
that keeps answers from the moment they come.

Knows plans and caches; who answers, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from featurekit_spark.budget import Budget, Purse
from featurekit_spark.cache.elsewhere import Elsewhere
from featurekit_spark.cache.journal import JournalingCache, Observer, take_in
from featurekit_spark.costs import known_prices
from featurekit_spark.deferred import deferring
from featurekit_spark.errors import AnswersPendingError, NewCallsError
from featurekit_spark.estimate import estimate_run
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.flight import Leases, SingleFlight
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import Plan
from featurekit_spark.watching import models_of, watched

__all__ = ["journaled", "purse_for", "refuse_new_calls"]

_NAMED = 20  # of the calls that are not allowed


def purse_for(budget: Budget | None, graph: Graph, job: Job) -> Purse | None:
    """What a run may pay; None where nothing limits it."""
    if budget is None or not budget.limited:
        return None
    known = {} if budget.max_usd is None else known_prices(job.cache, graph, job.bindings, job.context)
    return Purse(budget, dearest=known)


def refuse_new_calls(plan: Plan, graph: Graph, job: Job, group: tuple[Any, ...]) -> None:
    """NewCallsError where something would have to be paid for; it is counted before anything is computed.
    AnswersPendingError where all of that is on its way."""
    found = estimate_run(plan, graph, replace(job, purse=None), group=group, named={})
    pending = sum(builder.pending for builder in found.builders)
    are = "1 answer is" if pending == 1 else f"{pending} answers are"
    if not found.calls:
        if pending:
            raise AnswersPendingError(
                f"{are} on the way by batch, and no new calls are allowed. Nothing was computed; run again later."
            )
        return
    missing = []
    for builder in found.builders:
        keys = found.to_pay.get(builder.name, ())
        named = [*keys[:_NAMED], *(["..."] if len(keys) > _NAMED else [])]
        if builder.calls:
            missing.append(
                f"{builder.calls} of {builder.name}" + (f" for {', '.join(named)}" if named else "")
            )
    raise NewCallsError(
        f"{found.calls} calls would have to be paid for, and no new ones are allowed: {'; '.join(missing)}. "
        + f"{are} on the way by batch. " * bool(pending)
        + "Nothing was computed."
    )


@contextmanager
def journaled(
    graph: Graph,
    job: Job,
    *,
    micro_batch: int | None,
    observer: Observer | None,
    leases: Leases | None,
    evaluator: Callable[[], Evaluator | None],
) -> Iterator[Job]:
    """The job with a journal, if it may pay for something. Answers that other runs left are taken in first.

    `evaluator`: of the run, None where it did not come so far: the observer is told what failed.
    """
    if not isinstance(job.cache, JournalingCache) or not any(builder.paid for builder in graph):
        yield job
        return
    bounds = {bound.name: bound for builder, bound in job.bindings.items() if builder.paid}
    take_in(
        job.cache,
        observer=observer,
        models=models_of(job.bindings),
        left=None if job.double is None else partial(job.double.take_left, bounds),
    )
    journal = job.cache.journal(job.run_id, size=micro_batch)
    with nullcontext() if journal is None else journal.opened(), watched(journal, observer, job, evaluator):
        flight = None
        if leases is not None and journal is not None and not deferring(graph, job.context):
            flight = SingleFlight(leases, Elsewhere(journal.folder, job.cache), journal.place, job.run_id)
        yield replace(job, journal=journal, flight=flight)
