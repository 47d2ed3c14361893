"""Which keys of a stage may be sent to workers while a budget limits the run: no worker knows what others pay.

The driver grants calls, sends as many keys as cannot need more, and counts what they cost before it sends the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from featurekit_spark.builder import Bound, Source, keys_of
from featurekit_spark.engines.lookup import stage_candidates
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import entry_id, inputs_hash, key_json
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage
from featurekit_spark.results import Counts

__all__ = ["affordable_parts"]

Key = tuple[Any, ...]


def affordable_parts(
    stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job
) -> Iterator[tuple[Sequence[Key], bool]]:
    """The keys of a stage in parts, each to be run before the next is asked for; all at once without a budget. With
    each, whether this process has to run it: the first calls of all, whose price is not known yet.

    Raises what the purse says where the rest cannot be paid for.
    """
    purse, paid = evaluator.purse, [builder for builder in stage.builders if builder.paid]
    if purse is None or not paid:
        yield keys, False
        return
    name = paid[0].name
    needs = _needs(stage, keys, job)
    while keys:
        wanted = sum(needs)
        granted = purse.grant(name, wanted) if wanted else 0
        size = next((i for i, sofar in enumerate(accumulate(needs)) if sofar > granted), len(keys))
        if not size:
            raise purse.ended(name)
        before, made = purse.calls, _made(evaluator, paid)
        yield keys[:size], not purse.prices(name)
        now = _made(evaluator, paid)
        calls = now.calls - made.calls - (purse.calls - before)  # less what this process has counted itself
        if calls > 0:
            usd = None if now.usd is None or made.usd is None else now.usd - made.usd
            failed = min(now.error - now.remembered - made.error + made.remembered, calls)
            purse.charge_sum(name, calls - failed, usd)
            purse.charge(name, [], [None] * failed)
        keys, needs = keys[size:], needs[size:]


def _needs(stage: KeyedStage, keys: Sequence[Key], job: Job) -> list[int]:
    """How many calls each key can need at most."""
    alive = set()
    for hit in stage_candidates(stage, keys, job):
        builder = next((b for b in stage.builders if b.name == hit.entry.builder), None)
        # Only where nothing else makes its identity does a key alone say that it is a hit.
        if builder is not None and not builder.deps:
            until = builder.freshness.expiry(hit.entry.ts)
            read_again = issubclass(builder, Source) and (until is None or not hit.current)
            if not read_again and (until is None or job.now < until):
                alive.add((builder.name, hit.entry.key))
    standing = {
        builder.name: job.failures.standing(job.bindings[builder], job.now)
        for builder in stage.builders
        if builder.paid and not builder.deps and job.failures is not None
    }
    found = []
    for key in keys:
        texts = [(b, key_json(keys_of(stage.space.key, key, b.key))) for b in stage.builders if b.paid]
        found.append(
            sum(
                (b.name, text) not in alive
                and _identity(job.bindings[b], text) not in standing.get(b.name, ())
                for b, text in texts
            )
        )
    return found


def _identity(bound: Bound, text: str) -> str:
    """The entry_id of a key of a builder without inputs."""
    return entry_id(bound.name, bound.config_hash, text, inputs_hash(()))


def _made(evaluator: Evaluator, paid: Sequence[Any]) -> Counts:
    made = Counts()
    for builder in paid:
        made.add(evaluator.done.get(builder.name, Counts()))
    return made
