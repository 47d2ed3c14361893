"""Adoption: a builder's entries go on under its new code, where a sample of keys shows that its values stay.

Owns the sample, the verdict and the one append that binds. Builds nothing paid unless told to; knows no command line.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound, FeatureBuilder, Source
from featurekit_spark.cache.base import ENTRY_SCHEMA, FeatureCache, Found, RunRecord, TraceRow
from featurekit_spark.changes import ChangeKind, changed_builders
from featurekit_spark.controller import run_clock
from featurekit_spark.errors import UsageError
from featurekit_spark.fingerprint import entry_id, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.sample import Disagreement, Sample, take_sample
from featurekit_spark.values import NULL_HASH

__all__ = ["Adoption", "AdoptionStatus", "adopt", "adopted_hashes"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]


class AdoptionStatus(StrEnum):
    """How an adoption ended."""

    ADOPTED = "adopted"
    WOULD = "would adopt"  # a dry run
    NOTHING = "nothing to do"
    REFUSED = "refused"


@dataclass(frozen=True)
class Adoption:
    """What was found and done. `entries`: bound to the new code, or that would be. `said`: the verdict in a sentence.

    `sampled` keys were compared; `skipped` counts, by reason, those that could not be. `calls`, `tokens`, `usd`: what
    the sample cost (usd None: no price known).
    """

    builder: str
    status: AdoptionStatus
    said: str
    before: str | None = None
    after: str | None = None
    entries: int = 0
    sampled: int = 0
    agreed: int = 0
    disagreements: tuple[Disagreement, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    forced: bool = False
    calls: int = 0
    tokens: int = 0
    usd: float | None = 0.0
    run_id: str | None = None


def adopt(
    builder: Builder,
    *,
    graph: Graph,
    bindings: Bindings,
    context: Any,
    cache: FeatureCache,
    group: Mapping[str, Any],
    sample: int = 100,
    force: bool = False,
    sample_paid: bool = False,
    dry_run: bool = False,
    reason: str = "",
) -> Adoption:
    """Bind the entries of `builder` that the group's last run used to its code of today, if the values agree.

    `bindings` are those of a run over `graph`. Entries of other groups with the same config go with them. With `force`
    they are bound whatever the sample says, also where there is none. Raises UsageError where there is more to it than
    code: another value type; another config, unless forced.
    """
    bound = bindings[builder]
    names = key_json(tuple(group.values()))
    before, nothing = _before(bound, graph, bindings, cache, names, force)
    if before is None:
        return Adoption(bound.name, AdoptionStatus.NOTHING, nothing, after=bound.config_hash)
    old = _entries(cache, bound.name, before)
    if not len(old):
        said = "the last run's code has no entries in this cache"
        return Adoption(bound.name, AdoptionStatus.NOTHING, said, before, bound.config_hash)
    if not len(_unbound(cache, bound, old)):
        said = f"its {len(old)} entries are bound to its new code already"
        return Adoption(bound.name, AdoptionStatus.NOTHING, said, before, bound.config_hash)
    found = Sample()
    if sample > 0 and (sample_paid or not builder.paid) and not issubclass(builder, Source):
        found = take_sample(
            bound, old, bindings=bindings, context=context, cache=cache, group=group, size=sample
        )
    agreed = found.compared - len(found.disagreements)
    refusal = None if force else _refusal(bound, found, sample_paid)
    rows = _unbound(cache, bound, old)
    status = (
        AdoptionStatus.REFUSED if refusal else AdoptionStatus.WOULD if dry_run else AdoptionStatus.ADOPTED
    )
    result = Adoption(
        bound.name,
        status,
        refusal or _verdict(status, len(rows), found, force),
        before,
        bound.config_hash,
        0 if refusal else len(rows),
        found.compared,
        agreed,
        found.disagreements,
        dict(found.skipped),
        force,
        found.calls,
        found.tokens,
        found.usd,
        f"adopt-{uuid.uuid4().hex}" if status is AdoptionStatus.ADOPTED else None,
    )
    if result.run_id is not None:
        _bind(result, bound, old, rows, context=context, cache=cache, names=names, reason=reason)
    return result


def adopted_hashes(cache: FeatureCache, group: Mapping[str, Any]) -> set[str]:
    """Config hashes that entries were bound to in a group, for `changed_builders`."""
    return {run.record["after"] for run in cache.runs(_records_of(key_json(tuple(group.values()))))}


def _records_of(group: str) -> str:
    return key_json((*json.loads(group), "adopted"))


def _before(
    bound: Bound, graph: Graph, bindings: Bindings, cache: FeatureCache, group: str, force: bool
) -> tuple[str | None, str]:
    """The config hash to adopt from, or None and why there is none."""
    builder = type(bound.builder)
    if builder.inline:
        return None, "it is inline: it is never cached, so there is nothing to adopt"
    if issubclass(builder, Source) and builder.freshness.ttl is None:
        return None, (
            "it is a source without a ttl: every run reads it again, and where it reads the same, nothing above it "
            "is computed, whatever its code"
        )
    runs = [run for run in cache.runs(group) if bound.name in run.record.get("builders", {})]
    last = next((run for run in runs if run.finished), runs[0] if runs else None)
    if last is None:
        return _newest_other(bound, cache), "there are no entries of an earlier code"
    change = next((c for c in changed_builders(graph, bindings, last) if c.builder == bound.name), None)
    if change is None:
        return None, "its code is what it was in the last run (comments, docstrings and layout are no change)"
    if ChangeKind.TYPE in change.kinds:
        raise UsageError(
            f"{change}. Entries of one type cannot be taken for another; run it, or go back to the old type."
        )
    if ChangeKind.CONFIG in change.kinds and not force:
        raise UsageError(
            f"{change}. A sample says whether code computes the same, and another config is meant to compute "
            "something else. Adopt with the old config first, or pass --force."
        )
    return change.before, ""


def _newest_other(bound: Bound, cache: FeatureCache) -> str | None:
    """The config hash of the newest entry that is not of today's: single requests leave no run record."""
    rows = cache.history(bound.name).select(["config_hash", "recorded"])
    rows = rows.filter(pc.not_equal(rows["config_hash"], bound.config_hash))
    if not len(rows):
        return None
    newest: str = rows.sort_by([("recorded", "descending")])["config_hash"][0].as_py()
    return newest


def _entries(cache: FeatureCache, builder: str, config_hash: str) -> pa.Table:
    """ok entries of one config, one per key and inputs, in the order in which they were appended."""
    rows = cache.history(builder)
    rows = rows.filter(pc.and_(pc.equal(rows["config_hash"], config_hash), pc.equal(rows["status"], "ok")))
    rows = rows.sort_by([("recorded", "ascending")])
    last = {identity: row for row, identity in enumerate(rows["entry_id"].to_pylist())}
    return rows.take(pa.array(sorted(last.values()), pa.int64()))


def _new_ids(bound: Bound, old: pa.Table) -> list[str]:
    pairs = zip(old["key"].to_pylist(), old["inputs_hash"].to_pylist(), strict=True)
    return [entry_id(bound.name, bound.config_hash, key, inputs) for key, inputs in pairs]


def _unbound(cache: FeatureCache, bound: Bound, old: pa.Table) -> pa.Table:
    """Of the old entries those that the new code has none for."""
    there = set(cache.ids(bound.name).to_pylist())
    return old.filter(pa.array([identity not in there for identity in _new_ids(bound, old)], pa.bool_()))


def _refusal(bound: Bound, found: Sample, sample_paid: bool) -> str | None:
    if found.disagreements:
        return (
            f"the new code computes other values for {len(found.disagreements)} of {found.compared} keys; nothing "
            "was adopted. The next run computes them; --force adopts the old ones all the same."
        )
    if found.compared:
        return None
    if isinstance(bound.builder, Source):
        return "it is a source: what it reads today need not be what it read then. Only --force adopts its entries."
    if bound.builder.paid and not sample_paid:
        return (
            "it is paid, so its new code was not tried. --sample-paid makes as many calls as keys are sampled, "
            "--force adopts without any."
        )
    return f"no key could be compared ({_reasons(found) or 'none was sampled'}). Only --force adopts its entries."


_COUNTED: Final = 3


def _reasons(found: Sample) -> str:
    most = sorted(found.skipped.items(), key=lambda item: (-item[1], item[0]))[:_COUNTED]
    return "; ".join(f"{count}: {reason}" for reason, count in most)


def _verdict(status: AdoptionStatus, rows: int, found: Sample, force: bool) -> str:
    done = "were adopted" if status is AdoptionStatus.ADOPTED else "would be adopted"
    how = "no key was compared"
    if found.compared:
        how = f"{found.compared - len(found.disagreements)} of {found.compared} sampled keys agree"
    return f"{how}; {rows} entries {done}{', forced' if force else ''}"


def _bind(
    result: Adoption,
    bound: Bound,
    old: pa.Table,
    rows: pa.Table,
    *,
    context: Any,
    cache: FeatureCache,
    names: str,
    reason: str,
) -> None:
    """One append of all rows under the new config hash, then the record of it."""
    assert result.run_id is not None
    assert result.before is not None
    now = run_clock(context)
    keys = list(dict.fromkeys(old["key"].to_pylist()))
    current = cache.current(bound.name, result.before, keys)
    # A key's current entry comes last, so that it is the current one under the new code too.
    is_current = [
        key in current and current[key].entry.entry_id == identity
        for key, identity in zip(rows["key"].to_pylist(), rows["entry_id"].to_pylist(), strict=True)
    ]
    order = sorted(range(len(rows)), key=is_current.__getitem__)
    rows = rows.take(pa.array(order, pa.int64()))
    size = len(rows)
    made = {
        "config_hash": pa.array([bound.config_hash] * size, pa.string()),
        "entry_id": pa.array(_new_ids(bound, rows), pa.string()),
        "run_id": pa.array([result.run_id] * size, pa.string()),
        # What they cost was counted when they were computed.
        "seconds": pa.nulls(size, pa.float64()),
        "tokens": pa.nulls(size, pa.int64()),
        "usd": pa.nulls(size, pa.float64()),
        "attempts": pa.nulls(size, pa.int64()),
        "estimated_tokens": pa.nulls(size, pa.int64()),
    }
    columns = [name for name in ENTRY_SCHEMA.names if name != "recorded"]
    entries = pa.table({name: made.get(name, rows[name]) for name in columns})

    several = Counter(old["key"].to_pylist())
    there = cache.current(bound.name, bound.config_hash, keys)
    pointers = []
    for key in keys:
        # What the new code computed itself is newer than all of this, and stays current.
        hit = there.get(key) or current.get(key)
        if several[key] > 1 or key in there or hit is None or hit.reads is not None:
            pointers.append(_pointer(bound, key, hit, now, result.run_id))
    cache.append(entries, pointers)
    record = {**asdict(result), "reason": reason}
    cache.record_run(RunRecord(result.run_id, _records_of(names), now, "adopted", record))


def _pointer(bound: Bound, key: str, hit: Found | None, now: datetime, run_id: str) -> TraceRow:
    """Says that a key's entry is its current one, or that its value is null."""
    if hit is None:
        return TraceRow(bound.name, "pointer", key, bound.config_hash, now, run_id, value_hash=NULL_HASH)
    identity = entry_id(bound.name, bound.config_hash, key, hit.entry.inputs_hash)
    return TraceRow(
        bound.name,
        "pointer",
        key,
        bound.config_hash,
        now,
        run_id,
        reads=hit.reads,
        entry_id=identity,
        value_hash=hit.entry.value_hash,
    )
