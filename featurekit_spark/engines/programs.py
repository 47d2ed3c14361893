"""Stages whose builder is a Spark program of its own: called here, on the driver, with a context that can run jobs.

Knows the builders' hook `distributes` and the attributes' `on_spark`; not what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["PROGRAM_ROWS", "driving", "is_program", "program_rows"]

Key = tuple[Any, ...]
PROGRAM_ROWS = 262_144
"""Keys in one call of a program, unless it takes fewer: each call reads what it searches once."""


def is_program(
    stage: KeyedStage,
    group_key: Callable[[tuple[str, ...]], Key],
    evaluator: Evaluator,
    job: Job,
    session: Callable[[], SparkSession] | None = None,
) -> bool:
    """Whether a builder of the stage says that it distributes its work itself; as `program_rows`."""
    return program_rows(stage, group_key, evaluator, job, session) > 0


def program_rows(
    stage: KeyedStage,
    group_key: Callable[[tuple[str, ...]], Key],
    evaluator: Evaluator,
    job: Job,
    session: Callable[[], SparkSession] | None = None,
) -> int:
    """For how many keys at once a builder of the stage says that it distributes its work itself, given what its group's
    features are; 0 where none does. `group_key`: the group's key under the given fields; without a session it is asked
    in the evaluator's context."""
    for builder in stage.builders:
        bound = job.bindings[builder]
        if type(bound.builder).distributes is FeatureBuilder.distributes:
            continue
        shared = {}
        for dep in bound.deps:
            if set(dep.builder.key) <= job.bindings.group_fields and not dep.on_fields:
                result = evaluator.results.get(dep.builder.name, {}).get(group_key(dep.builder.key))
                if result is None or result.failed or result.value is None:
                    return 0  # nothing will be built, or nobody knows yet from what
                shared[dep.name] = result.value
        context = evaluator.context if session is None else _OnSpark(job.context, session)
        rows = bound.builder.distributes(shared, bound.config, bound.view(context))
        if rows:
            return min(rows, PROGRAM_ROWS)
    return 0


@contextmanager
def driving(evaluator: Evaluator, session: Callable[[], SparkSession]) -> Iterator[None]:
    """While this lasts, builders that the evaluator calls may run jobs of the session."""
    context, rows = evaluator.context, evaluator.batch_rows
    evaluator.context, evaluator.batch_rows = _OnSpark(context, session), PROGRAM_ROWS
    try:
        yield
    finally:
        evaluator.context, evaluator.batch_rows = context, rows


class _OnSpark:
    """A context whose attributes run their work by the session, where they can (`on_spark`)."""

    def __init__(self, context: Any, session: Callable[[], SparkSession]) -> None:
        self._context, self._session = context, session

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._context, name)
        return value.on_spark(self._session()) if hasattr(type(value), "on_spark") else value
