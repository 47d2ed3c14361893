"""Carrying out a plan for one group, stage by stage, with keys and small results on the driver.

Knows stages and commits; what is proven unchanged is in `check`, and how a keyed stage is spread over processes is
the engine's affair.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa

from featurekit_spark import aio
from featurekit_spark.builder import KeySet
from featurekit_spark.cache.background import BackgroundAppends
from featurekit_spark.check import Proofs
from featurekit_spark.controller import HandController, commit
from featurekit_spark.errors import BuildError, DataError, FeaturekitError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import digest, group_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import (
    CheckTraces,
    GatherStage,
    KeyedStage,
    Plan,
    ReadKeys,
    ReadSource,
    Space,
)
from featurekit_spark.readings import Readings
from featurekit_spark.results import Counts, Origin, Result, from_entry
from featurekit_spark.values import typed_column

__all__ = ["Engine", "Execution"]

Key = tuple[Any, ...]


class Engine(Protocol):
    """Where keyed stages run."""

    name: str

    def check(self, plan: Plan, job: Job) -> None:
        """Raise before anything ran where the plan cannot run here (a context that cannot travel)."""

    def prepare(self, keys: int, plan: Plan, job: Job) -> None:
        """The run will compute about so many keys: start in the background what takes time to start. Returns at
        once; may be called again."""

    def settle(self) -> None:
        """Wait until nothing runs in the background any more."""

    def run_stage(self, stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job) -> None:
        """Resolve the stage's builders for `keys` into `evaluator`, and commit what was made, once."""

    def scan(self, scan: Any) -> pa.Table:
        """A source's scan as an Arrow table of (member, value)."""


class Execution(Proofs):
    """One run of one group. `run()` once, then read `results_of` and `counts`. `readings`: of its sources, where they
    have begun."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        job: Job,
        engine: Engine,
        *,
        group: Key,
        readings: Readings | None = None,
    ) -> None:
        self.appends = BackgroundAppends(job.cache)
        job = replace(job, cache=self.appends)
        evaluator = Evaluator(
            job.bindings,
            job.context,
            job.cache,
            now=job.now,
            gather="build",
            batch_rows=job.batch_rows,
            controller=lambda evaluator: HandController(job.context, job.cache, evaluator),
            purse=job.purse,
            journal=job.journal,
            failures=job.failures,
            flight=job.flight,
        )
        super().__init__(plan, graph, job, evaluator, group)
        self.engine = engine
        self.readings = readings or Readings(job, plan.group_fields, group, engine.scan)
        self.scanned: list[tuple[Any, str]] = []
        self.seconds: dict[str, float] = {}
        self._fingerprints: dict[tuple[str, ...], str] = {}
        self._may_ask = False

    def run(self) -> None:
        """Carry out every stage. What a failed stage had made before it failed is committed."""
        try:
            for stage in self.plan.stages:
                start = time.perf_counter()
                self._run(stage)
                self._look_for_double_payments()
                self.seconds[stage.label] = self.seconds.get(stage.label, 0.0) + time.perf_counter() - start
            self._write_traces()
        finally:
            try:
                commit(self.job.cache, self.evaluator, run_id=self.job.run_id)
                self._look_for_double_payments()
            finally:
                self.engine.settle()
                self.appends.close()

    def _look_for_double_payments(self) -> None:
        if self.job.double is not None:
            bounds = (bound for builder, bound in self.job.bindings.items() if builder.paid)
            self.job.double.look(self.job.cache, bounds, self.evaluator.done)

    def counts(self) -> dict[str, Counts]:
        """Per builder, in build order. A target's proven keys are its hits, whatever stage they skipped."""
        counts = {b.name: self.evaluator.done.get(b.name, Counts()) for b in self.graph}
        for name, check in self.checks.items():
            counts[name] = Counts(**vars(counts[name]))
            # another target over the same keys may have had one walked all the same
            counts[name].hit += len(check.proven.keys() - self.evaluator.results.get(name, {}).keys())
        return counts

    def results_of(self, target: str) -> dict[Key, Result]:
        """All results of a target, by key in member order; values of proven keys are read from the cache now."""
        check = self.checks[target]
        bound = self.job.bindings[check.trace.target]
        ids = [row.entry_id for row in check.proven.values() if row.entry_id is not None]
        entries = self.job.cache.by_id(target, ids) if ids else {}
        known = self.evaluator.results.get(target, {})
        results = {}
        for key in self.members[check.trace.keyset.name]:
            row = check.proven.get(key)
            if row is None:
                results[key] = known[key]
            else:
                entry = None if row.entry_id is None else entries.get(row.entry_id)
                results[key] = Result(
                    Origin.HIT,
                    row.value_hash,
                    payload=entry.value if entry else None,
                    kind=bound.type,
                    ts=entry.ts if entry else row.ts,
                    entry_id=row.entry_id,
                    until=row.valid_until,
                )
        return results

    @property
    def keys(self) -> int:
        """How many keys the first target has."""
        first = next(iter(self.checks.values()))
        return len(self.members[first.trace.keyset.name])

    def fingerprint(self, targets: Sequence[str]) -> str:
        """Hash over every key's answer, those kept from before included. Reads no values."""
        if tuple(targets) in self._fingerprints:
            return self._fingerprints[tuple(targets)]
        parts = []
        for name in targets:
            check, kept = self.checks[name], self._kept(name)
            known = self.evaluator.results.get(name, {})
            hashes = []
            for key in self.members[check.trace.keyset.name]:
                answer = check.proven.get(key) or kept.get(key) or known[key]
                hashes.append(answer.value_hash or "")
            texts = self._texts(check.trace.keyset)
            pairs = zip(texts, hashes, strict=True)
            parts += [name, group_hash(pairs, self._buckets.get(check.trace.keyset.name))]
        found = self._fingerprints[tuple(targets)] = digest("published", *parts)
        return found

    def kept(self, targets: Sequence[str]) -> int:
        """How many failed keys keep the answer that they had before."""
        return sum(len(self._kept(name)) for name in targets)

    def _kept(self, target: str) -> dict[Key, Result]:
        bound = self.job.bindings[self.graph[target]]
        failed = {key_json(k): k for k, r in self.evaluator.results.get(target, {}).items() if r.failed}
        found = self.job.cache.current(target, bound.config_hash, list(failed)) if failed else {}
        return {failed[text]: from_entry(hit.entry, bound.type) for text, hit in found.items()}

    def errors(self, targets: Sequence[str], *, every: bool = False) -> dict[str, str]:
        """Failures of the targets' keys, by key as JSON: the root builder, its key and its message. All of them, asked
        for or not: they are here."""
        found = {}
        for name in targets:
            for key, result in self.evaluator.results.get(name, {}).items():
                if result.failed:
                    found[key_json(key)] = result.error or ""
        return found

    def values(self, target: str) -> list[Any]:
        """A target's values as Python objects, in key order."""
        return [result.value for result in self.results_of(target).values()]

    def answers(self, target: str) -> pa.Table:
        """A target's answers, typed: its key fields, value, ts, value_hash. A failed key has its earlier answer."""
        return self._typed(target, {**self.results_of(target), **self._kept(target)}).drop(
            ["status", "error"]
        )

    def table(self, target: str) -> pa.Table:
        """What this run found for a target: its key fields, value, ts, value_hash, status, error."""
        return self._typed(target, self.results_of(target))

    def _typed(self, target: str, results: dict[Key, Result]) -> pa.Table:
        bound = self.job.bindings[self.graph[target]]
        found = list(results.values())
        columns: dict[str, Any] = {
            name: pa.array([key[i] for key in results]) if results else pa.array([], pa.string())
            for i, name in enumerate(bound.key)
        }
        columns["value"] = typed_column([r.value for r in found], bound.type)
        columns["ts"] = pa.array([r.ts for r in found], pa.timestamp("us", tz="UTC"))
        columns["value_hash"] = pa.array([r.value_hash for r in found], pa.string())
        columns["status"] = pa.array(["error" if r.failed else "ok" for r in found], pa.string())
        columns["error"] = pa.array([r.error for r in found], pa.string())
        return pa.table(columns)

    @property
    def unchanged(self) -> bool:
        """Whether every key of every target was proven unchanged."""
        return all(
            check.same_group and len(check.proven) == len(self.members[check.trace.keyset.name])
            for check in self.checks.values()
        )

    def stored(self, rows: Any, label: str) -> Any:
        """Rows that may be looked at repeatedly: they are in memory already."""
        return rows

    def close(self) -> None:
        """Nothing is kept outside this process."""

    def _run(self, stage: Any) -> None:
        if isinstance(stage, KeyedStage) and stage.paid and self.job.journal is not None:
            self.job.journal.begin()
        match stage:
            case ReadKeys(keyset):
                self._read_keys(keyset)
            case ReadSource(source, space):
                self._read_source(source, space)
            case CheckTraces(traces):
                self._check(traces)
                for source, name in self.scanned:
                    self.evaluator.take_offered(source, self._needed(name))
                if self._wanted():
                    self._ready_clients()
                moved = max((check.moved for check in self.checks.values()), default=0)
                self.engine.prepare(moved, self.plan, self.job)
            case KeyedStage(feeds=feeds) if feeds == {"gather"} and not self.regather:
                pass
            case KeyedStage():
                if stage.paid and self._wanted():
                    self._check_leases()
                self._run_keyed(stage)
            case GatherStage(builder, space) if self._wanted():
                self.evaluator.resolve(builder, [self._group_key(space.key)])
                commit(self.job.cache, self.evaluator, run_id=self.job.run_id)
            case GatherStage():
                pass

    def _ready_clients(self) -> None:
        """Before anything is computed: those who make paid calls get hold of what their copies on workers cannot."""
        if self.job.purse is not None and self.job.purse.budget.no_new_calls:
            return
        for name in dict.fromkeys(name for builder in self.graph if builder.paid for name in builder.needs):
            ready = getattr(getattr(self.job.context, name, None), "ready", None)
            if callable(ready):
                ready()

    def _check_leases(self) -> None:
        """Once, before the first call: without their server every key would wait for it, and fail."""
        if self.job.flight is not None and not self._may_ask:
            aio.run(self.job.flight.leases.check())
            self._may_ask = True

    def _run_keyed(self, stage: KeyedStage) -> None:
        keys = self._keys(stage.space, all_members=self.regather and "gather" in stage.feeds)
        if keys:
            self.engine.run_stage(stage, keys, self.evaluator, self.job)
        if stage.paid:
            self.appends.wait()  # what was paid for is durable before anything else happens

    def _needed(self, keyset: str) -> list[Key]:
        """Members whose sources are going to be read: all of them for a gather, those of targets otherwise."""
        every = self._wanted() and (self.regather or keyset not in self.todo)
        return self.members[keyset] if every else self.todo.get(keyset, [])

    def _read_keys(self, keyset: type[KeySet]) -> None:
        group = self._group_key(keyset.key)
        table = self.readings.take(keyset)
        if table is not None:
            self.evaluator.give_source(keyset, [group], [table.column(0).to_pylist()])
        result = self.evaluator.resolve(keyset, [group])[0]
        if isinstance(result.cause, FeaturekitError):
            raise result.cause  # a missing catalog, a service that does not answer: not one key's failure
        if result.failed:
            raise BuildError(f"the keys of the group {group!r} could not be read: {result.error}")
        ids = result.value or []
        if len(set(ids)) < len(ids):
            twice = sorted({member for member in ids if ids.count(member) > 1})[:5]
            raise DataError(f"{keyset.name} lists members twice: {twice!r}; a key set yields each key once")
        self.members[keyset.name] = [(*group, member) for member in ids]
        if self.job.cache.last_run(self._group_text()) is None:  # all of them, presumably
            self.engine.prepare(len(ids), self.plan, self.job)

    def _read_source(self, source: Any, space: Space) -> None:
        keys = self._members_of(space)
        table = self.readings.take(source)
        if table is not None:
            values = dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
            self.evaluator.offer(source, {key: values.get(key[-1]) for key in keys})
            self.scanned.append((source, space.label.removeprefix("of ")))
        elif keys:
            stage = KeyedStage(space, (source,), (), False, frozenset({"target"}))
            self.engine.run_stage(stage, keys, self.evaluator, self.job)

    def _keys(self, space: Space, *, all_members: bool) -> list[Key]:
        match space.kind:
            case "group":
                return [self._group_key(space.key)]
            case "members":
                keyset = next(k for k in self.members if f"of {k}" == space.label)
                return self.members[keyset] if all_members else self.todo.get(keyset, [])
            case "reached":
                origin, dep = space.origin, space.dep
                assert origin is not None  # the planner sets both on a reached space
                assert dep is not None
                keys = self._keys(origin, all_members=all_members)
                return self.evaluator.dep_keys(dep, origin.key, keys)

    def _members_of(self, space: Space) -> list[Key]:
        return self.members[space.label.removeprefix("of ")]
