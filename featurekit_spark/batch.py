"""Keys of one builder on their way from what they read to their results, and how many results become one.

Knows results and builders' declarations; looks nothing up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias

import pyarrow as pa

from featurekit_spark.build import Built, finish
from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import Entry
from featurekit_spark.failures import KnownFailure
from featurekit_spark.fingerprint import digest, entry_id, inputs_hash, key_json
from featurekit_spark.results import Origin, Read, Result, from_entry, new_entries, to_rows
from featurekit_spark.values import NULL_HASH

__all__ = ["NO_LINEAGE", "NULL", "Batch", "Lineage", "decided", "earliest", "fold", "lineage"]

Key = tuple[Any, ...]
Lineage: TypeAlias = tuple[datetime | None, tuple[Read, ...]]
NO_LINEAGE: Final[Lineage] = (None, ())


class Batch:
    """Keys of one builder, all of one group, and a column of results for each of its deps.

    `identities`: (key as JSON, inputs_hash, entry_id) of each row without a result; `results` are filled as they come.
    """

    def __init__(self, bound: Bound, keys: list[Key], columns: list[list[Result]]) -> None:
        self.bound, self.keys, self.columns = bound, keys, columns
        self.results: list[Result | None] = [None] * len(keys)
        self.identities: list[tuple[str, str, str]] = [("", "", "")] * len(keys)
        self._inherits = any(cell.reads or cell.until is not None for column in columns for cell in column)

    def cells(self, row: int) -> list[Result]:
        """What the row's key reads, in order of deps."""
        return [column[row] for column in self.columns]

    def odd_rows(self) -> list[int]:
        """Rows of which something read failed, is null or is unknown."""
        odd: set[int] = set()
        for column in self.columns:
            odd.update(
                row
                for row, cell in enumerate(column)
                if cell.value_hash == NULL_HASH or cell.error is not None or cell.origin is Origin.MISS
            )
        return sorted(odd)

    def identify(self) -> dict[str, str]:
        """Set the identities; key as JSON -> entry_id."""
        rows = [row for row, result in enumerate(self.results) if result is None]
        wanted = {}
        for row, inputs in zip(rows, self._inputs_hashes(rows), strict=True):
            text = key_json(self.keys[row])
            identity = entry_id(self.bound.name, self.bound.config_hash, text, inputs)
            self.identities[row] = (text, inputs, identity)
            wanted[text] = identity
        return wanted

    def identities_with(self, at: int, other: Result, rows: list[int]) -> dict[str, str]:
        """key as JSON -> entry_id, had the dep at `at` another value."""
        name, config_hash = self.bound.name, self.bound.config_hash
        texts = [self.identities[row][0] for row in rows]
        inputs = self._inputs_hashes(rows, at, other)
        return {
            text: entry_id(name, config_hash, text, read) for text, read in zip(texts, inputs, strict=True)
        }

    def inputs(self, rows: list[int]) -> dict[str, list[Any]]:
        """What a build is given, by name."""
        inputs: dict[str, list[Any]] = {
            field: [self.keys[row][i] for row in rows] for i, field in enumerate(self.bound.key)
        }
        for dep, column in zip(self.bound.deps, self.columns, strict=True):
            inputs[dep.name] = [column[row].value for row in rows]
        return inputs

    def lineage(self, row: int) -> Lineage:
        """When what is made of the row's inputs expires, and what was read by a value below them."""
        return lineage(self.cells(row)) if self._inherits else NO_LINEAGE

    def take(
        self, rows: list[int], built: list[Built], now: datetime, *, origin: Origin = Origin.COMPUTED
    ) -> None:
        """Values of some rows become their results."""
        for row, result in zip(rows, self._finished(rows, built, now, origin), strict=True):
            self.results[row] = result

    def entries(self, rows: list[int], built: list[Built], now: datetime, run_id: str) -> pa.Table:
        """Values of some rows as the entries that they will be; what failed is left out."""
        made = zip(rows, self._finished(rows, built, now, Origin.COMPUTED), strict=True)
        good = [(self.identities[row][0], result) for row, result in made if not result.failed]
        return new_entries(to_rows(self.bound.name, self.bound.config_hash, good), run_id)

    def recall(self, row: int, entry: Entry) -> None:
        """What an earlier attempt paid for becomes the row's result, as if it had just been made."""
        found = from_entry(entry, self.bound.type, until=self.bound.builder.freshness.expiry(entry.ts))
        found.origin = Origin.COMPUTED
        found.seconds, found.tokens, found.usd = entry.seconds, entry.tokens, entry.usd
        found.attempts, found.estimated_tokens = entry.attempts, entry.estimated_tokens or 0
        until, found.reads = self.lineage(row)
        found.until = earliest(found.until, until)
        self.results[row] = found

    def remember(self, rows: list[int], standing: Mapping[str, KnownFailure]) -> list[int]:
        """What is known to fail for good becomes the rows' results; the rows that are left."""
        left = []
        for row in rows:
            _, inputs, identity = self.identities[row]
            failure = standing.get(identity)
            if failure is None:
                left.append(row)
                continue
            self.results[row] = Result(
                Origin.REMEMBERED,
                None,
                error=failure.error,
                ts=failure.ts,
                inputs_hash=inputs,
                entry_id=identity,
                until=earliest(self.bound.builder.freshness.expiry(failure.ts), self.lineage(row)[0]),
            )
        return left

    def _finished(self, rows: list[int], built: list[Built], now: datetime, origin: Origin) -> list[Result]:
        return finish(
            self.bound,
            [self.keys[row] for row in rows],
            built,
            now,
            [self.identities[row][1:] for row in rows],
            [self.lineage(row) for row in rows],
            origin=origin,
        )

    def keep(self, row: int, entry: Entry, now: datetime, seconds: float) -> None:
        """An earlier value becomes the row's result."""
        kept = from_entry(entry, self.bound.type)
        kept.origin, kept.ts, kept.seconds = Origin.UPDATED, now, seconds
        _, kept.inputs_hash, kept.entry_id = self.identities[row]
        kept.until, kept.reads = self.lineage(row)
        self.results[row] = kept

    def _inputs_hashes(
        self, rows: list[int], at: int | None = None, other: Result | None = None
    ) -> Iterable[str]:
        """inputs_hash of some rows: the deps' value hashes in order, those of gathered groups apart."""
        keyed: list[list[str]] = []
        gathered: list[list[str]] = []
        for i, (dep, column) in enumerate(zip(self.bound.deps, self.columns, strict=True)):
            cells = [other] * len(rows) if i == at and other is not None else [column[row] for row in rows]
            hashes = [cell.value_hash or "" for cell in cells]
            (keyed if dep.keyset is None else gathered).append(hashes)
        nothing: list[tuple[str, ...]] = [()] * len(rows)
        return map(
            inputs_hash,
            zip(*keyed, strict=True) if keyed else nothing,
            zip(*gathered, strict=True) if gathered else nothing,
        )


def lineage(cells: list[Result]) -> Lineage:
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
    if not listed:
        return Result(Origin.HIT, None, until=until, reads=reads)
    value_hash = digest("each", *(r.value_hash or "" for r in results))
    return _Listed(results, value_hash, until, reads)


class _Listed(Result):
    """A list of results' values, made when it is asked for."""

    __slots__ = ("_parts",)

    def __init__(
        self, parts: list[Result], value_hash: str, until: datetime | None, reads: tuple[Read, ...]
    ) -> None:
        super().__init__(Origin.HIT, value_hash, until=until, reads=reads)
        self._parts = parts

    @property
    def value(self) -> list[Any]:
        return [part.value for part in self._parts]


def earliest(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return one or other
    return min(one, other)
