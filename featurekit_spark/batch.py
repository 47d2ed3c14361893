"""Keys of one builder on their way from what they read to their results, and how many results become one.

Knows results and builders' declarations; looks nothing up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from featurekit_spark.build import Built, finish
from featurekit_spark.builder import Bound
from featurekit_spark.fingerprint import digest, entry_id, inputs_hash
from featurekit_spark.results import Origin, Read, Result
from featurekit_spark.values import NULL_HASH

__all__ = ["NULL", "Batch", "decided", "earliest", "fold", "lineage", "reads_hash"]

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Batch:
    """Keys of one builder on their way to results: what they read, and (key as JSON, inputs_hash, entry_id) of each."""

    bound: Bound
    keys: list[Key]
    columns: list[list[Result]]
    identities: list[tuple[str, str, str]]
    results: list[Result | None]

    def inputs(self, rows: list[int]) -> dict[str, list[Any]]:
        """What a build is given, by name."""
        inputs: dict[str, list[Any]] = {
            field: [self.keys[row][i] for row in rows] for i, field in enumerate(self.bound.key)
        }
        for dep, column in zip(self.bound.deps, self.columns, strict=True):
            inputs[dep.name] = [column[row].value for row in rows]
        return inputs

    def identities_with(self, at: int, other: Result, rows: list[int]) -> dict[str, str]:
        """key as JSON -> entry_id, had the dep at `at` another value."""
        bound, wanted = self.bound, {}
        for row in rows:
            hashes = [column[row].value_hash or "" for column in self.columns]
            hashes[at] = other.value_hash or ""
            text = self.identities[row][0]
            wanted[text] = entry_id(bound.name, bound.config_hash, text, reads_hash(bound, hashes))
        return wanted

    def take(
        self, rows: list[int], built: list[Built], now: datetime, *, origin: Origin = Origin.COMPUTED
    ) -> None:
        """Values of some rows become their results."""
        made = finish(
            self.bound,
            [self.keys[row] for row in rows],
            built,
            now,
            [self.identities[row][1:] for row in rows],
            [lineage([column[row] for column in self.columns]) for row in rows],
            origin=origin,
        )
        for row, result in zip(rows, made, strict=True):
            self.results[row] = result


def reads_hash(bound: Bound, hashes: Sequence[str]) -> str:
    """inputs_hash of the deps' value hashes in order: those of gathered groups are a part of their own."""
    pairs = list(zip(bound.deps, hashes, strict=True))
    keyed = [value_hash for dep, value_hash in pairs if dep.keyset is None]
    return inputs_hash(keyed, [value_hash for dep, value_hash in pairs if dep.keyset is not None])


def lineage(cells: list[Result]) -> tuple[datetime | None, tuple[Read, ...]]:
    """When what was made of these expires, and what was read by a value below them."""
    until: datetime | None = None
    reads: tuple[Read, ...] = ()
    for cell in cells:
        until = earliest(until, cell.until)
        if cell.reads:
            reads += cell.reads
    return until, tuple(dict.fromkeys(reads)) if reads else reads


def decided(cells: list[Result]) -> Result | None:
    """The result that decides for a whole row: one that failed, else one that is null, else one that is unknown."""
    null = unknown = None
    for cell in cells:
        if cell.error is not None:
            return cell
        if null is None and cell.is_null:
            null = cell
        if cell.unknown:
            unknown = cell
    return null or unknown


NULL = Result(Origin.EMPTY, NULL_HASH)


def fold(results: list[Result], *, listed: bool = True) -> Result:
    """Many results as one: a list value, the hash of the hashes, the earliest expiry; the first failure decides."""
    failed = next((r for r in results if r.failed), None)
    if failed is not None:
        return failed
    if any(r.unknown for r in results):
        return Result(Origin.MISS, None)
    until: datetime | None = None
    reads: tuple[Read, ...] = ()
    for result in results:
        until = earliest(until, result.until)
        reads += result.reads
    value_hash = digest("each", *(r.value_hash or "" for r in results)) if listed else None
    values = [r.value for r in results] if listed else None
    return Result(Origin.HIT, value_hash, value=values, until=until, reads=reads)


def earliest(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return one or other
    return min(one, other)
