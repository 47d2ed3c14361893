"""Clients whose answers may come when the run that asked has ended: what the core asks of them, and how what came is
taken into the cache.

Knows builders and entries; what is handed in, and to whom, is the client's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.controller import commit
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job

__all__ = ["Deferring", "deferring", "handing_in", "take_in_answers"]

_ASKED_BY = ("prompt",)


@runtime_checkable
class Deferring(Protocol):
    """A client that hands calls in. While it is `opened`, a call that has no answer yet raises AnswersPendingError,
    once all that a stage asks together have been handed in; only the driver calls it."""

    def opened(self, run_id: str) -> AbstractContextManager[None]:
        """For the length of a run, or of a part of it. What was answered meanwhile is in the cache when it ends."""

    def taking_in(self, run_id: str) -> AbstractContextManager[Mapping[str, Sequence[str]]]:
        """As `opened`, with what came of earlier runs: the prompts that have an answer, by the run that asked. No other
        run is given them meanwhile."""

    def recalling(self) -> AbstractContextManager[None]:
        """Meanwhile nothing is handed in, and no error is told: answers that came are given."""


def deferring(builders: Iterable[type[FeatureBuilder[Any]]], context: Any) -> list[Deferring]:
    """The clients of paid builders that hand calls in."""
    names = dict.fromkeys(name for builder in builders if builder.paid for name in builder.needs)
    clients = (getattr(context, name, None) for name in names)
    return [client for client in clients if isinstance(client, Deferring)]


@contextmanager
def handing_in(graph: Graph, job: Job) -> Iterator[None]:
    """For the length of a run."""
    with ExitStack() as opened:
        for client in deferring(graph, job.context):
            opened.enter_context(client.opened(job.run_id))
        yield


def take_in_answers(graph: Graph, job: Job) -> None:
    """Before anything is planned or refused: what came of earlier runs' calls, of any group, becomes entries under
    those runs' names. What no builder of this graph asks for stays where it is, for a run whose builder does.
    """
    for client in deferring(graph, job.context):
        with client.taking_in(job.run_id) as answered:
            for run_id, prompts in answered.items():
                for builder in graph:
                    asks = builder.paid and builder.key == _ASKED_BY and not job.bindings[builder].deps
                    if asks and client in deferring([builder], job.context):
                        _take_in(client, builder, prompts, job, run_id)


def _take_in(
    client: Deferring, builder: type[FeatureBuilder[Any]], prompts: Sequence[str], job: Job, run_id: str
) -> None:
    evaluator = Evaluator(job.bindings, job.context, job.cache, now=job.now, batch_rows=len(prompts))
    with client.recalling(), suppress(AnswersPendingError):  # of prompts that another builder asked
        evaluator.resolve(builder, [(prompt,) for prompt in prompts])
    commit(job.cache, evaluator, run_id=run_id)
