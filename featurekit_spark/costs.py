"""What a builder's next builds will cost: by its entries, else by what its builder says of calls beforehand; and which
keys failed last.

Reads the cache's history, the columns that it needs. Knows neither plans nor budgets, nor how anything is priced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.graph import Graph
from featurekit_spark.results import Counts

__all__ = [
    "CostOfOne",
    "Expected",
    "Pricing",
    "cost_of_one",
    "failed_before",
    "known_prices",
    "newest_ok",
    "pricing_of",
    "unpriced",
]

# How many of a builder's newest entries are asked, and how many keys that are not built yet.
_SAMPLE = 1_000


@dataclass(frozen=True)
class Expected:
    """What a paid call is expected to take, told before it is made; None where nobody knows. `priced`: whether its
    answer will carry a price at all."""

    tokens: int | None
    usd: float | None
    priced: bool


class Pricing(Protocol):
    """What a paid builder's `pricing(config, context)` gives, where it has such a method."""

    @property
    def priced(self) -> bool: ...

    def expected(self, key: Mapping[str, Any]) -> Expected:
        """Of the call for one key, given by its fields."""


@dataclass(frozen=True)
class CostOfOne:
    """The mean of a build; None where nothing tells. `expected`: tokens and usd are told beforehand, not by entries."""

    seconds: float | None
    tokens: float | None
    usd: float | None
    expected: bool = False


def pricing_of(bound: Bound, context: Any) -> Pricing | None:
    """What tells of a builder's calls beforehand: the one place where that is asked for."""
    ask = getattr(bound.builder, "pricing", None) if bound.builder.paid else None
    found: Pricing | None = None if ask is None else ask(bound.config, bound.view(context))
    return found


def cost_of_one(
    cache: FeatureCache, bound: Bound, context: Any, keys: Sequence[tuple[Any, ...]]
) -> CostOfOne:
    """By the newest entries of this config; for a paid builder without any, by what is expected of `keys`; else by
    entries of any config: another model has other prices."""
    any_config = _mean(newest_ok(cache, bound, _COSTS))  # this one's, where it has entries
    pricing = pricing_of(bound, context)
    if pricing is None or not keys:
        return any_config
    own = _mean(newest_ok(cache, bound, _COSTS, other_configs=False))
    if own.tokens is not None and (own.usd is not None or not pricing.priced):
        return own
    told = [pricing.expected(dict(zip(bound.key, key, strict=True))) for key in keys[:: _step(keys)]]
    return CostOfOne(
        any_config.seconds,
        _mean_of([found.tokens for found in told]),
        _mean_of([found.usd for found in told]),
        expected=True,
    )


def _step(keys: Sequence[Any]) -> int:
    return max(len(keys) // _SAMPLE, 1)


def _mean_of(told: Sequence[float | None]) -> float | None:
    known = [amount for amount in told if amount is not None]
    return sum(known) / len(known) if len(known) == len(told) else None


def known_prices(
    cache: FeatureCache, graph: Graph, bindings: Bindings, context: Any
) -> dict[str, float | None]:
    """The dearest of each paid builder's newest calls with today's config; None where those have no price, or where the
    next ones will have none. A builder of which nothing is known is left out."""
    prices: dict[str, float | None] = {}
    for builder in graph:
        if builder.paid:
            bound = bindings[builder]
            pricing = pricing_of(bound, context)
            rows = newest_ok(cache, bound, ("usd",), other_configs=False)
            if pricing is not None and not pricing.priced:
                prices[builder.name] = None
            elif len(rows) and (pricing is None or rows["usd"].null_count < len(rows)):
                prices[builder.name] = pc.max(rows["usd"]).as_py()
    return prices


_COSTS = ("seconds", "tokens", "usd")


def _mean(rows: pa.Table) -> CostOfOne:
    return CostOfOne(*(pc.mean(rows[name]).as_py() for name in _COSTS))


def unpriced(counts: Mapping[str, Counts]) -> Iterator[str]:
    """A line for each builder that was paid for in a run, at a price nobody knows."""
    for name, made in counts.items():
        if made.calls and made.usd is None:
            calls = "1 call" if made.calls == 1 else f"{made.calls} calls"
            yield (
                f"{name} made {calls} whose price is not known: tokens are counted, usd are not. Give the model one "
                "(settings llm.price or llm.prices)"
            )


def failed_before(cache: FeatureCache, bound: Bound) -> set[str]:
    """Keys (JSON) whose newest entry under this config is an error."""
    if bound.builder.inline or not cache.has(bound.name):
        return set()
    rows = cache.history(bound.name, ["key", "config_hash", "status", "recorded"])
    rows = rows.filter(pc.equal(rows["config_hash"], bound.config_hash))
    if not pc.any(pc.equal(rows["status"], "error")).as_py():
        return set()
    rows = rows.sort_by("recorded")
    newest = dict(zip(rows["key"].to_pylist(), rows["status"].to_pylist(), strict=True))
    return {key for key, status in newest.items() if status == "error"}


def newest_ok(
    cache: FeatureCache, bound: Bound, columns: Sequence[str], *, other_configs: bool = True
) -> pa.Table:
    """The newest entries of this config that are no errors, and of any config where this one has none."""
    rows = cache.history(bound.name, [*columns, "config_hash", "status", "recorded"])
    rows = rows.filter(pc.equal(rows["status"], "ok"))
    own = rows.filter(pc.equal(rows["config_hash"], bound.config_hash))
    asked = own if len(own) or not other_configs else rows
    return asked.sort_by([("recorded", "descending")]).slice(0, _SAMPLE)
