"""One cache over another: what `base` has is read through, everything new is written to `own`.

Rows of both count together, the newest by `recorded`, so that an answer is what one cache with all of the rows would
give. `base` is never written. Knows what a layer offers, and no implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, FeatureCache, Found, RunRecord, TraceRow
from featurekit_spark.cache.current import (
    candidates_in,
    current_in,
    found_in,
    newest_in,
    newest_rows,
    superseded,
)
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.journal import Journal, JournalingCache
from featurekit_spark.cache.staged import StagedFile, Staging, StagingCache
from featurekit_spark.cache.typed import typed_rows
from featurekit_spark.controller import BoundFeature
from featurekit_spark.errors import UsageError

__all__ = ["Layer", "OverlayCache", "pointing"]

V = TypeVar("V")


@runtime_checkable
class Layer(FeatureCache, Protocol):
    """A cache that can lie below or above another one: it also gives its rows as they are."""

    def rows(self, builder: str, config_hash: str, keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """(entries, pointers) of at least these keys under one config, pointers also to what is not here."""

    def trace_rows(self, builder: str) -> pa.Table:
        """The trace rows of a builder (TRACE_SCHEMA)."""

    def since(self, builder: str, recorded: int) -> pa.Table:
        """key, config_hash, entry_id and recorded of what became current after this."""

    def history(self, builder: str, columns: Sequence[str] = ...) -> pa.Table:
        """As in any cache; some columns cost less."""

    def builders(self) -> list[str]:
        """Names of the builders that have entries or trace rows."""


class OverlayCache:
    """Reads `own` and `base`, writes `own` alone: a development run over the cache of production.

    `cache(Builder).get(key=..., context=...)` is the short form for one feature's bare value. Raises UsageError for a
    cache that cannot be a layer.
    """

    def __init__(self, base: FeatureCache, own: FeatureCache) -> None:
        for name, layer in (("base", base), ("own", own)):
            if not isinstance(layer, Layer):
                raise UsageError(
                    f"{name} is a {type(layer).__name__}, which does not give its rows to an overlay: use a "
                    "DeltaCache or a MemoryCache, or add what `Layer` lists."
                )
        self.base: Layer = base  # type: ignore[assignment]  # checked above
        self.own: Layer = own  # type: ignore[assignment]

    def __call__(self, builder: type[FeatureBuilder[V]]) -> BoundFeature[V]:
        return BoundFeature(builder, self)

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        return found_in(*self.rows(builder, config_hash, list(wanted)), wanted)

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        return current_in(*self.rows(builder, config_hash, keys), keys)

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        return candidates_in(*self.rows(builder, config_hash, keys), keys)

    def has(self, builder: str) -> bool:
        return self.own.has(builder) or self.base.has(builder)

    def by_id(self, builder: str, entry_ids: Iterable[str]) -> dict[str, Entry]:
        ids = list(entry_ids)
        found = self.base.by_id(builder, ids)
        for entry_id, entry in self.own.by_id(builder, ids).items():
            if entry_id not in found or found[entry_id].recorded <= entry.recorded:
                found[entry_id] = entry
        return found

    def ids(self, builder: str) -> pa.Array:
        return pc.unique(pa.concat_arrays([self.base.ids(builder), self.own.ids(builder)]))

    def append(self, entries: pa.Table | None = None, traces: Sequence[TraceRow] | pa.Table = ()) -> None:
        self.own.append(entries, traces)

    @property
    def journals(self) -> Folder | None:
        return self.own.journals if isinstance(self.own, JournalingCache) else None

    def journal(self, run_id: str, *, size: int | None) -> Journal | None:
        return self.own.journal(run_id, size=size) if isinstance(self.own, JournalingCache) else None

    def staging(self, run_id: str) -> Staging | None:
        """Where workers may write files of `own`, if they can."""
        return self.own.staging(run_id) if isinstance(self.own, StagingCache) else None

    def append_staged(self, files: Sequence[StagedFile]) -> None:
        """Make the rows of staged files entries of `own`."""
        assert isinstance(self.own, StagingCache)  # `staging` gave something
        self.own.append_staged(files)

    def traces(self, builder: str, group: str) -> pa.Table:
        rows = [layer.traces(builder, group) for layer in (self.base, self.own)]
        newest = newest_rows(pa.concat_tables(rows), ["kind", "key"])
        # Each layer told what it knows; what became current in the other one counts as well.
        return (
            superseded(newest, self.since(builder, pc.min(newest["recorded"]).as_py()))
            if len(newest)
            else newest
        )

    def history(self, builder: str, columns: Sequence[str] = ENTRY_SCHEMA.names) -> pa.Table:
        return pa.concat_tables([layer.history(builder, columns) for layer in (self.base, self.own)])

    def newest(self, builder: str) -> pa.Table:
        return newest_in(self.history(builder), pointing(self.trace_rows(builder)))

    def read(self, builder: type[FeatureBuilder[Any]]) -> pa.Table:
        return typed_rows(self.newest(builder.name), builder)

    def mark(self, name: str) -> Mapping[str, Any] | None:
        """None: runs on `base` change what is current here, and no mark would tell."""
        return None

    def put_mark(self, name: str, mark: Mapping[str, Any] | None) -> None:
        """Kept by nobody."""

    def drop_marks(self) -> None:
        """There are none."""

    def record_run(self, record: RunRecord) -> None:
        self.own.record_run(record)

    def last_run(self, group: str) -> RunRecord | None:
        runs = [layer.last_run(group) for layer in (self.base, self.own)]
        return max((run for run in runs if run is not None), key=_recorded, default=None)

    def runs(self, group: str) -> list[RunRecord]:
        return sorted([*self.base.runs(group), *self.own.runs(group)], key=_recorded, reverse=True)

    def rows(self, builder: str, config_hash: str, keys: Sequence[str]) -> tuple[pa.Table, pa.Table]:
        """The rows of both, so that an overlay may be a layer itself."""
        entries, pointers = zip(
            *(layer.rows(builder, config_hash, keys) for layer in (self.base, self.own)), strict=True
        )
        return pa.concat_tables(entries), pa.concat_tables(pointers)

    def trace_rows(self, builder: str) -> pa.Table:
        """The trace rows of both."""
        return pa.concat_tables([layer.trace_rows(builder) for layer in (self.base, self.own)])

    def since(self, builder: str, recorded: int) -> pa.Table:
        """What became current in either after this."""
        return pa.concat_tables([layer.since(builder, recorded) for layer in (self.base, self.own)])

    def builders(self) -> list[str]:
        """Names of the builders that either has."""
        return sorted({*self.base.builders(), *self.own.builders()})


def pointing(traces: pa.Table) -> pa.Table:
    """The trace rows that say which entry is current."""
    return traces.filter(pc.and_(pc.not_equal(traces["kind"], "group"), pc.equal(traces["status"], "ok")))


def _recorded(run: RunRecord) -> int:
    return run.recorded
