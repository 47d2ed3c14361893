from __future__ import annotations

import asyncio
import os
import pickle
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.llm.base import ChatModel
from featurekit_spark.sources.interactions import interaction_schema
from featurekit_spark.testing.behaviour import CacheBehaviour
from featurekit_spark.testing.fakes import CountingLLM, InteractionDBFake, MovingClock, ProductDBFake
from featurekit_spark.testing.parity import assert_parity
from tests import shop

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_a_product_db_that_a_test_edits() -> None:
    fake = ProductDBFake({"p1": {"title": "Lamp"}, "p2": {"title": {(("locale", "de_DE"),): "Lampe"}}})
    found = asyncio.run(fake.get_products({"title"}, {"p1", "gone"}))
    assert found == {"p1": {"title": {(): "Lamp"}}}
    fake.products["p1"]["title"] = "Desk lamp"
    assert asyncio.run(fake.get_products({"title"}))["p1"]["title"] == {(): "Desk lamp"}
    assert fake.requests == [(["title"], ["gone", "p1"]), (["title"], None)]
    assert asyncio.run(fake.get_product_attribute_dimensions())["title"].names == ("locale",)
    with pytest.raises(DataError):
        asyncio.run(fake.get_products({"colour"}))


def test_interactions_by_entity_and_time() -> None:
    def row(entity: str, hour: int) -> dict[str, Any]:
        served = NOON.replace(hour=hour)
        return {
            "entity_id": entity,
            "product_id": "p1",
            "kind": "view",
            "served_at": served,
            "reacted_at": None,
        }

    fake = InteractionDBFake({("abt", "US"): [row("u2", 9), row("u1", 8), row("u1", 7)]})
    everything = asyncio.run(fake.get_interactions("abt", "US"))
    assert everything.schema.equals(interaction_schema())
    assert [t.hour for t in everything["served_at"].to_pylist()] == [7, 8, 9]
    some = asyncio.run(
        fake.get_interactions("abt", "US", entity_ids=["u1"], since=NOON.replace(hour=8), until=NOON)
    )
    assert [t.hour for t in some["served_at"].to_pylist()] == [8]
    assert len(asyncio.run(fake.get_interactions("buy", "US"))) == 0


def test_a_model_that_counts(tmp_path: Path) -> None:
    llm = CountingLLM({"hi": "hello you"}, failures={"bad": OSError("down")}, log=tmp_path / "calls")
    assert isinstance(llm, ChatModel)
    answer = asyncio.run(llm.complete("hi"))
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens, answer.usd) == (
        "hello you",
        1,
        2,
        0.001,
    )
    with pytest.raises(OSError, match="down"):
        asyncio.run(llm.complete("bad"))
    elsewhere = pickle.loads(pickle.dumps(llm))
    assert asyncio.run(elsewhere.complete("two\nlines")).text == "two\nlines"
    assert llm.calls == elsewhere.calls == {"hi": 1, "bad": 1, "two\nlines": 1}
    alone = CountingLLM(str.upper)
    assert asyncio.run(alone.complete("x")).text == "X"
    assert alone.calls == {"x": 1}


def test_a_clock_that_moves() -> None:
    clock = MovingClock(NOON)
    clock.advance(hours=1, minutes=30)
    assert clock() == NOON + timedelta(minutes=90)


def test_a_behaviour_suite_asks_for_its_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"CacheBehaviour defines no make_cache\(folder\)"):
        CacheBehaviour().test_it_is_a_cache(tmp_path)


# -- the parity check finds what differs ---------------------------------------------------------------------


def context() -> shop.ShopContext:
    products = {("abt", "US", f"p{i}"): shop.Product(f"title {i}") for i in range(5)}
    return shop.ShopContext(shop.World(products=products))


class OfTheBatch(FeatureBuilder[int]):
    """Wrong: a value that depends on who else is in the batch."""

    key, deps, value = shop.PRODUCT, (shop.Title,), pa.int64()

    def build(self, inputs: Any, config: Any, context: Any) -> list[int]:
        return [len(inputs)] * len(inputs)


class OfTheHour(FeatureBuilder[int]):
    """Wrong: a value from outside its inputs."""

    key, value, needs = shop.PRODUCT, pa.int64(), ("world",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> int:
        context.world.rate += 1
        rate: int = context.world.rate
        return rate


@pytest.mark.parametrize("wrong", [OfTheBatch, OfTheHour])
def test_parity_finds_what_is_not_a_function_of_its_inputs(wrong: Any) -> None:
    with pytest.raises(AssertionError, match=rf"{wrong.name} differs for 5 of 5 keys:\n.*controller gives"):
        assert_parity(wrong.over(shop.ProductIds), context(), merchant="abt", market="US")


def test_parity_gives_the_values() -> None:
    values = assert_parity(shop.Title.over(shop.ProductIds), context(), merchant="abt", market="US")
    assert values["abt", "US", "p3"] == "title 3"
    with pytest.raises(UsageError, match=r"Title.over\(SomeKeySet\)"):
        assert_parity(shop.Title.on(merchant=shop.Brand), context(), merchant="abt", market="US")


# -- what every test of this suite gets ----------------------------------------------------------------------


def test_the_network_is_out_of_reach() -> None:
    with socket.socket() as one, pytest.raises(BaseException, match="use a fake or a server on 127.0.0.1"):
        one.connect(("192.0.2.1", 80))


def test_loopback_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_nobodys_keys_are_here() -> None:
    assert not [name for name in os.environ if name.endswith("_API_KEY")]
