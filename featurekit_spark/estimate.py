"""What a run would do and cost, told without doing it: a dry walk over the very plan that a run carries out.

Sources are read and light builders evaluated, in memory; everything else that no entry answers stays unknown, and so
does what reads it. Writes nothing, pays nothing, starts no JVM. How an estimate is shown is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from featurekit_spark.adopt import adopted_hashes
from featurekit_spark.batch import Batch
from featurekit_spark.builder import Bound, Dep, Each
from featurekit_spark.cache.base import Found
from featurekit_spark.changes import Change, changed_builders
from featurekit_spark.controller import HandController
from featurekit_spark.costs import CostOfOne, cost_of_one, failed_before, newest_ok
from featurekit_spark.deferred import collecting, on_the_way
from featurekit_spark.engines.local import LocalEngine
from featurekit_spark.engines.lookup import local_builders
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.execute import Execution
from featurekit_spark.failures import FailedKeys
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage, Plan, Space
from featurekit_spark.results import BUILT, Origin, Result

__all__ = ["BuilderEstimate", "PlanEstimate", "estimate_run", "key_jumps"]

Key = tuple[Any, ...]
_JUMP = 1.5
_UNKNOWN = CostOfOne(None, None, None)


@dataclass(frozen=True)
class BuilderEstimate:
    """What a run would do for one builder, in keys.

    `hit`: answered by the cache, those `proven` by a target's trace among them (nothing below those is walked).
    `stale`: there is an entry, but its ttl has passed. `miss`: there is none. `error`: failed last time and is built
    again, or fails already now. `empty`: null because an input is. `estimated`: some keys are told from history, or
    depend on values that are not there yet and may turn out to be hits. `pending`: calls that were handed in before
    and are on their way, which are not made again and not among `calls` (unless the client is to pay again).
    `calls`, `tokens`, `usd` and `seconds` (of one core) are for what is built, by this builder's own entries; None
    where nothing tells. `expected`: no entry tells, and tokens and usd come from the requests, an assumed length of
    answers and the model's price.
    """

    name: str
    paid: bool
    hit: int = 0
    proven: int = 0
    stale: int = 0
    miss: int = 0
    error: int = 0
    empty: int = 0
    estimated: bool = False
    calls: int = 0
    pending: int = 0
    tokens: int | None = 0
    usd: float | None = 0.0
    seconds: float | None = 0.0
    expected: bool = False

    @property
    def to_build(self) -> int:
        return self.stale + self.miss + self.error

    @property
    def keys(self) -> int:
        return self.hit + self.stale + self.miss + self.error + self.empty


@dataclass(frozen=True)
class PlanEstimate:
    """What a run would do. `keys`: of the first target; `unchanged`: every key of every target is proven; `changes`:
    builders whose code, config or type is another than in the group's last run; `to_pay`: by paid builder the keys (as
    JSON) that no entry answers, as far as they are known; `failed`: what paid builders failed at before
    and were not answered since, by kind."""

    group: Mapping[str, Any]
    ts: datetime
    keys: int
    unchanged: bool
    builders: tuple[BuilderEstimate, ...]
    warnings: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    to_pay: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failed: tuple[FailedKeys, ...] = ()

    def __getitem__(self, name: str) -> BuilderEstimate:
        return next(builder for builder in self.builders if builder.name == name)

    @property
    def estimated(self) -> bool:
        return any(builder.estimated for builder in self.builders)

    @property
    def calls(self) -> int:
        return sum(builder.calls for builder in self.builders)

    @property
    def tokens(self) -> int | None:
        known = [builder.tokens for builder in self.builders if builder.tokens is not None]
        return sum(known) if len(known) == len(self.builders) else None

    @property
    def usd(self) -> float | None:
        known = [builder.usd for builder in self.builders if builder.usd is not None]
        return sum(known) if len(known) == len(self.builders) else None

    @property
    def seconds(self) -> float | None:
        """Of one core; builders without a history count as nothing, None where none has any."""
        known = [builder.seconds for builder in self.builders if builder.seconds is not None]
        return sum(known) if known else None


def estimate_run(plan: Plan, graph: Graph, job: Job, *, group: Key, named: Mapping[str, Any]) -> PlanEstimate:
    """Walk the plan for one group; `named` is the group by its field names."""
    walk = _DryRun(plan, graph, job, group)
    walk.run()
    builders = tuple(walk.estimates())
    last = job.cache.last_run(key_json(group))
    before = last.record.get("builders", {}) if last is not None else {}
    jumps = key_jumps(plan, {b.name: b.keys for b in builders}, before)
    warnings = (*jumps, *_awaited(walk.awaited, pays_again=walk.pays_again))
    adopted = adopted_hashes(job.cache, dict(zip(plan.group_fields, group, strict=True)))
    changes = tuple(changed_builders(graph, job.bindings, last, adopted=adopted))
    return PlanEstimate(
        named,
        job.now,
        walk.keys,
        walk.unchanged,
        builders,
        warnings,
        changes,
        walk.to_pay(),
        tuple(walk.failed()),
    )


def _awaited(sent: Mapping[str, int], *, pays_again: bool) -> Iterator[str]:
    """What a run would find on its way, as far as that is written down here."""
    if sent:
        many = sum(sent.values())
        what = "is one call" if many == 1 else f"are {many} calls"
        then = (
            "this run would pay for them again (llm.pending: pay)"
            if pays_again
            else "a run waits for them and pays for none of them again"
        )
        named = "; ".join(sorted(sent)[:3]) + (f"; and {len(sent) - 3} more" if len(sent) > 3 else "")
        yield f"there {what} on the way by batch, and {then}: {named}"


def key_jumps(plan: Plan, keys: Mapping[str, int], before: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each target that has far more or fewer keys than the last run recorded. Of no other builder every run
    looks at all keys."""
    for name in dict.fromkeys(target.builder.name for target in plan.targets):
        recorded = before.get(name, {})
        then = sum(int(recorded.get(part) or 0) for part in ("hit", "computed", "updated", "empty", "error"))
        now = keys.get(name, 0)
        if then and (now > then * _JUMP or then > now * _JUMP):
            yield f"{name} has {now} keys, the last run had {then}: look at what the catalog holds today"


class _DryRun(Execution):
    """An execution that builds nothing with a price, and leaves no trace."""

    def __init__(self, plan: Plan, graph: Graph, job: Job, group: Key) -> None:
        super().__init__(plan, graph, job, LocalEngine(), group=group)
        self.dry = _DryEvaluator(
            job.bindings,
            job.context,
            self.job.cache,
            now=job.now,
            gather="build",
            batch_rows=job.batch_rows,
            controller=lambda evaluator: _DryController(job.context, self.job.cache, evaluator),
            failures=job.failures,
        )
        self.evaluator = self.dry
        self.beyond: dict[str, int] = {}
        clients = collecting(graph, job.context)
        self.sent = on_the_way(clients)
        self.pays_again = any(client.pays_again for client in clients)
        self.awaited: dict[str, int] = {}  # by how a batch is told

    def estimates(self) -> Iterator[BuilderEstimate]:
        """Per builder, in build order."""
        for builder in self.graph:
            check, walked = self.checks.get(builder.name), self.dry.results.get(builder.name, {})
            proven = 0 if check is None else len(check.proven.keys() - walked.keys())
            yield self._estimate(self.job.bindings[builder], proven)

    def to_pay(self) -> dict[str, tuple[str, ...]]:
        """The keys of paid builders that nothing answers."""
        found = {}
        for builder in self.graph:
            if builder.paid:
                results = self.dry.results.get(builder.name, {})
                keys = tuple(key_json(key) for key, result in results.items() if result.unknown)
                if keys:
                    found[builder.name] = keys
        return found

    def failed(self) -> Iterator[FailedKeys]:
        """What paid builders failed at before, among the keys that were walked."""
        for builder in self.graph:
            if builder.paid and self.job.failures is not None:
                known = self.job.failures.known(self.job.bindings[builder])
                results = self.dry.results.get(builder.name, {}).values() if known else ()
                ids = dict.fromkeys(r.entry_id or "" for r in results if r.origin is not Origin.HIT)
                yield from FailedKeys.summed(builder.name, [known[i] for i in ids if i in known])

    def _ready_clients(self) -> None:
        """Nobody makes a call."""

    def _write_traces(self) -> None:
        """Nothing was made that a trace could speak of."""

    def _run_keyed(self, stage: KeyedStage) -> None:
        super()._run_keyed(stage)
        beyond = math.ceil(self._beyond(stage.space, all_members=self.regather and "gather" in stage.feeds))
        if beyond:
            moved = _moved_fields(stage.space)
            for builder in local_builders(stage, self.job):
                if moved & set(builder.key):
                    self.beyond[builder.name] = self.beyond.get(builder.name, 0) + beyond

    def _beyond(self, space: Space, *, all_members: bool) -> float:
        """About how many keys a space has that come from values nobody knows yet."""
        origin, dep = space.origin, space.dep
        if origin is None or dep is None:
            return 0.0
        keys = self._keys(origin, all_members=all_members)
        lists, unknown = self.dry.links(dep, origin.key, keys)
        more = unknown + self._beyond(origin, all_members=all_members)
        if not more or not dep.fans_out:
            return more  # as if each led to a key of its own: rather too many than too few
        lists = lists or self._lists_before(dep)
        return max(more * sum(lists) / len(lists), 1.0) if lists else more

    def _lists_before(self, dep: Dep) -> list[int]:
        """Lengths of the lists that a dep fanned out over before."""
        (source,) = [source.dep.builder for _, source in dep.on_fields if isinstance(source, Each)]
        bound = self.job.bindings[source]
        values = newest_ok(self.job.cache, bound, ["value"])["value"].drop_null().to_pylist()
        return [len(set(map(repr, bound.type.decode(value)))) for value in values]

    def _estimate(self, bound: Bound, proven: int) -> BuilderEstimate:
        name, paid, beyond = bound.name, bound.builder.paid, self.beyond.get(bound.name, 0)
        results = self.dry.results.get(name, {})
        walked = [(key_json(key), results[key]) for key in dict.fromkeys(self.dry.walked.get(name, ()))]
        made = [(text, r) for text, r in walked if r.origin in (Origin.MISS, Origin.COMPUTED, Origin.UPDATED)]
        failing = sum(r.failed for _, r in walked)
        stale = {text for text, _ in made if (name, text) in self.dry.expired}
        failed = failed_before(self.job.cache, bound) if made else set()
        retried = {text for text, _ in made if text in failed} - stale
        unknown = sum(r.unknown for _, r in made) + beyond
        spent = sum(r.seconds or 0.0 for _, r in walked if r.origin in BUILT)
        asked = [key for key in dict.fromkeys(self.dry.walked.get(name, ())) if results[key].unknown]
        each = cost_of_one(self.job.cache, bound, self.job.context, asked) if unknown else _UNKNOWN
        sent = [self.sent[r.entry_id] for _, r in made if r.unknown and r.entry_id in self.sent]
        for one in sent:
            self.awaited[one.said] = self.awaited.get(one.said, 0) + 1
        calls = unknown - (0 if self.pays_again else len(sent)) if paid else 0
        tokens, seconds = _times(calls, each.tokens), _times(unknown, each.seconds)
        return BuilderEstimate(
            name,
            paid,
            hit=proven + sum(r.origin is Origin.HIT for _, r in walked),
            proven=proven,
            stale=len(stale),
            miss=len(made) - len(stale) - len(retried) + beyond,
            error=failing + len(retried),
            empty=sum(r.origin is Origin.EMPTY for _, r in walked),
            estimated=bool(beyond)
            or self.dry.by_hand
            or any(r.unknown and r.entry_id is None for _, r in made),
            calls=calls,
            pending=len(sent),
            tokens=None if tokens is None else round(tokens),
            usd=_times(calls, each.usd),
            seconds=None if seconds is None else seconds + spent,
            expected=each.expected,
        )


class _DryEvaluator(Evaluator):
    """Looks everything up, and builds only what is cheap and pure.

    `walked`: keys that were resolved, by builder. `expired`: (builder, key as JSON) whose entry's ttl has passed.
    `by_hand`: whether a hand-written get would run, and read more keys of nobody knows which builders.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.walked: dict[str, list[Key]] = {}
        self.expired: set[tuple[str, str]] = set()
        self.by_hand = False

    def take_made(self) -> dict[str, list[tuple[str, Result]]]:
        """Nothing that a commit may look at."""
        for name, keys in self.made.items():
            self.walked.setdefault(name, []).extend(keys)
        self.made = {}
        return {}

    def links(self, dep: Dep, fields: tuple[str, ...], keys: Sequence[Key]) -> tuple[list[int], int]:
        """(to how many keys each reader leads that fans out, how many readers wait for an unknown value)."""
        links = self._link(dep, fields, keys)
        unknown = sum(isinstance(link, Result) and link.unknown for link in links)
        return [len(set(link)) for link in links if isinstance(link, list)], unknown

    def _build(self, batch: Batch, misses: list[int]) -> None:
        builder = batch.bound.builder
        if (builder.light or builder.inline) and not builder.paid:
            super()._build(batch, misses)
            return
        for row in misses:
            _, inputs, identity = batch.identities[row]
            batch.results[row] = Result(Origin.MISS, None, inputs_hash=inputs, entry_id=identity)

    def _resolve_source(self, bound: Bound, keys: list[Key]) -> Sequence[Result | None]:
        if not bound.builder.paid:
            return super()._resolve_source(bound, keys)
        found = self.store.current(bound.name, bound.config_hash, [key_json(key) for key in keys])
        hits = (found.get(key_json(key)) for key in keys)
        kept = bound.builder.freshness.ttl is not None
        return [
            self._hit(bound, hit)
            if kept and hit is not None and self._lives(bound, hit)
            else Result(Origin.MISS, None)
            for hit in hits
        ]

    def _resolve_dynamic(self, bound: Bound, key: Key) -> Result:
        result = super()._resolve_dynamic(bound, key)
        self.by_hand = self.by_hand or result.unknown
        return result

    def _lives(self, bound: Bound, hit: Found) -> bool:
        lives = super()._lives(bound, hit)
        if not lives:
            self.expired.add((bound.name, hit.entry.key))
        return lives


class _DryController(HandController):
    """What a hand-written get would read is known only once it runs, and here it does not."""

    def run_by_hand(self, bound: Bound, key: Key, now: datetime) -> Result:
        return Result(Origin.MISS, None)


def _moved_fields(space: Space) -> set[str]:
    """Fields of a space's key that come from values."""
    if space.origin is None or space.dep is None:
        return set()
    return {field for field, _ in space.dep.on_fields} | (_moved_fields(space.origin) & set(space.key))


def _times(count: int, each: float | None) -> float | None:
    if not count:
        return 0.0
    return None if each is None else count * each
