"""Equal prompts are one call: within a run, however its keys are spread over tasks, and between runs with leases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import CountingLLM, MovingClock
from featurekit_spark.testing.load import load_server
from featurekit_spark.testing.redis import redis_server
from tests import shop
from tests.shop import Product, ProductIds, ShopContext

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}
PRODUCTS, PROMPTS = 600, 150
PLACES = {"local": None, "stages": 256, "tables": 0}


@dataclass(frozen=True)
class ModelContext(ShopContext):
    llm: Any = None
    merchant_config: Mapping[str, Any] = field(default_factory=dict)


class Asked(FeatureBuilder[str]):
    key, value, version = shop.PRODUCT, pa.string(), "1"
    deps = (LLMCompletion.on(prompt=shop.Title),)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return str(inputs["LLMCompletion"])


def run(
    spark: Any, cache: DeltaCache, llm: Any, where: str, *, market: str = "US", leases: Any = None
) -> RunResult:
    # Products of a prompt lie far apart, and fall into different chunks of keys.
    world = shop.World(
        products={
            ("abt", market, f"p{i:03}"): Product(f"lamp {i % PROMPTS}", "acme", 1) for i in range(PRODUCTS)
        }
    )
    collect_mb = PLACES[where]
    session = Session(
        ModelContext(world, llm=llm, clock=MovingClock()),
        cache,
        engine="local" if collect_mb is None else "spark",
        spark=spark,
        limits=Limits(in_process_keys=0, batch_rows=40, partitions=4, collect_mb=collect_mb or 0),
        leases=leases,
    )
    return session.run(Asked.over(ProductIds), merchant="abt", market=market)


@pytest.mark.parametrize("where", PLACES)
def test_within_a_run(spark: Any, tmp_path: Path, where: str) -> None:
    llm = CountingLLM(log=tmp_path / "calls")
    result = run(spark, DeltaCache(str(tmp_path / "cache")), llm, where)
    assert result.status == "ok" and result.keys == PRODUCTS
    assert llm.calls == {f"lamp {i}": 1 for i in range(PROMPTS)}
    assert result.builders["LLMCompletion"].calls == PROMPTS


@pytest.fixture
def leases() -> Iterator[RedisLeases]:
    with redis_server() as url:
        made = RedisLeases(url)
        yield made
        aio.run(made.aclose())


@pytest.mark.redis
@pytest.mark.parametrize("where", ["stages", "tables"])
def test_between_a_run_on_workers_and_another(
    spark: Any, tmp_path: Path, leases: RedisLeases, where: str
) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    with load_server(delay_s=0.2) as server, ThreadPoolExecutor(2) as pool:
        # A variable that Spark's workers have as well; the server takes any key.
        chats = [OpenAIChat(server.url, "m", api_key_env="HOME", concurrency=4) for _ in range(2)]
        first = pool.submit(run, spark, cache, chats[0], where, leases=leases)
        while not server.seen().requests and not first.done():
            time.sleep(0.05)
        other = pool.submit(run, spark, cache, chats[1], "local", market="DE", leases=leases)
        results = [first.result(240), other.result(240)]
        for chat in chats:
            aio.run(chat.aclose())
        seen = server.seen()
    assert [result.status for result in results] == ["ok", "ok"], [result.errors for result in results]
    assert (seen.requests, seen.prompts) == (PROMPTS, PROMPTS)
    calls = [result.builders["LLMCompletion"].calls for result in results]
    assert sum(calls) == PROMPTS and min(calls) > 0, "both asked"
    for result in results:
        assert result.builders["LLMCompletion"].keys == PROMPTS
        assert result.paid_twice == PaidTwice()
        found = result.table(Asked)
        table = found if isinstance(found, pa.Table) else found.toArrow()
        assert dict(zip(table["product_id"].to_pylist(), table["value"].to_pylist(), strict=True)) == {
            f"p{i:03}": f"1. like lamp {i % PROMPTS}" for i in range(PRODUCTS)
        }


@pytest.mark.redis
def test_what_one_of_them_is_refused_the_other_does_not_ask(
    spark: Any, tmp_path: Path, leases: RedisLeases
) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    with load_server(delay_s=0.1, refusal=0.3) as server, ThreadPoolExecutor(2) as pool:
        chats = [OpenAIChat(server.url, "m", api_key_env="HOME", concurrency=4) for _ in range(2)]
        first = pool.submit(run, spark, cache, chats[0], "stages", leases=leases)
        while not server.seen().requests and not first.done():
            time.sleep(0.05)
        other = pool.submit(run, spark, cache, chats[1], "local", market="DE", leases=leases)
        results = [first.result(240), other.result(240)]
        for chat in chats:
            aio.run(chat.aclose())
        seen = server.seen()
    assert (seen.requests, seen.prompts) == (PROMPTS, PROMPTS)
    refused = seen.kinds["refusal"]
    counts = [result.builders["LLMCompletion"] for result in results]
    assert [count.error for count in counts] == [refused, refused] and refused > 20
    assert sum(count.calls for count in counts) == PROMPTS
    assert sum(count.remembered for count in counts) == refused
    stored = [row for row in cache.history("LLMCompletion").to_pylist() if row["status"] == "error"]
    assert len(stored) == refused and all("[terminal, 1 attempt]" in row["error"] for row in stored)
