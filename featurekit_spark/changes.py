"""What differs between the builders of a recorded run and those of today: code, config, value type, new, gone.

Pure: compares a run record with bindings. Knows no cache, and not what a change costs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.fingerprint import config_hash
from featurekit_spark.graph import Graph

__all__ = ["Change", "ChangeKind", "changed_builders"]


class ChangeKind(StrEnum):
    """What about a builder changed."""

    CODE = "code"
    CONFIG = "config"
    TYPE = "type"
    NEW = "new"
    GONE = "gone"


@dataclass(frozen=True)
class Change:
    """One builder that is not what it was. `kinds`: in the order of ChangeKind; NEW and GONE stand alone.

    `before`, `after`: config hashes; versions and configs (as text) likewise, None where there is none. `adopted`: its
    entries were bound to the new code since.
    """

    builder: str
    kinds: tuple[ChangeKind, ...]
    before: str | None = None
    after: str | None = None
    version_before: str | None = None
    version_after: str | None = None
    config_before: str | None = None
    config_after: str | None = None
    type_before: str | None = None
    type_after: str | None = None
    adopted: bool = False

    @property
    def adoptable(self) -> bool:
        """Whether `featurekit adopt` may show that nothing has to be computed: its code changed, and nothing else."""
        return self.kinds == (ChangeKind.CODE,) and not self.adopted

    def __str__(self) -> str:
        """A sentence, such as `Prompt: its config changed from Config(words=3) to Config(words=4)`."""
        told = []
        for kind in self.kinds:
            match kind:
                case ChangeKind.NEW:
                    told.append("was not in the last run")
                case ChangeKind.GONE:
                    told.append("was in the last run, and is no longer there")
                case ChangeKind.CODE:
                    was, now = _short(self.version_before), _short(self.version_after)
                    told.append(f"its code changed (version {was} to {now})")
                case ChangeKind.TYPE:
                    told.append(f"its values are {self.type_after} and were {self.type_before}")
                case ChangeKind.CONFIG if self.config_before == self.config_after:
                    told.append("its config changed, in what its text does not show")
                case ChangeKind.CONFIG:
                    told.append(f"its config changed from {self.config_before} to {self.config_after}")
        said = f"{self.builder}: {' and '.join(told)}"
        return f"{said}; its entries were adopted" if self.adopted else said


def changed_builders(
    graph: Graph, bindings: Bindings, last: RunRecord | None, *, adopted: Collection[str] = ()
) -> list[Change]:
    """Builders whose identity is another than in `last`, in build order, those that are gone at the end by name.

    Nothing without a record, or from one that names no builders. `adopted`: config hashes that entries were bound to
    since. A ttl is no identity: its change is none here.
    """
    recorded = last.record.get("builders") if last is not None else None
    if not recorded:
        return []
    changes = []
    for builder in graph:
        bound = bindings[builder]
        was = recorded.get(bound.name)
        if was is None:
            changes.append(_change(bound, {}, (ChangeKind.NEW,)))
        elif was["config_hash"] != bound.config_hash:
            change = _change(bound, was, _kinds(bound, was), adopted=bound.config_hash in adopted)
            changes.append(change)
    names = {builder.name for builder in graph}
    return changes + [
        Change(
            name,
            (ChangeKind.GONE,),
            before=was["config_hash"],
            version_before=was["version"],
            config_before=was["config"],
            type_before=was["type"],
        )
        for name, was in sorted(recorded.items())
        if name not in names
    ]


def _kinds(bound: Bound, was: dict[str, Any]) -> tuple[ChangeKind, ...]:
    kinds = []
    if was["version"] != bound.version:
        kinds.append(ChangeKind.CODE)
    # Today's config under the old code and type: if that gives the old hash, the config is the same.
    if config_hash(bound.name, was["type"], was["version"], bound.config) != was["config_hash"]:
        kinds.append(ChangeKind.CONFIG)
    if was["type"] != bound.type.text:
        kinds.append(ChangeKind.TYPE)
    return tuple(kinds)


def _change(
    bound: Bound, was: dict[str, Any], kinds: tuple[ChangeKind, ...], *, adopted: bool = False
) -> Change:
    return Change(
        bound.name,
        kinds,
        was.get("config_hash"),
        bound.config_hash,
        was.get("version"),
        bound.version,
        was.get("config"),
        repr(bound.config),
        was.get("type"),
        bound.type.text,
        adopted,
    )


def _short(version: str | None) -> str:
    return version[:12] if version is not None and len(version) == 32 else repr(version)
