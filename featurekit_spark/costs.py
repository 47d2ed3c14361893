"""What a builder's entries tell of its next builds: what they cost, and which keys failed last.

Reads the cache's history, the columns that it needs. Knows neither plans nor budgets.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.graph import Graph

__all__ = ["cost_of_one", "failed_before", "known_prices", "newest_ok"]

# How many of a builder's newest entries are asked.
_SAMPLE = 1_000


def cost_of_one(cache: FeatureCache, bound: Bound) -> dict[str, float | None]:
    """Mean `seconds`, `tokens` and `usd` of a build, by the newest of this config, else of any; None without any."""
    names = ("seconds", "tokens", "usd")
    rows = newest_ok(cache, bound, names)
    return {name: pc.mean(rows[name]).as_py() for name in names}


def known_prices(cache: FeatureCache, graph: Graph, bindings: Bindings) -> dict[str, float | None]:
    """The dearest of each paid builder's newest calls with today's config; None where those have no price. A builder
    without any is left out."""
    prices: dict[str, float | None] = {}
    for builder in graph:
        if builder.paid:
            rows = newest_ok(cache, bindings[builder], ("usd",), other_configs=False)
            if len(rows):
                prices[builder.name] = pc.max(rows["usd"]).as_py()
    return prices


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
