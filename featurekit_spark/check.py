"""Which keys of a run's targets are proven unchanged, and the trace rows that will prove them next time.

Knows hashes and rows, not stages nor engines. What a trace row holds, and why that is a proof, is in
docs/design/cache.md.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import KeySet, import_path, keys_of
from featurekit_spark.cache.base import TRACE_SCHEMA
from featurekit_spark.cache.current import listed
from featurekit_spark.controller import HandController
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import bucket_of, digest, group_hash, inputs_hash, key_json, member_texts
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import Plan, TargetTrace
from featurekit_spark.results import Result, from_entry

__all__ = ["Check", "Proof", "Proofs", "group_trace", "plan_hash"]

Key = tuple[Any, ...]


class Proof(NamedTuple):
    """What a stored trace says of a key that it proves unchanged."""

    entry_id: str | None
    value_hash: str | None
    ts: datetime | None
    valid_until: datetime | None


@dataclass
class Check:
    """Traces of one target: what its keys read now (in member order), what is stored (TRACE_SCHEMA), and which of them
    are proven.

    `moved`: how many keys are not as they were, those of which only the group changed not counted."""

    trace: TargetTrace
    plan_hash: str
    keyed: list[str] = field(default_factory=list)
    group: str = ""
    stored: pa.Table = field(default_factory=TRACE_SCHEMA.empty_table)
    stored_group: dict[str, Any] | None = None
    same_group: bool = False
    gathered: list[tuple[Any, Key, Result]] = field(default_factory=list)
    proven: dict[Key, Proof] = field(default_factory=dict)
    moved: int = 0


class Proofs:
    """The part of an execution that checks and writes traces.

    `members`: the keys of each key set, in order; `todo`: those of them that some target has to compute; `regather`:
    whether what was gathered last time no longer stands.
    """

    def __init__(self, plan: Plan, graph: Graph, job: Job, evaluator: Evaluator, group: Key) -> None:
        self.plan, self.graph, self.job, self.evaluator, self.group = plan, graph, job, evaluator, group
        self.members: dict[str, list[Key]] = {}
        self.todo: dict[str, list[Key]] = {}
        self.checks: dict[str, Check] = {}
        self.regather = True
        self._key_texts: dict[str, list[str]] = {}
        self._buckets: dict[str, list[str]] = {}
        self._source_hashes: dict[tuple[str, str], list[str]] = {}

    def _check(self, traces: Iterable[TargetTrace]) -> None:
        for trace in traces:
            members = self.members[trace.keyset.name]
            check = Check(trace, plan_hash(trace, self.graph, self.job.bindings))
            check.group = group_trace(trace, self._tree, self._group_source)
            columns = [self._hashes(source, trace.keyset, members) for source in trace.keyed]
            hashes = (
                map(inputs_hash, zip(*columns, strict=True)) if columns else itertools.repeat(inputs_hash(()))
            )
            check.keyed = list(itertools.islice(hashes, len(members)))
            stored = self.job.cache.traces(trace.target.name, self._group_text())
            is_group = pc.equal(stored["kind"], "group")
            check.stored_group = next(iter(stored.filter(is_group).to_pylist()), None)
            check.stored = stored.filter(pc.invert(is_group))
            check.same_group = self._same_group(check)
            proofs = self._prove(check, members) if trace.provable else {}
            check.moved = len(members) - len(proofs)
            if check.same_group:
                check.proven = proofs
            self.checks[trace.target.name] = check
            todo = self.todo.setdefault(trace.keyset.name, [])
            have = set(todo)
            todo += [key for key in members if key not in check.proven and key not in have]
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
            bound = self.job.bindings[self.graph[name]]
            found = self.job.cache.current(name, bound.config_hash, [text]).get(text)
            if found is None or found.entry.entry_id != identity:  # gone, or another one is what readers see
                return False
            result = from_entry(found.entry, bound.type, until=row["valid_until"])
            check.gathered.append((self.graph[name], tuple(json.loads(text)), result))
        return True

    def _prove(self, check: Check, members: Sequence[Key]) -> dict[Key, Proof]:
        """Members whose stored trace holds: as columns as far as that goes, then key by key."""
        rows, now = check.stored, pa.scalar(self.job.now, TRACE_SCHEMA.field("valid_until").type)
        holds = pc.and_(pc.equal(rows["status"], "ok"), pc.equal(rows["plan_hash"], check.plan_hash))
        rows = rows.filter(pc.and_(holds, pc.fill_null(pc.greater(rows["valid_until"], now), True)))
        alive = self.job.cache.ids(check.trace.target.name)
        rows = rows.filter(pc.or_(pc.is_null(rows["entry_id"]), pc.is_in(rows["entry_id"], alive)))
        rows = rows.select(["key", "keyed_trace", "reads", *Proof._fields])
        texts = pa.array(self._texts(check.trace.keyset), pa.string())
        rows = rows.take(
            pc.index_in(texts, value_set=rows["key"].combine_chunks())
        )  # a row per member, or nulls
        same = pc.fill_null(pc.equal(rows["keyed_trace"], pa.array(check.keyed, pa.string())), False)
        held = same.to_pylist()
        if rows["reads"].null_count < len(rows):
            reads = rows["reads"].to_pylist()
            held = [ok and self._reads_hold(read) for ok, read in zip(held, reads, strict=True)]
        columns = [itertools.islice(listed(rows[name]), len(rows)) for name in Proof._fields]
        proofs = map(Proof._make, zip(*columns, strict=True))
        return {key: proof for key, proof, ok in zip(members, proofs, held, strict=True) if ok}

    def _reads_hold(self, reads: str | None) -> bool:
        return reads is None or HandController(self.job.context, self.job.cache, self.evaluator).still_reads(
            reads
        )

    def _tree(self, keyset: type[KeySet], source: Any) -> str:
        members, texts = self.members[keyset.name], self._texts(keyset)
        hashes = [""] * len(members) if source is None else self._hashes(source, keyset, members)
        if keyset.name not in self._buckets:
            self._buckets[keyset.name] = [bucket_of(text) for text in texts]
        return group_hash(zip(texts, hashes, strict=True), self._buckets[keyset.name])

    def _texts(self, keyset: type[KeySet]) -> list[str]:
        """The members' keys as JSON, made once."""
        if keyset.name not in self._key_texts:
            self._key_texts[keyset.name] = member_texts(
                self.group, [k[-1] for k in self.members[keyset.name]]
            )
        return self._key_texts[keyset.name]

    def _group_source(self, source: Any) -> str:
        return self.evaluator.resolve(source, [self._group_key(source.key)])[0].value_hash or "error"

    def _hashes(self, source: Any, keyset: type[KeySet], members: Sequence[Key]) -> list[str]:
        known = (source.name, keyset.name)
        if known not in self._source_hashes:
            fields = keyset.member_key()
            keys = [keys_of(fields, key, source.key) for key in members]
            self._source_hashes[known] = self.evaluator.value_hashes(source, keys)
        return self._source_hashes[known]

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
            members = self.members[check.trace.keyset.name]
            walked = [
                (key, read) for key, read in zip(members, check.keyed, strict=True) if key not in check.proven
            ]
            texts = pa.array([key_json(key) for key, _ in walked], pa.string())
            before = check.stored.filter(pc.is_in(check.stored["key"], texts))
            stored = {row["key"]: row for row in before.to_pylist()}
            for key, read in walked:
                result, text = known[key], key_json(key)
                row = {
                    "kind": "target",
                    "key": text,
                    "keyed_trace": read,
                    "reads": _reads_json(result),
                    "valid_until": result.until,
                    "status": "error" if result.failed else "ok",
                    "entry_id": None if result.failed else result.entry_id,
                    "value_hash": result.value_hash,
                    **stamp,
                }
                if _differs(row, stored.get(text)):
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

    def target_keys(self) -> dict[str, int]:
        """How many keys each target has."""
        return {name: len(self.members[check.trace.keyset.name]) for name, check in self.checks.items()}

    def valid_until(self) -> datetime | None:
        """The earliest expiry of all that the targets' answers were made from."""
        keysets = [self.evaluator.results.get(name, {}) for name in self.members]
        found: list[datetime | None] = [read.until for results in keysets for read in results.values()]
        for name, check in self.checks.items():
            results = self.evaluator.results.get(name, {})
            found.append(self._gathered(check)["valid_until"])
            found += [row.valid_until for row in check.proven.values()]
            if check.same_group and check.stored_group is not None:
                found.append(check.stored_group["valid_until"])
            members = self.members[check.trace.keyset.name]
            found += [results[key].until for key in members if key not in check.proven]
        return min((until for until in found if until is not None), default=None)

    def _wanted(self) -> bool:
        return any(self.todo.values())

    def _group_key(self, fields: tuple[str, ...]) -> Key:
        mine = self.plan.group_fields
        return tuple(self.group[mine.index(name)] for name in fields)

    def _group_text(self) -> str:
        return key_json(self.group)


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
