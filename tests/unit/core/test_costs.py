"""What a builder says of its calls beforehand: asked in one place, by plans and by limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, Metered, Source
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.costs import Expected, unpriced
from featurekit_spark.errors import BudgetReachedError, BuildError, ConfigError
from featurekit_spark.results import Counts, Origin, Result, count, count_rows, to_rows
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.shop import Product, ProductIds, Title

ABT = {"merchant": "abt", "market": "US"}


@dataclass(frozen=True)
class Model:
    """Costs so much a letter; None: it has no price."""

    usd: float | None = 0.5
    name: str = "m"
    calls: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Context(shop.ShopContext):
    model: Any = None


@dataclass(frozen=True)
class ByLetter:
    model: Model

    @property
    def priced(self) -> bool:
        return self.model.usd is not None

    def expected(self, key: Mapping[str, Any]) -> Expected:
        letters = len(key["text"])
        return Expected(letters, None if self.model.usd is None else letters * self.model.usd, self.priced)


class Said(FeatureBuilder[str]):
    key = ("text",)
    value = pa.string()
    paid = True
    needs = ("model",)
    version = "1"

    @dataclass(frozen=True)
    class Config:
        model: str = "m"

    def default_config(self, context: Any) -> Config:
        return self.Config(context.model.name)

    def pricing(self, config: Config, context: Any) -> ByLetter:
        return ByLetter(context.model)

    def build_one(self, inputs: dict[str, Any], config: Config, context: Any) -> Metered[str]:
        text = inputs["text"]
        context.model.calls.append(text)
        usd = None if context.model.usd is None else len(text) * context.model.usd
        if "refused" in text:
            raise BuildError("the model refused").with_cost(len(text), usd)
        return Metered(text.upper(), tokens=len(text), usd=usd)


class Told(FeatureBuilder[str]):
    key = shop.PRODUCT
    deps = (Said.on(text=Title),)
    value = pa.string()
    version = "1"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Any:
        return inputs["Said"]


class Shop:
    def __init__(self, **titles: str) -> None:
        self.world = shop.World(products={("abt", "US", p): Product(title) for p, title in titles.items()})
        self.cache = MemoryCache()

    def session(self, model: Model) -> Session:
        return Session(Context(self.world, MovingClock(), model), self.cache, engine="local")


def test_a_plan_asks_for_what_no_entry_tells() -> None:
    shop_ = Shop(p1="abc", p2="abcde", p3="abc")
    said = shop_.session(Model()).estimate(Told.over(ProductIds), **ABT)["Said"]
    assert (said.calls, said.tokens, said.usd, said.expected) == (2, 8, 4.0, True)
    assert said.seconds is None
    nothing = shop_.session(Model(usd=None)).estimate(Told.over(ProductIds), **ABT)["Said"]
    assert (nothing.tokens, nothing.usd, nothing.expected) == (8, None, True)

    shop_.session(Model()).run(Told.over(ProductIds), **ABT)
    shop_.world.products["abt", "US", "p4"] = Product("a longer one")
    known = shop_.session(Model()).estimate(Told.over(ProductIds), **ABT)["Said"]
    assert (known.calls, known.tokens, known.usd, known.expected) == (1, 4, 2.0, False)  # as those before
    other = shop_.session(Model(usd=2.0, name="n")).estimate(Told.over(ProductIds), **ABT)["Said"]
    assert (other.calls, other.tokens, other.usd, other.expected) == (3, 20, 40.0, True)
    assert other.seconds is not None  # of another model's entries: better than nothing


def test_entries_without_a_price_do_not_hide_the_price_there_is_now() -> None:
    shop_ = Shop(p1="abc")
    shop_.session(Model(usd=None)).run(Told.over(ProductIds), **ABT)
    shop_.world.products["abt", "US", "p2"] = Product("abcde")
    said = shop_.session(Model()).estimate(Told.over(ProductIds), **ABT)["Said"]
    assert (said.tokens, said.usd, said.expected) == (5, 2.5, True)


def test_a_limit_in_usd_is_refused_before_any_call_where_there_is_no_price() -> None:
    shop_, model = Shop(p1="abc", p2="de"), Model(usd=None)
    with pytest.raises(ConfigError, match="the answers of Said carry no price"):
        shop_.session(model).run(Told.over(ProductIds), budget=Budget(max_usd=5.0), **ABT)
    assert model.calls == []
    shop_.session(model).run(Told.over(ProductIds), **ABT)
    shop_.world.products["abt", "US", "p3"] = Product("fghi")
    priced = Model()
    with pytest.raises(
        BudgetReachedError
    ):  # what entries without a price say is not taken for "there is none"
        shop_.session(priced).run(Told.over(ProductIds), budget=Budget(max_usd=0.0), **ABT)
    shop_.session(priced).run(Told.over(ProductIds), budget=Budget(max_usd=5.0), **ABT)
    assert priced.calls == ["fghi"]


def test_a_failed_call_that_was_paid_for_is_counted() -> None:
    shop_ = Shop(p1="abc", p2="refused")
    result = shop_.session(Model()).run(Told.over(ProductIds), **ABT)
    counts = result.builders["Said"]
    assert (counts.calls, counts.error, counts.tokens, counts.usd) == (2, 1, 10, 5.0)
    (failed,) = [row for row in shop_.cache.history("Said").to_pylist() if row["status"] == "error"]
    assert (failed["tokens"], failed["usd"]) == (7, 3.5)


def test_a_run_says_once_that_a_price_is_missing() -> None:
    result = Shop(p1="abc", p2="de").session(Model(usd=None)).run(Told.over(ProductIds), **ABT)
    (warning,) = result.warnings
    assert warning.startswith("Said made 2 calls whose price is not known")
    assert list(unpriced({"A": Counts(calls=1, usd=0.0), "B": Counts(usd=None)})) == []


@pytest.mark.parametrize(
    ("costs", "usd"),
    [
        ([("computed", 0.5), ("error", None)], 0.5),
        ([("computed", 0.5), ("error", 0.25)], 0.75),
        ([("computed", None), ("error", 0.25)], None),
        ([("updated", 0.5), ("hit", None)], 0.5),
    ],
)
def test_failed_calls_count_as_far_as_their_cost_is_known(
    costs: list[tuple[str, float | None]], usd: float | None
) -> None:
    results = [
        Result(Origin(origin), "h", usd=cost, error="no" if origin == "error" else None)
        for origin, cost in costs
    ]
    assert count(results, paid=True).usd == usd
    rows = to_rows("A", "c", ((str(i), result) for i, result in enumerate(results)))
    assert count_rows(rows, paid=True).usd == usd


def test_a_source_that_is_no_builder_with_a_price_is_not_asked() -> None:
    class Read(Source):
        key = shop.PRODUCT
        value = pa.string()
        version = "1"

        def pricing(self, config: Any, context: Any) -> Any:
            raise AssertionError("not paid for")

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
            return "x"

    assert Shop(p1="a").session(Model()).estimate(Read.over(ProductIds), **ABT)["Read"].usd == 0.0
