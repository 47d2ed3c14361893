"""Why a feature at a key would be computed again: its trace as a run checks it, then the identities below it.

Reads sources and the cache, builds nothing dear, writes nothing. What is said, and how, is in `reasons`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import FeatureBuilder, KeySet, keys_of, load_builder, parse_key
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.check import group_trace, plan_hash
from featurekit_spark.controller import run_clock
from featurekit_spark.failures import Failures
from featurekit_spark.fingerprint import group_hash, inputs_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.lookback import Dry, Moment, combination
from featurekit_spark.plan import CheckTraces, PlanState, TargetTrace, build_plan
from featurekit_spark.reasons import Part, Proof, Why, group_said, short, when
from featurekit_spark.results import from_entry
from featurekit_spark.steps import Steps, builders_of

__all__ = ["why"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]
Row = Mapping[str, Any]


def why(
    builder: Builder,
    key: Any,
    *,
    context: Any,
    cache: FeatureCache,
    keyset: type[KeySet] | None = None,
    configs: Mapping[Any, Any] | None = None,
    group: Key | None = None,
) -> Why:
    """Why `builder` at `key` would be computed again, or that it would not.

    `keyset`: the key set over which runs compute it, whose traces are asked first; without one there are none. `group`:
    whose run records say what code and configs were before (default: the key's own group). Raises UsageError for a key
    of other fields.
    """
    parsed = parse_key(builder, key)
    if keyset is not None and builder.key != keyset.member_key():
        keyset = None  # no run has it for a target
    graph = Graph([builder, *([keyset] if keyset is not None else [])])
    bindings = Bindings(context, configs).bind_all(graph)
    if keyset is not None:
        bindings.group_fields |= set(keyset.key)
        group = keys_of(builder.key, parsed, keyset.key)
    job = Job(bindings, context, cache, run_clock(context), "explained", 2_048, failures=Failures(cache))
    steps = Steps(Dry(job), graph, cache.runs(key_json(group)) if group is not None else [])
    proof = note = None
    if keyset is not None and group is not None:
        proof, note = _Trace(steps, builder, keyset, parsed, group).proof()
    return Why(builder.name, key_json(parsed), None, proof, steps.step(builder, parsed), note)


class _Trace:
    """One key's trace row, and its group's, against how things stand."""

    def __init__(self, steps: Steps, builder: Builder, keyset: type[KeySet], key: Key, group: Key) -> None:
        self.steps, self.builder, self.keyset, self.key, self.group = steps, builder, keyset, key, group
        self.job, self.dry = steps.job, steps.dry
        plan = build_plan(steps.graph, [builder.over(keyset)], PlanState())
        checks = next(stage for stage in plan.stages if isinstance(stage, CheckTraces))
        self.trace: TargetTrace = checks.targets[0]

    def proof(self) -> tuple[Proof | None, str | None]:
        """What the trace proves, None where there is none; and what is to be said of the key."""
        trace, dry, cache = self.trace, self.dry, self.job.cache
        dry.load(self.keyset, [], self.group)
        members = dry.resolve(self.keyset, [self.group])[0]
        note = None
        if not members.failed and self.key[-1] not in (members.value or []):
            note = f"{self.keyset.name} does not list this key now, so a run does not compute it"
        rows = cache.traces(self.builder.name, key_json(self.group)).to_pylist() if trace.provable else []
        row = next((r for r in rows if r["kind"] == "target" and r["key"] == key_json(self.key)), None)
        group_row = next((r for r in rows if r["kind"] == "group"), None)
        if row is None:
            return None, note
        new_plan = plan_hash(trace, self.steps.graph, self.job.bindings)
        group_parts = self._group_parts(group_row, new_plan)
        if row["entry_id"] is not None:
            entry = cache.by_id(self.builder.name, [row["entry_id"]]).get(row["entry_id"])
            if entry is not None:
                self.steps.known_before[self.builder.name, row["key"]] = entry
        parts = [
            *self._status_parts(row),
            *self._config_parts(row, new_plan),
            *self._source_parts(row),
            *group_parts,
            *self._read_parts(row),
            *self._expiry_parts(row),
            *self._entry_parts(row),
        ]
        proven = not any(part.changed for part in parts)
        return Proof(row["ts"], row["run_id"], proven, tuple(parts)), note

    def _status_parts(self, row: Row) -> list[Part]:
        if row["status"] == "ok":
            return []
        if row["status"] == "superseded":
            said = "another entry became current after it was proven"
            return [Part("status", "answer", None, row["status"], True, said)]
        bound = self.job.bindings[self.builder]
        error = self.steps.failed(bound, row["key"])
        said = f"it failed in run {row['run_id']}" + (f": {error}" if error else "")
        return [Part("status", "answer", None, row["status"], True, said)]

    def _config_parts(self, row: Row, new: str) -> list[Part]:
        old = row["plan_hash"]
        if old == new:
            return [Part("config", "configs", old, new, False, "configs are the same")]
        records = self.steps.records
        record = next((r for r in records if r.run_id == row["run_id"]), next(iter(records), None))
        then, parts = builders_of(record), []
        for builder in self.steps.graph.needs_of(self.builder):
            bound = self.job.bindings[builder]
            before = then.get(bound.name, {}).get("config_hash")
            if before is not None and before != bound.config_hash:
                part = self.steps.config_part(bound, before)
                said = f"{bound.name}: {part.said}"
                parts.append(Part("config", bound.name, before, bound.config_hash, True, said))
        said = "what lies below it changed: a builder, a ttl or the key set, which of them cannot be told"
        return parts or [Part("config", "configs", old, new, True, said)]

    def _source_parts(self, row: Row) -> list[Part]:
        """Sources at the key itself; which of them changed, where earlier reads of them say it."""
        sources = self.trace.keyed
        if not sources:
            return []
        keys = [keys_of(self.builder.key, self.key, source.key) for source in sources]
        news = [self._hash(self.dry, source, key) for source, key in zip(sources, keys, strict=True)]
        olds: list[str | None] = list(news)
        unknown = False
        if inputs_hash(news) != row["keyed_trace"]:
            past = self.steps.past(Moment(row["recorded"], row["run_id"]))
            options = []
            for source, key, new in zip(sources, keys, news, strict=True):
                known = [
                    e.value_hash or "" for e in past.store_candidates(past.bindings[source], [key_json(key)])
                ]
                options.append(list(dict.fromkeys([self._hash(past, source, key), new, *known])))
            found = combination(options, [False] * len(sources), row["keyed_trace"])
            unknown = found is None
            olds = list(found) if found is not None else [None] * len(sources)
        parts = []
        for source, new, old in zip(sources, news, olds, strict=True):
            said = f"{source.name} changed: value hash {short(old)} -> {short(new)}"
            parts.append(Part("source", source.name, old, new, None if old is None else old != new, said))
        if unknown:
            said = "a source at its key changed; which of them, and from what, cannot be told"
            parts.append(Part("source", "own sources", row["keyed_trace"], inputs_hash(news), True, said))
        return parts

    def _group_parts(self, row: Row | None, new_plan: str) -> list[Part]:
        """What was gathered; where it stands, the features made of it are taken as they are."""
        trace = self.trace
        new = self._group_trace(self.dry)
        if row is None:
            return (
                []
                if not trace.gathered
                else [Part("group", "group", None, new, True, "never gathered before")]
            )
        if not (trace.gathered or trace.grouped):
            return []
        old = row["group_trace"]
        if old != new:
            return [Part("group", "group", old, new, True, self._group_changes(row))]
        until: datetime | None = row["valid_until"]
        gone = row["status"] == "ok" and row["plan_hash"] == new_plan and not self._settled(row)
        said = ""
        if row["status"] != "ok":
            said = "a member of the group failed last time, so it is gathered again"
        elif until is not None and self.job.now >= until:
            said = f"what was gathered expired at {when(until)}"
        elif gone:
            said = "an entry of the group is gone"
        return [Part("group", "group", old, new, bool(said), said or "the group is the same")]

    def _settled(self, row: Row) -> bool:
        entries = []
        for name, text, identity in json.loads(row["reads"] or "[]"):
            entry = self.job.cache.by_id(name, [identity]).get(identity)
            if entry is None:
                return False
            entries.append((self.steps.graph[name], tuple(json.loads(text)), entry))
        if row["valid_until"] is None or self.job.now < row["valid_until"]:
            for builder, key, entry in entries:
                kind = self.job.bindings[builder].type
                self.dry.give(builder, {key: from_entry(entry, kind, until=row["valid_until"])})
                self.steps.settled.add((builder.name, key))
        return True

    def _group_changes(self, row: Row) -> str:
        past = self.steps.past(Moment(row["recorded"], row["run_id"]))
        if self._group_trace(past) != row["group_trace"]:
            return "the group changed, in what cannot be told"
        told = []
        for keyset, sources in self.trace.gathered:
            group = self._group_key(keyset.key)
            for source in sources:
                then, now = past.hashes(source, keyset, group), self.dry.hashes(source, keyset, group)
                if then != now:
                    told.append(
                        f"the group changed: {group_said(then, now)} in {source.name} over {keyset.name}"
                    )
        for source in self.trace.grouped:
            key = self._group_key(source.key)
            then_hash, now_hash = self._hash(past, source, key), self._hash(self.dry, source, key)
            if then_hash != now_hash:
                told.append(f"{source.name} changed: value hash {short(then_hash)} -> {short(now_hash)}")
        return "; ".join(told) or f"the group changed: other members of {self.keyset.name}"

    def _group_trace(self, world: Dry) -> str:
        def tree(keyset: type[KeySet], source: Any) -> str:
            group = self._group_key(keyset.key)
            ids = world.resolve(keyset, [group])[0].value or []
            hashes = world.hashes(source, keyset, group) if source is not None else {}
            return group_hash((key_json((*group, member)), hashes.get(str(member), "")) for member in ids)

        return group_trace(
            self.trace, tree, lambda source: self._hash(world, source, self._group_key(source.key))
        )

    def _read_parts(self, row: Row) -> list[Part]:
        parts = []
        for path, text, old in json.loads(row["reads"] or "[]"):
            if path.startswith("?"):
                said = "it read something with a config of its own, which is not recorded"
                parts.append(Part("read", path, old, None, True, said))
                continue
            builder = load_builder(path)
            self.job.bindings.include(Graph([builder]))
            new = self._hash(self.dry, builder, tuple(json.loads(text)))
            name = f"{builder.name}{text}"
            said = f"{name} changed: value hash {short(old)} -> {short(new)}"
            parts.append(Part("read", name, old, new, old != new or new == "error", said))
        return parts

    def _expiry_parts(self, row: Row) -> list[Part]:
        until: datetime | None = row["valid_until"]
        if until is None:
            return []
        return [
            Part("expiry", "expiry", None, when(until), self.job.now >= until, f"expired at {when(until)}")
        ]

    def _entry_parts(self, row: Row) -> list[Part]:
        identity = row["entry_id"]
        if identity is None:
            return []
        there = (self.builder.name, row["key"]) in self.steps.known_before
        said = "its entry is there" if there else "its entry is gone"
        return [Part("entry", "entry", identity, identity if there else None, not there, said)]

    def _hash(self, world: Dry, source: Builder, key: Key) -> str:
        return world.resolve(source, [key])[0].value_hash or "error"

    def _group_key(self, fields: tuple[str, ...]) -> Key:
        return keys_of(self.keyset.key, self.group, fields)
