"""The walk over what a feature at a key reads: the identity of each builder on the way, now and before.

Builds nothing dear and writes nothing. Old hashes that were not stored are reproduced from earlier entries, and only
said where they hash to what was stored. Traces are its caller's affair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from featurekit_spark.builder import Bound, Dep, FeatureBuilder, KeySet, Source, keys_of, load_builder
from featurekit_spark.cache.base import Entry, RunRecord
from featurekit_spark.fingerprint import entry_id, inputs_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.lookback import Dry, Moment, Past, Unbuilt, combination
from featurekit_spark.reasons import Before, Part, State, Step, group_said, short, when
from featurekit_spark.results import Origin, Result

__all__ = ["Steps", "builders_of"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]

_NEVER = "never computed"


class Steps:
    """The walk over one key's inputs. `dry` is how things stand, `past(moment)` how they stood.

    `known_before`: entries that traces name, by builder and key. `settled`: group-level features that a trace proves.
    """

    def __init__(self, dry: Dry, graph: Graph, records: Sequence[RunRecord]) -> None:
        self.dry, self.graph, self.records = dry, graph, records
        self.job: Job = dry.job
        self.known_before: dict[tuple[str, str], Entry] = {}
        self.settled: set[tuple[str, Key]] = set()
        self._pasts: dict[Moment, Past] = {}
        self._told: dict[tuple[str, Key], Step] = {}

    def step(self, builder: Builder, key: Key, *, by_value: bool = False) -> Step:
        """A builder at a key, and everything below it. `by_value`: its key came from a value."""
        told = self._told.get((builder.name, key))
        if told is not None:
            return replace(told, inputs=(), parts=(), again=True)
        bound = self.job.bindings[builder]
        if issubclass(builder, Source):
            step = self._source(bound, key)
        elif builder.is_dynamic():
            step = self._by_hand(bound, key)
        else:
            step = self._feature(bound, key, by_value)
        self._told[builder.name, key] = step
        return step

    def past(self, moment: Moment) -> Past:
        """The world of an earlier moment."""
        if moment not in self._pasts:
            record = next((r for r in self.records if r.run_id == moment.run_id), None)
            hashes = {name: told["config_hash"] for name, told in builders_of(record).items()}
            self._pasts[moment] = Past(self.job, moment, hashes)
        return self._pasts[moment]

    def config_part(self, bound: Bound, old: str) -> Part:
        """The config hash before and now, and what about the builder differs."""
        new = bound.config_hash
        if old == new:
            return Part("config", "config", old, new, False, "its config is the same")
        then, now = self._identity_told(bound.name, old), self._identity_told(bound.name, new)
        now = now or {"version": bound.version, "config": repr(bound.config), "type": bound.type.text}
        if not then:
            said = "its code or config changed, which of them cannot be told"
            return Part("config", "config", old, new, True, said)
        changes = []
        if then["version"] != now["version"]:
            changes.append(f"its code changed (version {short(then['version'])} -> {short(now['version'])})")
        if then["config"] != now["config"]:
            changes.append(f"its config changed ({then['config']} -> {now['config']})")
        if then["type"] != now["type"]:
            changes.append(f"its value type changed ({then['type']} -> {now['type']})")
        return Part("config", "config", old, new, True, " and ".join(changes) or "its config changed")

    def _identity_told(self, name: str, config_hash: str) -> Mapping[str, Any]:
        """What a run's record says of a builder under a config hash."""
        told = (builders_of(record).get(name, {}) for record in self.records)
        return next((builder for builder in told if builder.get("config_hash") == config_hash), {})

    def _before(self, bound: Bound, text: str) -> Entry | None:
        """The entry that answered last: a trace's, the current one, or one under an earlier config."""
        known = self.known_before.get((bound.name, text))
        if known is not None:
            return known
        earlier = (builders_of(record).get(bound.name, {}).get("config_hash") for record in self.records)
        for config_hash in dict.fromkeys([bound.config_hash, *earlier]):
            if config_hash is not None:
                found = self.job.cache.current(bound.name, config_hash, [text]).get(text)
                if found is not None:
                    return found.entry
        return None

    def _source(self, bound: Bound, key: Key) -> Step:
        text = key_json(key)
        result = self.dry.resolve(type(bound.builder), [key])[0]
        before = self._before(bound, text)
        new, old = result.value_hash, before.value_hash if before is not None else None
        part = Part("input", "what it reads", old, new, old != new if old else None, "")
        until = bound.builder.freshness.expiry(before.ts) if before is not None else None
        changed = f"what it reads changed: value hash {short(old)} -> {short(new)}"
        if (
            before is not None
            and issubclass(type(bound.builder), KeySet)
            and not result.failed
            and old != new
        ):
            then = bound.type.decode(before.value) if before.value is not None else []
            said = group_said(dict.fromkeys(then, ""), dict.fromkeys(result.value or [], ""))
            changed = f"its members changed: {said}"
        state: State = "miss"
        own = True
        if result.failed:
            state, cause = "error", str(result.error).removeprefix(f"{bound.name}{text}: ")
        elif before is None:
            cause = "never read before"
        elif before.config_hash != bound.config_hash:
            config = self.config_part(bound, before.config_hash)
            cause = f"{config.said}; " + (changed if old != new else "what it reads is equal")
        elif until is not None and self.job.now < until:
            state, own, cause = "hit", False, f"read at {when(before.ts)}, stands until {when(until)}"
        elif until is not None:
            state, cause = (
                "stale",
                f"expired at {when(until)}, " + (changed if old != new else "read again: equal"),
            )
        elif old == new:
            state, own, cause = "hit", False, f"as read at {when(before.ts)}"
        else:
            state = "hit" if result.origin is Origin.HIT else "miss"
            cause = changed + (", back to what was read before" if state == "hit" else "")
        return self._stepped(bound, text, state, cause, own, result, before, (part,), ())

    def _feature(self, bound: Bound, key: Key, by_value: bool) -> Step:
        text = key_json(key)
        result = self.dry.resolve(type(bound.builder), [key])[0]
        before = self._before(bound, text)
        if (bound.name, key) in self.settled:
            cause = (
                f"its group is as it was; computed at {when(result.ts)}"
                if result.ts
                else "its group is as it was"
            )
            return self._stepped(bound, text, "hit", cause, False, result, before, (), ())
        cells = self.dry.cells(bound, key)
        inputs = tuple(self._inputs(bound, key))
        identity = _identity(bound, text, cells)
        parts = self._parts(bound, key, cells, before, identity[0])
        state, cause, own = self._cause(bound, text, cells, result, before, identity, parts)
        if by_value and cause == _NEVER:
            own, cause = False, f"{_NEVER} for this key, which another value leads to"
        step = self._stepped(bound, text, state, cause, own, result, before, parts, inputs)
        return replace(step, inputs_hash=identity[0], entry_id=identity[1])

    def _cause(
        self,
        bound: Bound,
        text: str,
        cells: list[Result],
        result: Result,
        before: Entry | None,
        identity: tuple[str | None, str | None],
        parts: tuple[Part, ...],
    ) -> tuple[State, str, bool]:
        changes = [part.said for part in parts if part.changed]
        own = any(part.changed and part.kind in ("config", "group") for part in parts)
        unbuilt = next((cell for cell in cells if isinstance(cell, Unbuilt)), None)
        if result.origin is Origin.HIT:
            return "hit", f"computed at {when(result.ts)}" if result.ts else "computed before", False
        if result.failed and not isinstance(result, Unbuilt):
            told = str(result.error).removeprefix(f"{bound.name}{text}: ")
            if result.origin is Origin.REMEMBERED:
                told += "; it is not asked again, unless a run retries terminal errors"
            return "error", told, not any(cell.failed for cell in cells)
        if result.origin is Origin.EMPTY:
            return "empty", "an input is null, so there is nothing to compute", False
        if bound.builder.inline:
            return "inline", "computed wherever it is read, never looked up", False
        if unbuilt is not None:
            return "unknown", "; ".join([*changes, f"{unbuilt.first} would have to be built first"]), own
        if identity[1] is not None:
            found = self.job.cache.find(bound.name, bound.config_hash, {text: identity[1]}).get(text)
            until = bound.builder.freshness.expiry(found.entry.ts) if found is not None else None
            if until is not None and self.job.now >= until:
                return "stale", f"expired at {when(until)}", True
        if before is None:
            failed = self.failed(bound, text)
            return "miss", _NEVER if failed is None else f"failed last time: {failed}", True
        cause = "; ".join(changes) or "what it reads changed, in what cannot be told"
        if before.value_hash is not None and before.value_hash == result.value_hash:
            cause += "; its value comes out equal"
        return "miss", cause, own

    def failed(self, bound: Bound, text: str) -> str | None:
        """The error with which a builder failed last, where a run's record says that it failed at all."""
        if not any(builders_of(record).get(bound.name, {}).get("error") for record in self.records):
            return None
        rows = [row for row in self.job.cache.history(bound.name).to_pylist() if row["key"] == text]
        last = max(rows, key=lambda row: row["recorded"], default=None)
        return last["error"] if last is not None and last["status"] == "error" else None

    def _parts(
        self, bound: Bound, key: Key, cells: list[Result], before: Entry | None, inputs: str | None
    ) -> tuple[Part, ...]:
        """The config, then each dep's value hash, before and now."""
        if before is None:
            config = Part("config", "config", None, bound.config_hash, None, "")
            news = [Part("input", _shown(dep), None, c.value_hash, None, "") for dep, c in _zip(bound, cells)]
            return (config, *news)
        if before.inputs_hash == inputs:
            olds = [cell.value_hash for cell in cells]
        else:
            olds = self._old_hashes(bound, key, cells, before)
        parts = [self.config_part(bound, before.config_hash)]
        for (dep, cell), old in zip(_zip(bound, cells), olds, strict=True):
            new = cell.value_hash
            changed = None if old is None or cell.failed else old != new
            said = f"{_shown(dep)} changed: value hash {short(old)} -> {short(new)}"
            kind: Any = "input"
            if dep.keyset is not None:
                kind, group = "group", keys_of(bound.key, key, dep.keyset.key)
                then = now = None
                if old is not None and old != new:
                    then = self.past(Moment.of(before)).members(dep, group)
                    now = self.dry.members(dep, group)
                    changed = then != now
                told = (
                    group_said(then, now)
                    if then is not None and now is not None
                    else "in what cannot be told"
                )
                said = f"the group changed: {told}"
            parts.append(Part(kind, _shown(dep), old, new, changed, said if changed else ""))
        return tuple(parts)

    def _old_hashes(self, bound: Bound, key: Key, cells: list[Result], before: Entry) -> list[str | None]:
        """Each dep's value hash when `before` was computed; Nones where no known values hash to what was stored."""
        try:
            then: list[Result | None] = list(self.past(Moment.of(before)).cells(bound, key))
        except Exception:  # values of an earlier type may not decode, code of today may not take them
            then = [None] * len(cells)
        options = []
        for (dep, cell), past in zip(_zip(bound, cells), then, strict=True):
            hashes = [past.value_hash if past is not None else None, cell.value_hash]
            if dep.keyset is None and not dep.on_fields:
                text = key_json(keys_of(bound.key, key, dep.builder.key))
                known = self.job.bindings[dep.builder]
                found = self.job.cache.candidates(dep.builder.name, known.config_hash, [text])
                hashes += [f.entry.value_hash for f in found]
            options.append([h for h in dict.fromkeys(hashes) if h is not None])
        shared = [dep.keyset is not None for dep in bound.deps]
        found_hashes = combination(options, shared, before.inputs_hash)
        return list(found_hashes) if found_hashes is not None else [None] * len(cells)

    def _by_hand(self, bound: Bound, key: Key) -> Step:
        """A hand-written get: what it read last time, against the same now."""
        text = key_json(key)
        found = self.job.cache.current(bound.name, bound.config_hash, [text]).get(text)
        result = self.dry.resolve(type(bound.builder), [key])[0]
        before = found.entry if found is not None else self._before(bound, text)
        config = before.config_hash if before is not None else bound.config_hash
        parts = [self.config_part(bound, config)] if before is not None else []
        inputs = []
        for path, read, old in json.loads(found.reads or "[]") if found is not None else ():
            if path.startswith("?"):
                parts.append(Part("read", path, old, None, None, "read with a config of its own"))
                continue
            builder = load_builder(path)
            self.job.bindings.include(Graph([builder]))
            inputs.append(self.step(builder, tuple(json.loads(read))))
            new = self.dry.resolve(builder, [tuple(json.loads(read))])[0].value_hash or ""
            name = f"{builder.name}{read}"
            said = f"{name} changed: value hash {short(old)} -> {short(new)}"
            parts.append(Part("read", name, old, new, old != new, said if old != new else ""))
        changes = "; ".join(part.said for part in parts if part.changed)
        state: State = "hit" if result.origin is Origin.HIT else "miss"
        cause = f"computed at {when(result.ts)}" if state == "hit" and result.ts else changes or _NEVER
        own = state == "miss" and (before is None or any(p.changed and p.kind == "config" for p in parts))
        return self._stepped(bound, text, state, cause, own, result, before, tuple(parts), tuple(inputs))

    def _inputs(self, bound: Bound, key: Key) -> Iterator[Step]:
        """Steps of everything read directly, in the order of deps; what a key comes from before what it leads to."""
        reads: dict[tuple[Builder, Key], bool] = {}
        for dep in bound.deps:
            if dep.keyset is not None:
                reads.setdefault((dep.keyset, keys_of(bound.key, key, dep.keyset.key)), False)
                continue
            for builder, keys in self.dry.read_by(dep, bound.key, [key]):
                for read in keys:
                    by_value = bool(dep.on_fields) and builder is dep.builder
                    reads[builder, read] = reads.get((builder, read), by_value) and by_value
        for (builder, read), by_value in reads.items():
            yield self.step(builder, read, by_value=by_value)

    def _stepped(
        self,
        bound: Bound,
        text: str,
        state: State,
        cause: str,
        own: bool,
        result: Result,
        before: Entry | None,
        parts: tuple[Part, ...],
        inputs: tuple[Step, ...],
    ) -> Step:
        last = None
        if before is not None:
            last = Before(
                before.config_hash,
                before.inputs_hash,
                before.entry_id,
                before.value_hash,
                before.ts,
                before.run_id,
            )
        value_hash = None if result.failed else result.value_hash
        return Step(
            bound.name,
            text,
            state,
            cause,
            own,
            bound.config_hash,
            result.inputs_hash,
            result.entry_id,
            value_hash,
            last,
            parts,
            inputs,
        )


def builders_of(record: RunRecord | None) -> Mapping[str, Mapping[str, Any]]:
    """What a run's record says of each builder."""
    return record.record.get("builders", {}) if record is not None else {}


def _identity(bound: Bound, text: str, cells: list[Result]) -> tuple[str | None, str | None]:
    if any(cell.failed for cell in cells):
        return None, None
    keyed = [c.value_hash or "" for dep, c in _zip(bound, cells) if dep.keyset is None]
    inputs = inputs_hash(
        keyed, [c.value_hash or "" for dep, c in _zip(bound, cells) if dep.keyset is not None]
    )
    return inputs, entry_id(bound.name, bound.config_hash, text, inputs)


def _zip(bound: Bound, cells: Sequence[Result]) -> Iterator[tuple[Dep, Result]]:
    return zip(bound.deps, cells, strict=True)


def _shown(dep: Dep) -> str:
    return dep.label or str(dep)
