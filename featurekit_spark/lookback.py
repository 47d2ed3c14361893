"""Evaluation that builds nothing dear, now and as of an earlier moment: what explanations are made from.

`Dry` reads sources and looks entries up; only light and inline builders are built. `Past` answers for sources with what
the cache kept of them. Both write nothing. Knows no traces and no sentences.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featurekit_spark.batch import Batch
from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound, Dep, Each, FeatureBuilder, KeySet, Source, as_dep, keys_of
from featurekit_spark.cache.base import Entry, Found
from featurekit_spark.controller import HandController
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import inputs_hash, key_json
from featurekit_spark.job import Job
from featurekit_spark.readings import scan_of
from featurekit_spark.results import Origin, Result, from_entry

__all__ = ["Dry", "Moment", "Past", "Unbuilt", "combination"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]

_COMBINATIONS = 4_096


class Unbuilt(Result):
    """Stands for a value that only a build would tell. `first`: what would have to be built, as Name[key]."""

    __slots__ = ("first",)

    def __init__(self, first: str) -> None:
        super().__init__(Origin.UPSTREAM, None, error=f"{first} would have to be built")
        self.first = first


class Dry(Evaluator):
    """Resolves without paying: what has no entry and is not light or inline comes out as `Unbuilt`."""

    def __init__(self, job: Job) -> None:
        super().__init__(
            job.bindings,
            job.context,
            job.cache,
            now=job.now,
            gather="build",
            batch_rows=job.batch_rows,
            controller=lambda evaluator: HandController(job.context, job.cache, evaluator),
            failures=job.failures,
        )
        self.job = job
        self._loaded: set[tuple[str, Key]] = set()

    def cells(self, bound: Bound, key: Key) -> list[Result]:
        """What a build for `key` would read: one result per dep, a fan-out or a gather folded into one."""
        return [self._column(dep, bound.key, [key])[0] for dep in bound.deps]

    def members(self, dep: Dep, group: Key) -> dict[str, str | None]:
        """Value hashes of a gathered dep by member; None where only a build would tell."""
        assert dep.keyset is not None  # only gathered deps have members
        ids = self.resolve(dep.keyset, [group])[0].value or []
        column = self._column(
            replace(dep, keyset=None), dep.keyset.member_key(), [(*group, member) for member in ids]
        )
        return {str(member): _known_hash(result) for member, result in zip(ids, column, strict=True)}

    def hashes(self, source: Builder, keyset: type[KeySet], group: Key) -> dict[str, str]:
        """Value hashes of a source by member of a key set; empty where the members are not known."""
        ids = self.resolve(keyset, [group])[0].value or []
        keys = [keys_of(keyset.member_key(), (*group, member), source.key) for member in ids]
        results = self.resolve(source, keys)
        return {str(m): r.value_hash or "error" for m, r in zip(ids, results, strict=True)}

    def load(self, keyset: type[KeySet], sources: Sequence[Builder], group: Key) -> None:
        """Read a group's keys and sources by one scan each, where they offer one."""
        for source in (keyset, *sources):
            if (source.name, group) in self._loaded or source.name in self.results:
                continue
            self._loaded.add((source.name, group))
            scan = scan_of(source, self.job, keyset.key, group)
            if scan is None:
                continue
            table = scan.to_arrow()
            if source is keyset:
                self.give_source(source, [group], [table.column(0).to_pylist()])
            elif source.key == keyset.member_key():
                values = dict(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
                ids = self.resolve(keyset, [group])[0].value or []
                self.give_source(source, [(*group, member) for member in ids], [values.get(m) for m in ids])

    def _build(self, batch: Batch, misses: list[int]) -> None:
        if self._may_build(batch.bound):
            super()._build(batch, misses)
            return
        for row in misses:
            batch.results[row] = Unbuilt(f"{batch.bound.name}{key_json(batch.keys[row])}")

    def _may_build(self, bound: Bound) -> bool:
        return (bound.builder.light or bound.builder.inline) and not bound.builder.paid

    def _cut_short(self, bound: Bound, key: Key, cells: list[Result]) -> Result | None:
        failed = [cell for cell in cells if cell.failed and not isinstance(cell, Unbuilt)]
        unbuilt = next((cell for cell in cells if isinstance(cell, Unbuilt)), None)
        if unbuilt is not None and not failed:
            return Unbuilt(unbuilt.first)
        return super()._cut_short(bound, key, failed or cells)

    def _gather(self, dep: Dep, keyset: type[KeySet], group: Key) -> Result:
        self.load(keyset, list(dict.fromkeys(_sources(dep))), group)
        members = self.resolve(keyset, [group])[0]
        if isinstance(members, Unbuilt):
            return Unbuilt(members.first)
        if not members.failed:
            keys = [(*group, member) for member in members.value or []]
            column = self._column(replace(dep, keyset=None), keyset.member_key(), keys)
            unbuilt = next((result for result in column if isinstance(result, Unbuilt)), None)
            if unbuilt is not None:  # not a member that failed: the gather cannot be known
                return Unbuilt(unbuilt.first)
        return super()._gather(dep, keyset, group)

    def _resolve_dynamic(self, bound: Bound, key: Key) -> Result:
        text = key_json(key)
        hit = self.store.current(bound.name, bound.config_hash, [text]).get(text)
        reads = HandController(self.context, self.job.cache, self).still_reads
        if hit is None or hit.reads is None or not self._lives(bound, hit) or not reads(hit.reads):
            return Unbuilt(f"{bound.name}{text}")
        result = self._hit(bound, hit)
        result.reads = tuple((path, read, value_hash) for path, read, value_hash in json.loads(hit.reads))
        return result


@dataclass(frozen=True)
class Moment:
    """When something was appended to the cache, and by which run."""

    recorded: int
    run_id: str

    @classmethod
    def of(cls, entry: Entry) -> Moment:
        return cls(entry.recorded, entry.run_id)

    def covers(self, entry: Entry) -> bool:
        """Whether the entry was there: appended before, or by the same run (whose appends have no order)."""
        # Every single request is called "in-process": that is no run.
        same_run = entry.run_id == self.run_id and self.run_id != "in-process"
        return entry.recorded <= self.recorded or same_run


class Past(Dry):
    """The same graph at an earlier moment: sources as they were read then, under the config hashes of then.

    `config_hashes`: by builder name, where they differ from now's. What it says is a guess until it reproduces a hash
    that was stored then.
    """

    def __init__(self, job: Job, moment: Moment, config_hashes: Mapping[str, str]) -> None:
        # What failed since then was not known then.
        super().__init__(replace(job, bindings=_PastBindings(job, config_hashes), failures=None))
        self.moment = moment
        self._now = job.bindings

    def load(self, keyset: type[KeySet], sources: Sequence[Builder], group: Key) -> None:
        """Nothing is read any more."""

    def _may_build(self, bound: Bound) -> bool:
        now = self._now[type(bound.builder)]
        return super()._may_build(bound) and bound.config_hash == now.config_hash

    def _lives(self, bound: Bound, hit: Found) -> bool:
        return True

    def _resolve_source(self, bound: Bound, keys: list[Key]) -> list[Result]:
        newest = self._newest(bound, [key_json(key) for key in keys])
        return [self._answer(bound, key, newest) for key in keys]

    def _resolve_dynamic(self, bound: Bound, key: Key) -> Result:
        return self._answer(bound, key, self._newest(bound, [key_json(key)]))

    def _answer(self, bound: Bound, key: Key, newest: Mapping[str, Entry]) -> Result:
        entry = newest.get(key_json(key))
        if entry is None:
            return Unbuilt(f"{bound.name}{key_json(key)}")
        return self._with_own_read(bound, key, from_entry(entry, bound.type))

    def _newest(self, bound: Bound, texts: list[str]) -> dict[str, Entry]:
        newest: dict[str, Entry] = {}
        for found in self.store_candidates(bound, texts):
            if self.moment.covers(found) and newest.get(found.key, found).recorded <= found.recorded:
                newest[found.key] = found
        return newest

    def store_candidates(self, bound: Bound, texts: list[str]) -> list[Entry]:
        """All ok entries of some keys under the config of then."""
        return [found.entry for found in self.job.cache.candidates(bound.name, bound.config_hash, texts)]


class _PastBindings(Bindings):
    """Bindings with the config hashes of an earlier run; configs and code are now's."""

    def __init__(self, job: Job, config_hashes: Mapping[str, str]) -> None:
        super().__init__(job.context)
        now = job.bindings
        for builder, bound in now.items():
            self._bound[builder] = replace(
                bound, config_hash=config_hashes.get(bound.name, bound.config_hash)
            )
        self.group_fields, self.value_sources = now.group_fields, now.value_sources


def combination(
    options: Sequence[Sequence[str]], shared: Sequence[bool], wanted: str
) -> tuple[str, ...] | None:
    """One hash of each list such that together, those of groups apart, they hash to `wanted`; None where none do."""
    if any(not hashes for hashes in options):
        return None
    for picked in itertools.islice(itertools.product(*options), _COMBINATIONS):
        keyed = [h for h, is_group in zip(picked, shared, strict=True) if not is_group]
        group = [h for h, is_group in zip(picked, shared, strict=True) if is_group]
        if inputs_hash(keyed, group) == wanted:
            return picked
    return None


def _known_hash(result: Result) -> str | None:
    if isinstance(result, Unbuilt):
        return None
    return "failed" if result.failed else result.value_hash or ""


def _sources(dep: Dep) -> Iterator[Builder]:
    """Sources below a gathered dep, at whatever key; gathers below it aside."""
    for _, source in dep.on_fields:
        yield from _sources(source.dep if isinstance(source, Each) else source)
    if dep.on_fields:
        return  # its own key comes from a value
    if issubclass(dep.builder, Source):
        yield dep.builder
    for inner in map(as_dep, dep.builder.deps):
        if inner.keyset is None:
            yield from _sources(inner)
