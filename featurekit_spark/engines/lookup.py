"""Entries that a stage may find, read from the cache once per stage and looked up in memory.

Shared by the engines: a look-up per batch would read the same files again and again, and a worker has no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, keys_of
from featurekit_spark.cache.base import ENTRY_SCHEMA, Found
from featurekit_spark.cache.current import to_entries
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import key_json
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage

__all__ = [
    "CACHED_SCHEMA",
    "Candidates",
    "as_table",
    "former_entries",
    "from_table",
    "local_builders",
    "stage_candidates",
]

Key = tuple[Any, ...]
CACHED_SCHEMA = pa.schema([*ENTRY_SCHEMA, ("current", pa.bool_()), ("last_reads", pa.string())])
"""An entry with what a look-up says of it, as it travels to workers."""


class Candidates:
    """Look-up among entries that were read before."""

    def __init__(self, found: Iterable[Found]) -> None:
        self._by_id: dict[tuple[str, str], Found] = {}
        self._current: dict[tuple[str, str, str], Found] = {}
        for hit in found:
            entry = hit.entry
            self._by_id[entry.builder, entry.entry_id] = hit
            if hit.current:
                self._current[entry.builder, entry.config_hash, entry.key] = hit

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        found = ((key, self._by_id.get((builder, entry))) for key, entry in wanted.items())
        return {key: hit for key, hit in found if hit is not None}

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        found = ((key, self._current.get((builder, config_hash, key))) for key in keys)
        return {key: hit for key, hit in found if hit is not None}

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        asked = set(keys)
        own = (hit for (name, _), hit in self._by_id.items() if name == builder)
        return [hit for hit in own if hit.entry.config_hash == config_hash and hit.entry.key in asked]


def former_entries(stage: KeyedStage, evaluator: Evaluator, job: Job) -> list[Found]:
    """Entries of the group-level features whose changes the stage's builders follow: what they were before."""
    found: list[Found] = []
    for builder in stage.builders:
        at = builder.followed()
        if at is not None:
            dep = job.bindings[builder].deps[at].builder
            keys = [key_json(key) for key in evaluator.results.get(dep.name, {})]
            if set(dep.key) <= job.bindings.group_fields and job.cache.has(dep.name):
                found += job.cache.candidates(dep.name, job.bindings[dep].config_hash, keys)
    return found


def stage_candidates(stage: KeyedStage, keys: Sequence[Key], job: Job) -> list[Found]:
    """All entries of the stage's keys, for every builder that it evaluates and caches."""
    found: list[Found] = []
    for builder in local_builders(stage, job):
        if not builder.inline and not builder.is_dynamic() and job.cache.has(builder.name):
            texts = list(dict.fromkeys(key_json(keys_of(stage.space.key, key, builder.key)) for key in keys))
            found += job.cache.candidates(builder.name, job.bindings[builder].config_hash, texts)
    return found


def local_builders(stage: KeyedStage, job: Job) -> list[type[FeatureBuilder[Any]]]:
    """The stage's builders, and those without inputs of their own that it evaluates on the way."""
    known = [*stage.builders, *stage.given]
    found = list(stage.builders)
    for builder in stage.builders:
        for dep in job.bindings[builder].deps:
            if not dep.on_fields and dep.keyset is None and dep.builder not in known:
                found.append(dep.builder)
    return found


def as_table(found: Sequence[Found]) -> pa.Table:
    """Candidates as CACHED_SCHEMA rows."""
    if not found:
        return CACHED_SCHEMA.empty_table()
    columns: dict[str, list[Any]] = {
        name: [getattr(hit.entry, name) for hit in found] for name in ENTRY_SCHEMA.names
    }
    columns["current"] = [hit.current for hit in found]
    columns["last_reads"] = [hit.reads for hit in found]
    return pa.table(columns, schema=CACHED_SCHEMA)


def from_table(rows: pa.Table) -> Candidates:
    """CACHED_SCHEMA rows, ready for look-ups."""
    marks = zip(rows["current"].to_pylist(), rows["last_reads"].to_pylist(), strict=True)
    entries = to_entries(rows.select(ENTRY_SCHEMA.names))
    return Candidates(Found(entry, *mark) for entry, mark in zip(entries, marks, strict=True))
