"""Values that follow from those before their group changed, by a builder's `update`, so that they need not be built.

Knows entries under the group's earlier values; where no rule leads from one of them, the key is left to be built.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from featurekit_spark.batch import Batch
from featurekit_spark.bindings import Bindings
from featurekit_spark.build import update_values
from featurekit_spark.builder import Bound, Update, keys_of
from featurekit_spark.cache.base import Found
from featurekit_spark.fingerprint import key_json
from featurekit_spark.results import Origin, Result, from_entry

__all__ = ["Earlier", "follow"]

Key = tuple[Any, ...]
_log = logging.getLogger(__name__)
_FORMER = 3  # of a group's earlier values those that are looked at


class Earlier(Protocol):
    """Where entries under earlier values are."""

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> Mapping[str, Found]: ...
    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> Sequence[Found]: ...


def follow(
    batch: Batch, rows: list[int], bindings: Bindings, store: Earlier, context: Any, now: datetime
) -> list[int]:
    """Take in values that follow from those before the group changed; the rows that have to be built."""
    bound, at = batch.bound, batch.bound.builder.followed()
    if at is None or not rows or bound.builder.freshness.ttl is not None:
        return rows
    dep = bound.deps[at]
    groups: dict[Key, list[int]] = {}
    for row in rows:
        groups.setdefault(keys_of(bound.key, batch.keys[row], dep.builder.key), []).append(row)
    left = []
    for group, members in groups.items():
        for former in _former(bindings[dep.builder], store, group, batch.columns[at][members[0]]):
            if not members:
                break
            members = _follow(batch, at, former, members, store, context, now)
        left += members
    return sorted(left)


def _former(bound: Bound, store: Earlier, group: Key, current: Result) -> list[Result]:
    """A group's earlier values, the newest first."""
    found = store.candidates(bound.name, bound.config_hash, [key_json(group)])
    others = [hit.entry for hit in found if hit.entry.value is not None]
    others = [entry for entry in others if entry.value_hash != current.value_hash]
    others.sort(key=lambda entry: entry.recorded, reverse=True)
    return [from_entry(entry, bound.type) for entry in others[:_FORMER]]


def _follow(
    batch: Batch, at: int, former: Result, rows: list[int], store: Earlier, context: Any, now: datetime
) -> list[int]:
    """`update` for the rows whose entry under a former value of the group proves that nothing else changed."""
    bound = batch.bound
    found = store.find(bound.name, bound.config_hash, batch.identities_with(at, former, rows))
    entries = {row: hit.entry for row in rows if (hit := found.get(batch.identities[row][0])) is not None}
    if not entries:
        return rows
    before = {
        bound.deps[at].name: [former.value] * len(entries),
        "value": [from_entry(entry, bound.type).value for entry in entries.values()],
    }
    followed = list(entries)
    built = update_values(bound, batch.inputs(followed), before, context)
    broken = next((item.error for item in built if item.error is not None), None)
    if broken is not None:  # what update cannot do, build may
        _log.warning("%s.update failed, its keys are built: %r", bound.name, broken)
    made = {
        row: item
        for row, item in zip(followed, built, strict=True)
        if item.value is not Update.REBUILD and item.error is None
    }
    for row, item in list(made.items()):
        if item.value is Update.KEEP:
            batch.keep(row, entries[row], now, made.pop(row).seconds)
    batch.take(list(made), list(made.values()), now, origin=Origin.UPDATED)
    return [row for row in rows if batch.results[row] is None]
