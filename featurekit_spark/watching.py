"""What a run's observer is told: micro-batches of paid answers, and the calls that got none.

Knows executions and journals; who observes, and what is made of it, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import pyarrow as pa

from featurekit_spark.bindings import Bindings
from featurekit_spark.cache.journal import Journal, MicroBatch, Observer
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import key_json
from featurekit_spark.job import Job
from featurekit_spark.results import Origin, Result, new_entries, to_rows

__all__ = ["failed_calls", "models_of", "watched"]


@contextmanager
def watched(
    journal: Journal | None, observer: Observer | None, job: Job, evaluator: Callable[[], Evaluator | None]
) -> Iterator[None]:
    """For the length of a run: its observer is told at the end, also where the run fails. `evaluator`: of the run, None
    where it did not come so far."""
    try:
        yield
    finally:
        if observer is not None and journal is not None:
            found = evaluator()
            failed = () if found is None else failed_calls(found, job)
            journal.show(observer, models_of(job.bindings), failed)


def failed_calls(evaluator: Evaluator, job: Job) -> tuple[MicroBatch, ...]:
    """Calls of this run that gave no answer, of each paid builder."""
    batches = []
    for builder, bound in job.bindings.items():
        if builder.paid:
            known = evaluator.results.get(bound.name, {})
            own = [(key_json(key), result) for key, result in known.items() if _was_made(result)]
            if own:
                rows = new_entries(to_rows(bound.name, bound.config_hash, own), job.run_id)
                stamp = pa.array([0] * len(rows), pa.int64())
                now = datetime.now(UTC)
                batches.append(MicroBatch(job.run_id, now, rows.append_column("recorded", stamp)))
    return tuple(batches)


def models_of(bindings: Bindings) -> Mapping[str, str]:
    """The models that paid builders are configured with, by config_hash."""
    found = {}
    for builder, bound in bindings.items():
        name = getattr(bound.config, "model", None) or getattr(bound.config, "embedder", None)
        if builder.paid and isinstance(name, str):
            found[bound.config_hash] = name
    return found


def _was_made(result: Result) -> bool:
    """Whether it failed in this run; answers that are still to come did not."""
    return result.origin is Origin.ERROR and not isinstance(result.cause, AnswersPendingError)
