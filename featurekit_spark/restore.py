"""Going back to where an earlier run ended: what was current then is made current again, by its rows alone.

A run that finds its sources and configs as an earlier one left them has nothing to compute, yet every reader must see
the earlier entries again. Knows which rows were the newest, not what is in them; the check of all keys that follows
decides what holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import FeatureBuilder, Source
from featurekit_spark.cache.base import TRACE_SCHEMA, FeatureCache
from featurekit_spark.cache.current import moved_since, newest_rows
from featurekit_spark.fingerprint import key_json, member_texts
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import CheckTraces, Plan, ReadKeys
from featurekit_spark.unchanged import Standing

__all__ = ["RestoringCache", "remember", "went_back"]

_KEPT = 8
Key = tuple[Any, ...]


@runtime_checkable
class RestoringCache(FeatureCache, Protocol):
    """A cache that tells which rows were the newest at an earlier time."""

    def ends(self, group: str) -> Mapping[str, Any]:
        """How the last runs of a group ended, by their targets."""

    def put_ends(self, group: str, ends: Mapping[str, Any]) -> None:
        """Replace what `ends` gives."""

    def stamp(self) -> int:
        """Later than all rows that were appended here."""

    def current_rows(self, builder: str, config_hash: str, prefix: str) -> pa.Table:
        """key, entry_id, value_hash and recorded of all rows that make something current, of keys that begin so."""

    def trace_rows(self, builder: str) -> pa.Table:
        """All trace rows of a builder (TRACE_SCHEMA)."""


def remember(cache: FeatureCache, group: Key, targets: str, mark: Mapping[str, Any]) -> None:
    """Keep the end of a run that left this mark: each state once, the newest few."""
    if isinstance(cache, RestoringCache):
        ends = dict(cache.ends(key_json(group)))
        others = [end for end in ends.get(targets, ()) if _state(end["mark"]) != _state(mark)]
        ends[targets] = [{"mark": dict(mark), "recorded": cache.stamp()}, *others[: _KEPT - 1]]
        cache.put_ends(key_json(group), ends)


def went_back(
    stands: Standing,
    plan: Plan,
    graph: Graph,
    job: Job,
    group: Key,
    targets: str,
    content: Callable[[type[FeatureBuilder[Any]]], str | None],
) -> bool:
    """Whether an earlier run began as this one does, and what was current at its end is so again."""
    cache = job.cache
    if not isinstance(cache, RestoringCache):
        return False
    for end in cache.ends(key_json(group)).get(targets, ()):
        if stands.renewed(end["mark"], job.now, content) is not None:
            return _restore(cache, plan, graph, job, group, int(end["recorded"]))
    return False


def _restore(cache: RestoringCache, plan: Plan, graph: Graph, job: Job, group: Key, recorded: int) -> bool:
    """Make current again what was current in a group then, and its traces the newest, in one append. False where all of
    it is so, or cannot be told apart from what other groups share; nothing is written then."""
    members = _members(cache, plan, job, group, recorded)
    if members is None:
        return False
    pointers = []
    for builder in graph:
        if builder.inline:
            continue
        own = builder.key[: len(plan.group_fields)] == plan.group_fields
        if not own and not builder.deps and not issubclass(builder, Source):
            continue  # one entry per key, whatever else there is
        config_hash = job.bindings[builder].config_hash
        rows = _rows(cache, builder.name, config_hash, group if own else None)
        known = members.get(builder.key)
        if known is not None:  # those that had left by then are nobody's
            rows = rows.filter(pc.is_in(rows["key"], known))
        rows = moved_since(rows, recorded, emptied=known is not None)
        if len(rows) and not own:
            return False
        pointers.append(
            _stamped(rows, job, builder=builder.name, config_hash=config_hash, kind="pointer", status="ok")
        )
    (check,) = [stage for stage in plan.stages if isinstance(stage, CheckTraces)]
    traces = [_traces(cache.trace_rows(trace.target.name), group, recorded, job) for trace in check.targets]
    rows = pa.concat_tables([*pointers, *traces])
    if len(rows):
        cache.append(None, rows)
    return bool(len(rows))


def _rows(cache: RestoringCache, builder: str, config_hash: str, group: Key | None) -> pa.Table:
    """`current_rows` of a group (None: of all)."""
    if group is None:
        return cache.current_rows(builder, config_hash, "")
    whole = key_json(group)
    prefix = whole.removesuffix("]")
    rows = cache.current_rows(builder, config_hash, prefix)
    inside = pc.starts_with(rows["key"], f"{prefix},")  # the beginning of [1 is that of [12 too
    return rows.filter(pc.or_(inside, pc.equal(rows["key"], whole)))


def _members(
    cache: RestoringCache, plan: Plan, job: Job, group: Key, recorded: int
) -> dict[tuple[str, ...], pa.Array] | None:
    """Keys of the members that the group had then, by the fields of such keys; None where no entry tells."""
    found: dict[tuple[str, ...], list[str]] = {}
    for keyset in [stage.keyset for stage in plan.stages if isinstance(stage, ReadKeys)]:
        bound = job.bindings[keyset]
        rows = _rows(cache, keyset.name, bound.config_hash, group)
        then = newest_rows(rows.filter(pc.less_equal(rows["recorded"], recorded)))
        entries = cache.by_id(keyset.name, then["entry_id"].drop_null().to_pylist())
        if not entries:
            return None
        for entry in entries.values():
            ids = [] if entry.value is None else bound.type.decode(entry.value)
            texts = member_texts(group, ids)
            found.setdefault(keyset.member_key(), []).extend(texts)
    return {fields: pa.array(texts, pa.string()) for fields, texts in found.items()}


def _traces(rows: pa.Table, group: Key, recorded: int, job: Job) -> pa.Table:
    """A target's trace rows that were the newest then, and are not now."""
    rows = rows.filter(
        pc.and_(pc.equal(rows["group"], key_json(group)), pc.not_equal(rows["kind"], "pointer"))
    )
    return _stamped(moved_since(rows, recorded, by=["kind", "key"]), job)


def _stamped(rows: pa.Table, job: Job, **more: Any) -> pa.Table:
    """As TRACE_SCHEMA rows of this run."""
    more |= {"ts": job.now, "run_id": job.run_id, "recorded": 0}
    if "group" not in rows.column_names:
        more |= {"group": "", "epoch": 0}
    columns = [
        pa.array([more[f.name]] * len(rows), f.type)
        if f.name in more
        else rows[f.name]
        if f.name in rows.column_names
        else pa.nulls(len(rows), f.type)
        for f in TRACE_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=TRACE_SCHEMA)


def _state(mark: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run began with: its configs, and each source by what it held, or else by its version."""
    held = {**mark["versions"], **mark["content"]}
    return mark["targets"], held
