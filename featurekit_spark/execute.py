"""Carrying out a plan for one group, stage by stage, with keys and small results on the driver.

Knows stages, traces and commits; how a keyed stage is spread over processes is the engine's affair.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Protocol

import pyarrow as pa

from featurekit_spark.builder import KeySet, import_path
from featurekit_spark.cache.background import BackgroundAppends
from featurekit_spark.cache.base import TRACE_SCHEMA, FeatureCache
from featurekit_spark.controller import HandController, commit
from featurekit_spark.errors import BuildError, DataError, FeaturekitError
from featurekit_spark.evaluate import Bindings, Evaluator
from featurekit_spark.fingerprint import digest, group_hash, inputs_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.plan import (
    CheckTraces,
    GatherStage,
    KeyedStage,
    Plan,
    ReadKeys,
    ReadSource,
    Space,
    TargetTrace,
)
from featurekit_spark.results import Counts, Origin, Result, from_entry
from featurekit_spark.values import typed_column

__all__ = ["Check", "Engine", "Execution", "Job", "Progress", "group_trace", "plan_hash", "scan_of"]

Key = tuple[Any, ...]
Progress = Callable[[str, int, int], None]
"""(what, done, of how many keys), called as a run advances."""


@dataclass(frozen=True)
class Job:
    """What every stage of one run shares."""

    bindings: Bindings
    context: Any
    cache: FeatureCache
    now: datetime
    run_id: str
    batch_rows: int
    progress: Progress = field(default=lambda what, done, total: None)


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


@dataclass
class Check:
    """Traces of one target: what its keys read now, and which of them are proven."""

    trace: TargetTrace
    plan_hash: str
    keyed: dict[Key, str] = field(default_factory=dict)
    group: str = ""
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored_group: dict[str, Any] | None = None
    same_group: bool = False
    gathered: list[tuple[Any, Key, Result]] = field(default_factory=list)
    proven: dict[Key, dict[str, Any]] = field(default_factory=dict)


class Execution:
    """One run of one group. `run()` once, then read `results_of` and `counts`."""

    def __init__(self, plan: Plan, graph: Graph, job: Job, engine: Engine, *, group: Key) -> None:
        self.appends = BackgroundAppends(job.cache)
        job = replace(job, cache=self.appends)
        self.plan, self.graph, self.job, self.engine, self.group = plan, graph, job, engine, group
        self.evaluator = Evaluator(
            job.bindings,
            job.context,
            job.cache,
            now=job.now,
            gather="build",
            batch_rows=job.batch_rows,
            controller=lambda evaluator: HandController(job.context, job.cache, evaluator),
        )
        self.members: dict[str, list[Key]] = {}
        self.todo: dict[str, list[Key]] = {}
        self.checks: dict[str, Check] = {}
        self.regather = True
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Carry out every stage. What a failed stage had made before it failed is committed."""
        try:
            for stage in self.plan.stages:
                start = time.perf_counter()
                self._run(stage)
                self.seconds[stage.label] = self.seconds.get(stage.label, 0.0) + time.perf_counter() - start
            self._write_traces()
        finally:
            try:
                commit(self.job.cache, self.evaluator, run_id=self.job.run_id)
            finally:
                self.engine.settle()
                self.appends.close()

    def counts(self) -> dict[str, Counts]:
        """Per builder, in build order. A target's proven keys are its hits, whatever stage they skipped."""
        counts = {b.name: self.evaluator.done.get(b.name, Counts()) for b in self.graph}
        for name, check in self.checks.items():
            counts[name] = Counts(**vars(counts[name]))
            counts[name].hit += len(check.proven)
        return counts

    def results_of(self, target: str) -> dict[Key, Result]:
        """All results of a target, by key in member order; values of proven keys are read from the cache now."""
        check = self.checks[target]
        bound = self.job.bindings[check.trace.target]
        ids = [row["entry_id"] for row in check.proven.values() if row["entry_id"] is not None]
        entries = self.job.cache.by_id(target, ids) if ids else {}
        known = self.evaluator.results.get(target, {})
        results = {}
        for key in self.members[check.trace.keyset.name]:
            row = check.proven.get(key)
            if row is None:
                results[key] = known[key]
            else:
                entry = entries.get(row["entry_id"])
                results[key] = Result(
                    Origin.HIT,
                    row["value_hash"],
                    payload=entry.value if entry else None,
                    kind=bound.type,
                    ts=entry.ts if entry else row["ts"],
                    entry_id=row["entry_id"],
                    until=row["valid_until"],
                )
        return results

    @property
    def keys(self) -> int:
        """How many keys the first target has."""
        first = next(iter(self.checks.values()))
        return len(self.members[first.trace.keyset.name])

    def fingerprint(self, targets: Sequence[str]) -> str:
        """Hash over every key's answer, those kept from before included. Reads no values."""
        parts = []
        for name in targets:
            check, kept = self.checks[name], self._kept(name)
            known = self.evaluator.results.get(name, {})
            pairs = []
            for key in self.members[check.trace.keyset.name]:
                if key in check.proven:
                    found = check.proven[key]["value_hash"]
                else:
                    found = kept.get(key, known[key]).value_hash
                pairs.append((key_json(key), found or ""))
            parts += [name, group_hash(pairs)]
        return digest("published", *parts)

    def kept(self, targets: Sequence[str]) -> int:
        """How many failed keys keep the answer that they had before."""
        return sum(len(self._kept(name)) for name in targets)

    def _kept(self, target: str) -> dict[Key, Result]:
        bound = self.job.bindings[self.graph[target]]
        failed = {key_json(k): k for k, r in self.evaluator.results.get(target, {}).items() if r.failed}
        found = self.job.cache.current(target, bound.config_hash, list(failed)) if failed else {}
        return {failed[text]: from_entry(hit.entry, bound.type) for text, hit in found.items()}

    def errors(self, targets: Sequence[str]) -> dict[str, str]:
        """Failures of the targets' keys, by key as JSON: the root builder, its key and its message."""
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
        match stage:
            case ReadKeys(keyset):
                self._read_keys(keyset)
            case ReadSource(source, space):
                self._read_source(source, space)
            case CheckTraces(traces):
                self._check(traces)
            case KeyedStage(feeds=feeds) if feeds == {"gather"} and not self.regather:
                pass
            case KeyedStage():
                self._run_keyed(stage)
            case GatherStage(builder, space) if self._wanted():
                self.evaluator.resolve(builder, [self._group_key(space.key)])
                commit(self.job.cache, self.evaluator, run_id=self.job.run_id)
            case GatherStage():
                pass

    def _run_keyed(self, stage: KeyedStage) -> None:
        keys = self._keys(stage.space, all_members=self.regather and "gather" in stage.feeds)
        if keys:
            self.engine.run_stage(stage, keys, self.evaluator, self.job)
        if stage.paid:
            self.appends.wait()  # what was paid for is durable before anything else happens

    def _wanted(self) -> bool:
        return any(self.todo.values())

    def _read_keys(self, keyset: type[KeySet]) -> None:
        group = self._group_key(keyset.key)
        table = self._scan(keyset)
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
        table = self._scan(source)
        if table is not None:
            values = dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
            self.evaluator.give_source(source, keys, [values.get(key[-1]) for key in keys])
        elif keys:
            stage = KeyedStage(space, (source,), (), False, frozenset({"target"}))
            self.engine.run_stage(stage, keys, self.evaluator, self.job)

    def _scan(self, source: Any) -> pa.Table | None:
        scan = scan_of(source, self.job, self.plan.group_fields, self.group)
        return None if scan is None else self.engine.scan(scan)

    def _check(self, traces: Iterable[TargetTrace]) -> None:
        for trace in traces:
            members = self.members[trace.keyset.name]
            check = Check(trace, plan_hash(trace, self.graph, self.job.bindings))
            check.group = group_trace(trace, self._tree, self._group_source)
            columns = [self._hashes(source, trace.keyset, members) for source in trace.keyed]
            for i, key in enumerate(members):
                check.keyed[key] = inputs_hash([column[i] for column in columns])
            stored = self.job.cache.traces(trace.target.name, self._group_text()).to_pylist()
            check.stored_group = next((row for row in stored if row["kind"] == "group"), None)
            check.stored = {row["key"]: row for row in stored if row["kind"] == "target"}
            check.same_group = self._same_group(check)
            if trace.provable and check.same_group:
                alive = set(self.job.cache.ids(trace.target.name).to_pylist())
                for key in members:
                    last = check.stored.get(key_json(key))
                    if last is not None and self._holds(last, check, key, alive):
                        check.proven[key] = last
            self.checks[trace.target.name] = check
            todo = self.todo.setdefault(trace.keyset.name, [])
            have = set(todo)
            todo += [key for key in members if key not in check.proven and key not in have]
        self.engine.prepare(max(map(len, self.todo.values())), self.plan, self.job)
        self.regather = self._wanted() and any(not check.same_group for check in self.checks.values())
        if self._wanted() and not self.regather:
            for check in self.checks.values():
                for builder, key, result in check.gathered:
                    self.evaluator.give(builder, {key: result})

    def _same_group(self, check: Check) -> bool:
        """Whether what was gathered last time still stands; if so, `check.gathered` is what came of it."""
        row = check.stored_group
        if (
            row is None
            or row["status"] != "ok"
            or row["group_trace"] != check.group
            or row["plan_hash"] != check.plan_hash
            or (row["valid_until"] is not None and self.job.now >= row["valid_until"])
        ):
            return False
        for name, text, identity in json.loads(row["reads"] or "[]"):
            entry = self.job.cache.by_id(name, [identity]).get(identity)
            if entry is None:
                return False
            bound = self.job.bindings[self.graph[name]]
            result = from_entry(entry, bound.type, until=row["valid_until"])
            check.gathered.append((self.graph[name], tuple(json.loads(text)), result))
        return True

    def _holds(self, row: dict[str, Any], check: Check, key: Key, alive: set[str]) -> bool:
        return (
            row["status"] == "ok"
            and row["plan_hash"] == check.plan_hash
            and row["keyed_trace"] == check.keyed[key]
            and (row["valid_until"] is None or self.job.now < row["valid_until"])
            and (row["entry_id"] is None or row["entry_id"] in alive)
            and self._reads_hold(row["reads"])
        )

    def _reads_hold(self, reads: str | None) -> bool:
        return reads is None or HandController(self.job.context, self.job.cache, self.evaluator).still_reads(
            reads
        )

    def _tree(self, keyset: type[KeySet], source: Any) -> str:
        members = self.members[keyset.name]
        hashes = [""] * len(members) if source is None else self._hashes(source, keyset, members)
        return group_hash(zip(map(key_json, members), hashes, strict=True))

    def _group_source(self, source: Any) -> str:
        return self.evaluator.resolve(source, [self._group_key(source.key)])[0].value_hash or "error"

    def _hashes(self, source: Any, keyset: type[KeySet], members: Sequence[Key]) -> list[str]:
        at = [keyset.member_key().index(name) for name in source.key]
        keys = [tuple(key[i] for i in at) for key in members]
        return [r.value_hash or "error" for r in self.evaluator.resolve(source, keys)]

    def _write_traces(self) -> None:
        """For every walked key what it read, where that differs from what is stored; then the group's row."""
        rows: list[dict[str, Any]] = []
        now, run_id, group = self.job.now, self.job.run_id, self._group_text()
        for name, check in self.checks.items():
            if not check.trace.provable:
                continue
            bound = self.job.bindings[check.trace.target]
            known = self.evaluator.results.get(name, {})
            stamp = {
                "builder": name,
                "config_hash": bound.config_hash,
                "group": group,
                "plan_hash": check.plan_hash,
                "epoch": 0,
                "ts": now,
                "run_id": run_id,
            }
            for key in self.members[check.trace.keyset.name]:
                if key in check.proven:
                    continue
                result, text = known[key], key_json(key)
                row = {
                    "kind": "target",
                    "key": text,
                    "keyed_trace": check.keyed[key],
                    "reads": _reads_json(result),
                    "valid_until": result.until,
                    "status": "error" if result.failed else "ok",
                    "entry_id": None if result.failed else result.entry_id,
                    "value_hash": result.value_hash,
                    **stamp,
                }
                if _differs(row, check.stored.get(text)):
                    rows.append(row)
            if not check.same_group:
                row = {
                    "kind": "group",
                    "key": group,
                    "group_trace": check.group,
                    **self._gathered(check),
                    **stamp,
                }
                if _differs(row, check.stored_group):
                    rows.append(row)
        if rows:
            self.job.cache.append(None, pa.Table.from_pylist(rows, schema=TRACE_SCHEMA))

    def _gathered(self, check: Check) -> dict[str, Any]:
        """What the group's row says of the gathers below a target: their entries, and until when they stand.

        Its status is error, so that the next run gathers again, where a member or a gather failed.
        """
        entries, until, whole = [], None, True
        for builder in self.graph.needs_of(check.trace.target):
            whole = whole and builder.name not in self.evaluator.incomplete
            gathers = any(dep.keyset is not None for dep in self.job.bindings[builder].deps)
            if gathers and set(builder.key) <= set(self.plan.group_fields):
                for key, result in self.evaluator.results.get(builder.name, {}).items():
                    whole = whole and result.entry_id is not None and not result.failed
                    entries.append([builder.name, key_json(key), result.entry_id])
                    if result.until is not None:
                        until = result.until if until is None else min(until, result.until)
        return {
            "status": "ok" if whole else "error",
            "valid_until": until,
            "reads": json.dumps(entries) if entries else None,
        }

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

    def _group_key(self, fields: tuple[str, ...]) -> Key:
        mine = self.plan.group_fields
        return tuple(self.group[mine.index(name)] for name in fields)

    def _group_text(self) -> str:
        return key_json(self.group)


def scan_of(source: Any, job: Job, fields: tuple[str, ...], group: Key) -> Any:
    """A source's scan of the group, or None where it offers none."""
    if source.scan is None:
        return None
    bound = job.bindings[source]
    named = dict(zip(fields, group, strict=True))
    return bound.builder.scan(named, bound.config, bound.view(job.context))  # type: ignore[attr-defined]


def group_trace(
    trace: TargetTrace, tree: Callable[[type[KeySet], Any], str], hash_of: Callable[[Any], str]
) -> str:
    """Hash of everything a target reads of its group. `tree(keyset, source)` is the `group_hash` over the members'
    value hashes of a source (None: over the members alone), `hash_of` the value hash of a group-level source."""
    parts = []
    for keyset, sources in trace.gathered:
        parts += [tree(keyset, source) for source in (*sources, None)]
    if trace.gathered and all(keyset is not trace.keyset for keyset, _ in trace.gathered):
        # A key that went and came back was not checked against the groups in between.
        parts.append(tree(trace.keyset, None))
    parts += [f"{source.name} {hash_of(source)}" for source in trace.grouped]
    return digest("gathered", *parts)


def plan_hash(trace: TargetTrace, graph: Graph, bindings: Bindings) -> str:
    """Hash of the configs and ttls of everything below a target: what a trace was proven under."""
    parts = []
    for builder in graph.needs_of(trace.target):
        bound = bindings[builder]
        parts.append(f"{bound.config_hash} {bound.builder.freshness.ttl}")
    return digest("plan", import_path(trace.keyset), *parts)


def _reads_json(result: Result) -> str | None:
    return json.dumps([list(read) for read in result.reads]) if result.reads else None


def _differs(row: dict[str, Any], stored: dict[str, Any] | None) -> bool:
    names = (
        "plan_hash",
        "keyed_trace",
        "group_trace",
        "reads",
        "valid_until",
        "status",
        "entry_id",
        "value_hash",
    )
    return stored is None or any(row.get(name) != stored[name] for name in names)
