"""What calls on workers cost is counted as in-process, failed calls among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import BudgetReachedError, BuildError
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import CountingLLM, MovingClock
from tests import shop
from tests.shop import Product, ProductIds

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}
TITLES = ("red lamp", "sofa", "chair", "desk", "bed", "shelf")


@dataclass(frozen=True)
class Asking:
    llm: Any
    world: shop.World = field(
        default_factory=lambda: shop.World(
            products={("abt", "US", f"p{n}"): Product(title) for n, title in enumerate(TITLES)}
        )
    )
    clock: Any = field(default_factory=MovingClock)


class Asked(FeatureBuilder[str]):
    key, value, paid, needs = ("prompt",), pa.string(), True, ("llm",)

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        answer = await context.llm.complete(inputs["prompt"])
        return Metered(answer.text, answer.tokens, answer.usd)


class Reply(FeatureBuilder[str]):
    key, deps, value = shop.PRODUCT, (Asked.on(prompt=shop.Title),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"<{inputs['Asked']}>"


def run(spark: Any, cache: Any, context: Asking, **limits: Any) -> Any:
    session = Session(
        context,
        cache,
        engine="local" if spark is None else "spark",
        spark=spark,
        limits=Limits(in_process_keys=0, batch_rows=2, partitions=2),
    )
    return session.run(Reply.over(ProductIds), budget=Budget(**limits), **ABT)


def test_failed_calls_cost_what_is_known_of_them(spark: Any, tmp_path: Path) -> None:
    counts = {}
    for name, engine in {"spark": spark, "local": None}.items():
        refused = BuildError("the model refused").with_cost(7, 0.5)
        failures = {"chair": refused, "desk": BuildError("too long")}
        llm = CountingLLM(log=tmp_path / name, failures=failures, usd_per_call=0.25)
        cache = MemoryCache()
        made = run(engine, cache, Asking(llm)).builders["Asked"]
        failed = [row for row in cache.history("Asked").to_pylist() if row["status"] == "error"]
        assert sorted((row["key"], row["tokens"], row["usd"]) for row in failed) == [
            ('["chair"]', 7, 0.5),
            ('["desk"]', None, None),
        ]
        counts[name] = (made.calls, made.error, made.computed, made.tokens, made.usd)
    assert counts["spark"] == counts["local"]
    assert counts["spark"][-1] == 4 * 0.25 + 0.5


def test_a_failed_call_counts_as_the_dearest_one(spark: Any, tmp_path: Path) -> None:
    llm = CountingLLM(log=tmp_path / "calls", usd_per_call=0.25)
    cache = MemoryCache()
    with pytest.raises(BudgetReachedError):
        run(spark, cache, Asking(llm), max_calls=2)
    rest = {title: BuildError("no") for title in TITLES if title not in llm.calls}
    failing = CountingLLM(log=tmp_path / "failed", failures=rest, usd_per_call=0.25)
    with pytest.raises(BudgetReachedError, match=r"after 3 calls and 0\.75 usd"):
        run(spark, cache, Asking(failing), max_usd=0.75)
    assert sum(failing.calls.values()) == 3
