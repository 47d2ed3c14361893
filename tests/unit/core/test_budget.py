"""What a run may pay: how a budget is granted, counted, shared out, and what is left when it ends a run."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.budget import Budget, Purse
from featurekit_spark.builder import FeatureBuilder, Metered, Source
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import BudgetReachedError, ConfigError, NewCallsError
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.shop import Product, ProductIds

ABT = {"merchant": "abt", "market": "US"}
GROUP = '["abt","US"]'


class Shop:
    """Ten products, each with a prompt of its own; an answer costs 0.5 usd."""

    def __init__(self, *, batch_rows: int = 2_048) -> None:
        products = {("abt", "US", f"p{n}"): Product(f"lamp {n}") for n in range(10)}
        self.world = shop.World(products=products, slogans={"acme": "it works"})
        self.cache = MemoryCache()
        context = shop.ShopContext(self.world, MovingClock())
        self.session = Session(context, self.cache, engine="local", limits=Limits(batch_rows=batch_rows))

    def run(self, target: Any = shop.Logic, **limits: Any) -> Any:
        return self.session.run(target.over(ProductIds), budget=Budget(**limits), **ABT)

    def stop(self, **limits: Any) -> BudgetReachedError:
        with pytest.raises(BudgetReachedError) as stopped:
            self.run(**limits)
        return stopped.value

    @property
    def paid(self) -> int:
        return sum(count for (name, _), count in self.world.built.items() if name == "Answer")


@pytest.fixture(params=[3, 2_048])
def abt(request: pytest.FixtureRequest) -> Shop:
    return Shop(batch_rows=request.param)


def test_a_run_stops_at_its_calls_and_the_next_one_goes_on(abt: Shop) -> None:
    stop = abt.stop(max_calls=4)
    assert str(stop) == (
        "the run stopped at its budget, max_calls=4, after 4 calls and 2 usd, with calls of Answer left to make. "
        "What was paid for is kept; run again to go on from there."
    )
    assert abt.paid == len(abt.cache.ids("Answer")) == 4
    assert set(abt.cache.history("Answer")["status"].to_pylist()) == {"ok"}  # who was not asked did not fail
    abt.stop(max_calls=5)
    assert abt.paid == 9
    done = abt.run(max_calls=1)
    assert (done.status, done.builders["Answer"].calls, abt.paid) == ("ok", 1, 10)
    assert abt.run(max_calls=0).unchanged


def test_a_stopped_run_leaves_a_record_and_proves_nothing(abt: Shop) -> None:
    abt.stop(max_calls=4)
    (record,) = abt.cache.runs(GROUP)
    assert (record.status, record.finished) == ("stopped", False)
    assert set(abt.cache.history("Answer")["run_id"].to_pylist()) == {record.run_id}
    assert (record.record["keys"], record.record["unchanged"]) == (10, False)
    told = record.record["builders"]["Answer"]
    assert (told["calls"], told["usd"], told["type"]) == (4, 2.0, "string")
    assert set(abt.cache.history("Answer")["config_hash"].to_pylist()) == {told["config_hash"]}
    assert abt.cache.last_run(GROUP) is None
    assert abt.cache.mark(GROUP) is None and len(abt.cache.traces("Logic", GROUP)) == 0

    done = abt.run()
    assert (done.status, done.warnings, done.builders["Answer"].calls) == ("ok", (), 6)
    assert [run.status for run in abt.cache.runs(GROUP)] == ["ok", "stopped"]
    abt.world.products["abt", "US", "p10"] = Product("lamp 10")
    abt.stop(max_calls=0)
    assert abt.cache.mark(GROUP) is None
    last = abt.cache.last_run(GROUP)
    assert last is not None and last.run_id == done.run_id


def test_a_run_that_stops_while_it_reads_leaves_a_record(abt: Shop) -> None:
    with pytest.raises(BudgetReachedError):
        abt.run(Rate, max_calls=3)
    (record,) = abt.cache.runs(GROUP)
    assert (record.status, record.record["keys"]) == ("stopped", None)
    assert record.record["builders"]["Rate"]["calls"] == 3


def test_a_failed_call_counts_as_what_it_is_known_to_have_cost() -> None:
    purse = Purse(Budget(max_usd=10.0))
    purse.charge("b", [1.0], [None, 0.5, 4.0])
    assert (purse.calls, purse.usd, purse.dearest["b"]) == (4, 1.0 + 1.0 + 1.0 + 4.0, 1.0)


def test_a_run_stops_before_it_would_pay_too_much(abt: Shop) -> None:
    abt.stop(max_usd=2.3)
    assert abt.paid == 4
    abt.stop(max_usd=0.49)
    assert abt.paid == 4  # what a call costs is known by now
    assert abt.run(max_usd=3.0).builders["Answer"].usd == 3.0


def test_nothing_may_be_paid(abt: Shop) -> None:
    abt.stop(max_calls=0)
    abt.stop(max_usd=0.0)
    assert abt.paid == 0
    assert abt.run(shop.Label, max_calls=0).status == "ok"  # pays nothing


def test_answers_without_a_price_cannot_be_limited_by_price(
    abt: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def free(self: Any, inputs: dict[str, Any], config: Any, context: Any) -> Metered[str]:
        context.world.done(self, inputs["prompt"])
        return Metered(inputs["prompt"].upper(), tokens=3)

    monkeypatch.setattr(shop.Answer, "build_one", free)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match="max_usd=5.0 cannot be kept: the answers of Answer carry no price"
        ):
            abt.run(max_usd=5.0)
        assert abt.paid == 1  # the second run knows it beforehand
    abt.stop(max_calls=3)
    assert abt.paid == 4


def test_calls_that_fail_count(abt: Shop) -> None:
    abt.world.failing = {f"hello: lamp {n}" for n in range(3)}
    abt.stop(max_calls=5)
    assert abt.paid == 2
    assert len(abt.cache.history("Answer")) == 5


class Rate(Source[str]):
    """A source that is paid for."""

    key, value, needs, paid = shop.PRODUCT, pa.string(), ("world",), True

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Metered[str]:
        context.world.done(self, inputs["product_id"])
        return Metered(inputs["product_id"], usd=0.5)


class Asking(FeatureBuilder[str]):
    """A hand-written get that pays for what it reads."""

    key, value = shop.PRODUCT, pa.string()

    def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
        return self.hashed(controller.get(shop.Answer, (key[-1],), configs={shop.Answer: {}}).require())


def test_paid_sources_and_hand_written_gets_are_limited(abt: Shop) -> None:
    with pytest.raises(BudgetReachedError):
        abt.run(Rate, max_calls=3)
    assert sum(abt.world.built.values()) == 3
    with pytest.raises(BudgetReachedError):
        abt.run(Asking, max_calls=2)
    assert abt.paid == 2


@given(
    prices=st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0]), max_size=60),
    limit=st.floats(0, 12),
    most=st.none() | st.integers(0, 40),
)
def test_a_purse_is_never_overdrawn_by_more_than_a_dearer_call(
    prices: list[float], limit: float, most: int | None
) -> None:
    purse, left = Purse(Budget(most, limit)), list(prices)
    while left and (granted := purse.grant("b", len(left))):
        before = purse.usd
        purse.charge("b", left[:granted])
        # Only a call that is dearer than all before it can cost more than was there, and only those of one grant.
        known = max(prices[: len(prices) - len(left)], default=None)
        if known is not None and max(left[:granted]) <= known:
            assert purse.usd <= max(limit, before) + 1e-6
        del left[:granted]
    assert most is None or purse.calls <= most
    if not left:
        assert purse.calls == len(prices)
    elif purse.calls != most:  # no affordable call was refused
        assert purse.usd + max(prices[: purse.calls], default=0.0) >= limit - 1e-6


def test_what_nobody_knows_is_not_told_as_nothing() -> None:
    purse = Purse(Budget(max_calls=2))
    purse.charge("Answer", [None, None])
    assert "after 2 calls and a price that nobody knows, with" in str(purse.ended("Answer"))


def test_no_new_calls(abt: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was paid for is answered; what was not is named, and nothing is computed."""
    with pytest.raises(NewCallsError, match=r"10 calls .*: 10 of Answer\. Nothing was computed"):
        abt.run(no_new_calls=True)
    assert not abt.world.built and abt.cache.runs(GROUP) == []
    abt.run()
    assert abt.run(no_new_calls=True).status == "ok"
    abt.world.products["abt", "US", "p1"].title = "new lamp"
    monkeypatch.setattr(shop.Prompt, "light", True)
    with pytest.raises(NewCallsError, match=r'1 of Answer for \["hello: new lamp"\]'):
        abt.run(no_new_calls=True)
    abt.world.products["abt", "US", "p1"] = Product("lamp 1", brand="bolt")
    assert abt.run(no_new_calls=True).builders["Logic"].computed == 1
