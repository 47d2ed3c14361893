"""Paid calls made by the driver: no worker calls anybody, and nothing else is another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import Context, DeltaCache, Session, aio
from featurekit_spark.apps.product_recs import ProductIds as CatalogIds
from featurekit_spark.apps.product_recs import hosted
from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.embed import OpenAIEmbedder
from featurekit_spark.errors import BudgetReachedError, ContextError
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.search import MatrixStore
from featurekit_spark.session import Limits, RunResult
from featurekit_spark.testing.chat import ChatServer, chat_server
from featurekit_spark.testing.embeddings import embedding_server
from featurekit_spark.testing.fakes import CountingLLM, MovingClock, ProductDBFake
from tests import shop
from tests.shop import Product, ProductIds, ShopContext

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}
WAYS = pytest.mark.parametrize("collect_mb", [256, 0], ids=["stages", "tables"])
# Set where only the driver sees it: workers have the environment in which Spark was started.
KEY = "FEATUREKIT_TEST_DRIVER_KEY"


@dataclass(frozen=True)
class ModelContext(ShopContext):
    llm: Any = None
    merchant_config: Mapping[str, Any] = field(default_factory=dict)


class Asked(FeatureBuilder[str]):
    """Runs on workers, and says in which process it did."""

    key, value, needs = shop.PRODUCT, pa.list_(pa.string()), ()
    deps = (LLMCompletion.on(prompt=shop.Title),)
    version = "1"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        return [str(inputs["LLMCompletion"]), str(os.getpid())]


class StaysHere(CountingLLM):
    """A model that cannot leave this process."""

    def __reduce__(self) -> Any:
        raise TypeError("it stays here")


def products(number: int, distinct: int) -> dict[tuple[str, str, str], Product]:
    return {("abt", "US", f"p{i}"): Product(f"lamp {i % distinct}", "acme", 1) for i in range(number)}


def run(spark: Any, cache: Any, llm: Any, executor: Any, collect_mb: int, **limits: Any) -> RunResult:
    context = ModelContext(shop.World(products=products(60, 40)), llm=llm)
    session = Session(
        replace(context, clock=MovingClock()),
        cache,
        spark=spark,
        limits=Limits(
            in_process_keys=0, batch_rows=16, partitions=2, collect_mb=collect_mb, executor=executor
        ),
    )
    budget = Budget(**limits) if limits else None
    return session.run(Asked.over(ProductIds), budget=budget, **ABT)


def entries(cache: DeltaCache) -> dict[str, tuple[Any, ...]]:
    rows = cache.history("LLMCompletion").to_pylist()
    assert len({row["entry_id"] for row in rows}) == len(rows)
    return {
        row["entry_id"]: tuple(
            row[name] for name in ("key", "config_hash", "inputs_hash", "value_hash", "value", "tokens")
        )
        for row in rows
    }


@contextmanager
def only_here(monkeypatch: pytest.MonkeyPatch, server: ChatServer) -> Iterator[OpenAIChat]:
    monkeypatch.setenv(KEY, "secret")
    server.delay_s = 0.01
    chat = OpenAIChat(server.url, "m", api_key_env=KEY, concurrency=8)
    yield chat
    aio.run(chat.aclose())


@WAYS
def test_no_worker_has_what_a_call_needs(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collect_mb: int
) -> None:
    caches = {name: DeltaCache(str(tmp_path / name)) for name in ("driver", "workers")}
    with chat_server(lambda prompt: f"1. like {prompt}") as server:
        with only_here(monkeypatch, server) as chat:
            result = run(spark, caches["driver"], chat, "driver", collect_mb)
            assert result.status == "ok", result.errors
            assert sorted(server.prompts) == sorted(f"lamp {i}" for i in range(40)), (
                "one call for equal prompts"
            )
            assert set(server.keys) == {"Bearer secret"}
            assert 1 < server.most_in_flight <= 8
            answers = entries(caches["driver"])
            processes = {value["value"][1] for value in rows_of(result)}
            assert str(os.getpid()) not in processes, "everything else is the workers' still"

            server.requests.clear()
            again = run(spark, caches["driver"], chat, "driver", collect_mb)
            assert again.unchanged and not server.requests
        # As workers, which have this variable, answer it.
        chat = OpenAIChat(server.url, "m", api_key_env="PATH", concurrency=8)
        result = run(spark, caches["workers"], chat, "workers", collect_mb)
        assert result.status == "ok"
        assert entries(caches["workers"]) == answers
        assert not list((tmp_path / "driver/journal").iterdir())


def rows_of(result: RunResult) -> list[dict[str, Any]]:
    found = result.table(Asked)
    rows: list[dict[str, Any]] = (found if isinstance(found, pa.Table) else found.toArrow()).to_pylist()
    return rows


@WAYS
def test_a_client_that_cannot_travel_needs_not(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    llm = StaysHere()
    with pytest.raises(ContextError, match="cannot travel"):
        run(spark, DeltaCache(str(tmp_path / "a")), llm, "workers", collect_mb)
    result = run(spark, DeltaCache(str(tmp_path / "b")), llm, "driver", collect_mb)
    assert result.status == "ok" and result.builders["LLMCompletion"].calls == 40
    assert sum(llm.calls.values()) == 40


@WAYS
def test_a_bad_prompt_is_one_error(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    llm = StaysHere(failures={"lamp 3": TimeoutError("no answer")})
    result = run(spark, DeltaCache(str(tmp_path)), llm, "driver", collect_mb)
    assert result.status == "partial"
    assert sorted(result.errors) == ['["abt","US","p3"]', '["abt","US","p43"]']


def test_a_budget_is_kept(spark: Any, tmp_path: Path) -> None:
    llm, cache = StaysHere(), DeltaCache(str(tmp_path))
    with pytest.raises(BudgetReachedError, match="after 7 calls"):
        run(spark, cache, llm, "driver", 256, max_calls=7)
    assert len(entries(cache)) == sum(llm.calls.values()) == 7
    assert run(spark, cache, llm, "driver", 256).builders["LLMCompletion"].calls == 33


class Appraiser(FeatureBuilder[str]):
    """One paid call for a group, of all its titles."""

    key, value, needs, paid = ("merchant", "market"), pa.string(), ("llm",), True
    deps = (shop.Title.over(ProductIds),)
    version = "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        answer = await context.llm.complete(f"{len(inputs['Title'].values)} titles")
        return Metered(answer.text, answer.tokens, answer.usd)


class Appraised(FeatureBuilder[str]):
    key, value, deps, version = shop.PRODUCT, pa.string(), (shop.Title, Appraiser), "1"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return f"{inputs['Title']} of {inputs['Appraiser']}"


@WAYS
def test_a_paid_gather(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    llm = StaysHere()
    session = Session(
        ModelContext(shop.World(products=products(10, 10)), llm=llm),
        DeltaCache(str(tmp_path)),
        spark=spark,
        limits=Limits(in_process_keys=0, partitions=2, collect_mb=collect_mb, executor="driver"),
    )
    result = session.run(Appraised.over(ProductIds), **ABT)
    assert result.status == "ok" and llm.calls == {"10 titles": 1}
    found = result.table(Appraised)
    values = (found if isinstance(found, pa.Table) else found.toArrow())["value"].to_pylist()
    assert sorted(values)[0] == "lamp 0 of 10 titles"


@WAYS
def test_hosted_embeddings(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collect_mb: int
) -> None:
    titles = [f"lamp number {i}" for i in range(40)]
    monkeypatch.setenv(KEY, "secret")
    with embedding_server() as server:
        embedder = OpenAIEmbedder(server.url, "m", dim=32, batch_size=16, requests=2, api_key_env=KEY)
        context = Context(
            product_db=ProductDBFake({f"p{i}": {"title": t} for i, t in enumerate([*titles, *titles])}),
            embedder=embedder,
            matrices=MatrixStore(tmp_path / "matrices"),
        )
        limits = Limits(in_process_keys=0, partitions=2, executor="driver", collect_mb=collect_mb)
        session = Session(context, DeltaCache(str(tmp_path / "cache")), spark=spark, limits=limits)
        result = session.run(hosted.SimilarProducts.over(CatalogIds), **ABT)
        aio.run(embedder.aclose())
        assert result.status == "ok", result.errors
        assert sorted(server.texts) == sorted(titles)
        assert result.builders["ProductEmbedding"].calls == 40
