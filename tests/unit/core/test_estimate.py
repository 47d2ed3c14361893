"""What a run is said to do and cost, before it does."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import UsageError
from featurekit_spark.estimate import PlanEstimate
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.shop import Product, ProductIds

ABT = {"merchant": "abt", "market": "US"}


class Shop:
    def __init__(self, cache: Any = None, **products: Product) -> None:
        keys = {("abt", "US", name): product for name, product in products.items()}
        self.world = shop.World(products=keys, slogans={"acme": "it works"})
        self.clock = MovingClock()
        self.cache = MemoryCache() if cache is None else cache
        self.session = Session(shop.ShopContext(self.world, self.clock), self.cache, engine="local")

    def estimate(self, *targets: Any, **kwargs: Any) -> PlanEstimate:
        return self.session.estimate(*(t.over(ProductIds) for t in targets), **{**ABT, **kwargs})

    def run(self, *targets: Any, **kwargs: Any) -> Any:
        return self.session.run(*(t.over(ProductIds) for t in targets), **{**ABT, **kwargs})

    def title(self, name: str, title: str | None) -> None:
        self.world.products["abt", "US", name].title = title


@pytest.fixture
def abt() -> Shop:
    return Shop(p1=Product("red lamp"), p2=Product("blue lamp"), p3=Product("red lamp"), p4=Product(None))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and suggestions are string work."""
    for builder in (shop.Prompt, shop.Suggestions):
        monkeypatch.setattr(builder, "light", True)


def counts(estimate: PlanEstimate, name: str) -> dict[str, int]:
    builder = estimate[name]
    found = {part: getattr(builder, part) for part in ("hit", "proven", "stale", "miss", "error", "empty")}
    return {part: count for part, count in found.items() if count}


@pytest.mark.usefixtures("light")
def test_what_is_paid_for_is_exact_where_prompts_are_light(abt: Shop) -> None:
    cold = abt.estimate(shop.Logic)
    assert counts(cold, "Answer") == {"miss": 2} and not cold["Answer"].estimated
    assert (cold.calls, cold.tokens, cold.usd) == (2, None, None)  # no entry tells yet
    assert counts(cold, "Prompt") == {"miss": 3, "empty": 1}
    assert cold["Suggestions"].estimated and cold["Suggestions"].calls == 0
    assert abt.run(shop.Logic).builders["Answer"].calls == cold.calls

    abt.title("p1", "green chair")
    abt.title("p2", "red lamp")
    warm = abt.estimate(shop.Logic)
    assert counts(warm, "Answer") == {"hit": 1, "miss": 1}
    assert (warm.calls, warm.tokens, warm.usd) == (1, 3, 0.5)
    result = abt.run(shop.Logic)
    assert (result.builders["Answer"].calls, result.builders["Answer"].usd) == (1, 0.5)


def test_keys_that_come_from_unknown_values_are_told_from_history(abt: Shop) -> None:
    cold = abt.estimate(shop.Logic)
    assert cold["Answer"].estimated and cold.calls == 3  # one for each prompt, though two are the same
    assert counts(cold, "Search") == {"miss": 3}
    abt.run(shop.Logic)
    abt.title("p2", "green chair")
    warm = abt.estimate(shop.Logic)
    # suggestions had two texts each: `red lamp` and `lamp blue` led to three different ones
    assert warm["Search"].estimated and counts(warm, "Search") == {"miss": 2 + 2}
    assert warm["Embed"].estimated and counts(warm, "Embed") == {"hit": 3, "miss": 1 + 2}
    assert (counts(warm, "Answer"), warm.calls, warm.usd) == ({"hit": 1, "miss": 1}, 1, 0.5)


def test_nothing_changed_is_proven_and_its_intermediates_are_not_walked(abt: Shop) -> None:
    abt.run(shop.Logic)
    again = abt.estimate(shop.Logic)
    assert again.unchanged and (again.calls, again.tokens, again.usd, again.seconds) == (0, 0, 0.0, 0.0)
    assert counts(again, "Logic") == {"hit": 4, "proven": 4}
    assert again["Answer"].keys == 0


def test_an_estimate_leaves_nothing_behind(abt: Shop, tmp_path: Path) -> None:
    before = pickle.dumps(abt.cache)
    abt.estimate(shop.Logic, shop.Card)
    assert pickle.dumps(abt.cache) == before
    assert not {name for name, _ in abt.world.built}

    disk = Shop(DeltaCache(str(tmp_path / "cache")), p1=Product())
    disk.estimate(shop.Logic, shop.Card)
    assert list(tmp_path.rglob("*")) == []
    disk.run(shop.Logic)
    disk.title("p1", "sofa")
    files = sorted(tmp_path.rglob("*"))
    disk.estimate(shop.Logic, shop.Card)
    assert sorted(tmp_path.rglob("*")) == files


def test_stale_is_an_entry_whose_ttl_has_passed(abt: Shop) -> None:
    abt.run(shop.Price)
    abt.clock.advance(minutes=90)
    assert counts(abt.estimate(shop.Price), "Stock") == {"stale": 4}
    abt.clock.advance(minutes=31)
    later = abt.estimate(shop.Price)
    assert counts(later, "Price") == {"stale": 4} and not later["Price"].estimated
    assert abt.run(shop.Price).builders["Price"].computed == 4


@pytest.mark.usefixtures("light")
def test_error_is_a_key_that_failed_and_is_tried_again(abt: Shop) -> None:
    abt.world.failing.add("hello: blue lamp")
    abt.run(shop.Logic)
    abt.world.failing.clear()
    again = abt.estimate(shop.Logic)
    assert counts(again, "Answer") == {"error": 1}  # those of the other keys are proven
    assert again.calls == 1
    assert counts(again, "Logic")["error"] == 1
    abt.world.broken.add(("abt", "US", "p3"))
    assert counts(abt.estimate(shop.Logic), "Title")["error"] == 1


def test_another_config_is_a_miss_and_its_cost_is_known_from_the_one_before(abt: Shop) -> None:
    abt.run(shop.Logic)
    other = abt.estimate(shop.Logic, configs={shop.Prompt: {"template": "{greeting}, {title}?"}})
    assert counts(other, "Prompt") == {"miss": 3, "empty": 1}
    assert other["Answer"].estimated and other.usd == 3 * 0.5


def test_a_hand_written_get_is_not_run(abt: Shop) -> None:
    cold = abt.estimate(shop.Card)
    assert counts(cold, "ByHand") == {"miss": 4} and cold["ByHand"].estimated
    abt.run(shop.Card)
    abt.title("p1", "sofa")
    warm = abt.estimate(shop.Card)
    assert counts(warm, "ByHand") == {"miss": 1}  # the other three are proven
    assert counts(warm, "Card") == {"hit": 3, "proven": 3, "miss": 1}


def test_a_jump_in_keys_is_a_warning_before_and_after(abt: Shop) -> None:
    abt.run(shop.Label)
    assert abt.estimate(shop.Label).warnings == ()
    for number in range(3):
        abt.world.products["abt", "US", f"new{number}"] = Product()
    (first, *_) = warnings = abt.estimate(shop.Label).warnings
    assert first == "Label has 7 keys, the last run had 4: look at what the catalog holds today"
    assert {text.split()[0] for text in warnings} == {"Label"}
    assert abt.run(shop.Label).warnings == warnings
    assert abt.run(shop.Label).warnings == ()
    abt.world.products.clear()
    assert any(text.startswith("Label has 0 keys") for text in abt.estimate(shop.Label).warnings)


def test_a_catalog_that_stays_in_spark_is_refused(abt: Shop) -> None:
    session = Session(shop.ShopContext(abt.world), abt.cache, limits=Limits(collect_mb=0))
    with pytest.raises(UsageError, match=r"larger than engine.collect_mb \(0\)"):
        session.estimate(shop.Logic.over(ProductIds), **ABT)
