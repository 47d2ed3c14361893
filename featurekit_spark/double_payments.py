"""Calls that two runs paid for at the same time, because neither knew of the other's: found afterwards, and counted.

Reads the cache's history, the columns that it needs. Of two runs the one counts whose answers became durable later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import Entry, FeatureCache
from featurekit_spark.results import Counts

__all__ = ["DoublePayments", "PaidTwice"]

_COLUMNS = ("entry_id", "run_id", "status", "ts", "tokens", "usd")


@dataclass(frozen=True)
class PaidTwice:
    """`calls` whose answers another run had paid for, and what they took. `usd`: None where one has no price."""

    calls: int = 0
    tokens: int = 0
    usd: float | None = 0.0

    def __add__(self, other: PaidTwice) -> PaidTwice:
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return PaidTwice(self.calls + other.calls, self.tokens + other.tokens, usd)

    def told(self) -> list[str]:
        """A line for people; none where nothing was paid twice."""
        if not self.calls:
            return []
        price = "a price that nobody knows" if self.usd is None else f"{self.usd:.4g} usd"
        calls = "1 call was" if self.calls == 1 else f"{self.calls} calls were"
        line = (
            f"{calls} paid for twice ({self.tokens} tokens, {price}): another run or a batch on its way had asked "
            "the same. Jobs that share a Redis server (llm.redis_url) wait for each other's answers, and runs for "
            "batches unless llm.pending is pay"
        )
        return [line]


class DoublePayments:
    """Of one run. `on_the_way`: entry_ids of answers that were handed in, and paid for, before it began, and that it
    does not wait for. `look` each time when answers have just become durable: what another run has put there by then
    came before them, and what comes later counts itself."""

    def __init__(self, run_id: str, on_the_way: frozenset[str] = frozenset()) -> None:
        self._run_id, self._on_the_way = run_id, on_the_way
        self._calls: dict[str, int] = {}
        self._judged: dict[str, pa.Array] = {}
        self.found = PaidTwice()

    def look(self, cache: FeatureCache, bounds: Iterable[Bound], done: Mapping[str, Counts]) -> None:
        """Judge the answers of these builders that are new since the last look. `done`: what the run has counted."""
        for bound in bounds:
            calls = done.get(bound.name, Counts()).calls
            if bound.builder.paid and calls > self._calls.get(bound.name, 0):
                self._calls[bound.name] = calls
                self.found += self._twice(cache, bound)

    def take_left(self, bounds: Mapping[str, Bound], rows: pa.Table, known: Mapping[str, Entry]) -> None:
        """Judge answers that a dead run left (ENTRY_SCHEMA), by the `known` ones of the cache, by entry_id."""
        twice = []
        for row in rows.to_pylist():
            bound, other = bounds.get(row["builder"]), known.get(row["entry_id"])
            if bound is None or other is None or other.run_id == row["run_id"]:
                continue
            if _answers(bound, other.ts, row["ts"]) and _answers(bound, row["ts"], other.ts):
                twice.append(row)
        self.found += _sum(twice)

    def _twice(self, cache: FeatureCache, bound: Bound) -> PaidTwice:
        rows = cache.history(bound.name, _COLUMNS)
        rows = rows.filter(pc.equal(rows["status"], "ok"))
        is_own = pc.equal(rows["run_id"], self._run_id)
        own = rows.filter(is_own)
        if bound.name in self._judged:
            own = own.filter(pc.invert(pc.is_in(own["entry_id"], self._judged[bound.name])))
        others = rows.filter(pc.and_(pc.invert(is_own), pc.is_in(rows["entry_id"], own["entry_id"])))
        self._judged[bound.name] = rows.filter(is_own)["entry_id"].combine_chunks()
        if not len(others) and not self._on_the_way:
            return PaidTwice()
        mine = {row["entry_id"]: row for row in own.to_pylist()}
        twice = {
            row["entry_id"]
            for row in others.to_pylist()
            if _answers(bound, row["ts"], mine[row["entry_id"]]["ts"])
        }
        twice |= mine.keys() & self._on_the_way
        return _sum(mine[entry_id] for entry_id in sorted(twice))


def _answers(bound: Bound, given: datetime, asked: datetime) -> bool:
    """Whether an answer was one still when it was asked for again: after its ttl a second call is none too many."""
    until = bound.builder.freshness.expiry(_aware(given))
    return until is None or _aware(asked) < until


def _aware(ts: datetime) -> datetime:
    return ts if ts.tzinfo is not None else ts.replace(tzinfo=UTC)


def _sum(rows: Iterable[Mapping[str, Any]]) -> PaidTwice:
    found = PaidTwice()
    for row in rows:
        found += PaidTwice(1, row["tokens"] or 0, row["usd"])
    return found
