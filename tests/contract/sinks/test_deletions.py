"""Products that left the catalog leave every output and the embedding DB, and come back as hits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark import Context, Session
from featurekit_spark.apps.product_recs import LLMLogic, ProductEmbeddingDB, ProductIds, SimilarProducts
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.embed import HashingEmbedder
from featurekit_spark.pipelines.logic import LogicOutcome, run_logic
from featurekit_spark.search import MatrixStore
from featurekit_spark.sinks import DeltaSink, RedisSink, Sink, read_recs
from featurekit_spark.sinks.redis import KEY_TEMPLATE_OTHER
from featurekit_spark.testing.fakes import CountingLLM, ProductDBFake

TITLES = {
    "a": "red desk lamp",
    "b": "blue desk lamp",
    "c": "green desk lamp",
    "d": "oak dining table",
    "e": "pine dining table",
    "twin": "red desk lamp",
}
BUILDERS = (LLMLogic, SimilarProducts)
Published = dict[tuple[str, str], list[str]]


@dataclass
class CountingEmbedder(HashingEmbedder):
    embedded: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__(32)

    def embed(self, texts: Any) -> Any:
        self.embedded.update(texts)
        return super().embed(texts)


class Shop:
    def __init__(self, cache: MemoryCache | DeltaCache, folder: Path, sink: Sink) -> None:
        self.products = ProductDBFake({name: {"title": title} for name, title in TITLES.items()})
        self.llm, self.embedder, self.sink = CountingLLM(), CountingEmbedder(), sink
        context = Context(
            product_db=self.products,
            llm=self.llm,
            embedder=self.embedder,
            matrices=MatrixStore(folder / "matrices"),
        )
        self.session = Session(context, cache, engine="local")

    def run(self) -> tuple[LogicOutcome, int, int]:
        """The outcome, how often the model was asked, and how many texts were embedded."""
        asked, embedded = self.llm.calls.total(), self.embedder.embedded.total()
        outcome = run_logic(
            self.session, BUILDERS, ProductIds, merchant="abt", market="US", sinks=[self.sink]
        )
        assert outcome.result.status == "ok"
        return outcome, self.llm.calls.total() - asked, self.embedder.embedded.total() - embedded

    def matrix(self) -> dict[str, list[float]]:
        """The embedding DB as single requests see it."""
        ref = self.session.get(ProductEmbeddingDB, ("abt", "US")).require()
        assert ref is not None
        matrix = self.session.context.matrices.open(ref)
        return dict(zip(matrix.ids, np.asarray(matrix.vectors).tolist(), strict=True))


@pytest.fixture
def shop(tmp_path: Path, sink: Sink) -> Shop:
    cache = DeltaCache(str(tmp_path / "cache")) if isinstance(sink, DeltaSink) else MemoryCache()
    return Shop(cache, tmp_path, sink)


@pytest.fixture
def read(sink: Sink, request: pytest.FixtureRequest) -> Callable[[], Published]:
    """What a consumer finds, by product and logic builder."""

    def from_delta() -> Published:
        assert isinstance(sink, DeltaSink)
        found = QueryBuilder().register("t", DeltaTable(sink.path)).execute("SELECT * FROM t").read_all()
        return {(row["product_id"], row["logic_builder"]): row["recs"] for row in pa.table(found).to_pylist()}

    def from_redis() -> Published:
        assert isinstance(sink, RedisSink)
        client, found = request.getfixturevalue("client"), {}
        for product in TITLES:
            for builder in BUILDERS:
                other = {} if builder is LLMLogic else {"template": KEY_TEMPLATE_OTHER}
                recs = read_recs(
                    client,
                    product,
                    merchant="abt",
                    market="US",
                    logic_builder=builder.name,
                    publish=sink.publish_as,
                    **other,
                )
                if recs is not None:
                    found[product, builder.name] = recs
        return found

    return from_delta if isinstance(sink, DeltaSink) else from_redis


def test_a_product_leaves_and_comes_back(shop: Shop, read: Callable[[], Published]) -> None:
    shop.run()
    before, whole = read(), shop.matrix()
    assert set(before) == {(name, builder.name) for name in TITLES for builder in BUILDERS}
    assert set(whole) == set(TITLES)
    assert sum("b" in recs for recs in before.values()) >= 4, "others do recommend it"

    title = shop.products.products.pop("b")
    gone, asked, embedded = shop.run()
    left = read()
    assert set(left) == {key for key in before if key[0] != "b"}
    assert not any("b" in recs for recs in left.values())
    assert all(recs for recs in left.values()), "others move up"
    assert shop.matrix() == {name: vector for name, vector in whole.items() if name != "b"}
    assert (asked, embedded) == (0, 0)
    assert gone.sinks[shop.sink.name]["status"] == "published"
    assert gone.result.keys == len(TITLES) - 1

    shop.products.products["b"] = title
    back, asked, embedded = shop.run()
    assert read() == before
    assert shop.matrix() == whole
    assert (asked, embedded) == (0, 0)
    computed = {name: counts.computed for name, counts in back.result.builders.items() if counts.computed}
    assert computed == {}, "all of it is a hit: the matrix and every list were there before"

    again, asked, embedded = shop.run()
    assert again.result.unchanged
    assert again.sinks[shop.sink.name]["status"] == "unchanged"
    assert (asked, embedded) == (0, 0)


def test_a_product_comes_back_under_another_id(shop: Shop) -> None:
    """What is keyed by content is paid for once, whoever needs it."""
    shop.run()
    shop.products.products["b2"] = shop.products.products.pop("b")
    outcome, asked, embedded = shop.run()
    assert (asked, embedded) == (0, 0)
    builders = outcome.result.builders
    assert builders["LLMCompletion"].computed == builders["ProductEmbedding"].computed == 0
    assert builders["ProductEmbeddingDB"].computed == 1
    assert set(shop.matrix()) == {*TITLES, "b2"} - {"b"}


def test_only_lists_that_held_it_are_made_anew(shop: Shop) -> None:
    """The matrix is another one, so each list is compared; those that stayed the same reach nobody."""
    for number in range(12):
        shop.products.products[f"x{number}"] = {"title": f"ceramic garden gnome number {number}"}
    shop.run()
    lists = {row["product_id"]: row["value"] for row in shop.session.cache.read(LLMLogic).to_pylist()}
    held = sum("d" in recs for product_id, recs in lists.items() if product_id != "d")
    assert 0 < held < len(lists) - 1
    shop.products.products.pop("d")
    outcome, asked, _ = shop.run()
    assert outcome.result.builders["LLMLogic"].computed == held
    assert asked == 0


def test_everything_leaves(shop: Shop, read: Callable[[], Published]) -> None:
    shop.run()
    before = read()
    kept = dict(shop.products.products)
    shop.products.products.clear()
    shop.products.products["other"] = {"title": None}
    shop.run()
    assert shop.matrix() == {}
    assert {key: recs for key, recs in read().items() if key[0] in TITLES} == {}
    shop.products.products.clear()
    shop.products.products.update(kept)
    _, asked, embedded = shop.run()
    assert (asked, embedded) == (0, 0)
    assert read() == before
