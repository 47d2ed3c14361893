"""One text in-process: the builder's own answers, from what stays open."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurekit_spark import Context, Controller, MemoryCache
from featurekit_spark.apps.product_recs import ProductEmbeddingDB, ProductEmbeddingSearcher
from featurekit_spark.apps.product_recs.text_search import TextSearch
from featurekit_spark.embed import HashingEmbedder
from featurekit_spark.errors import NotBuiltError
from featurekit_spark.search import MatrixStore
from featurekit_spark.search.choice import prepare_search
from featurekit_spark.search.options import Probes, SearchOptions
from featurekit_spark.testing.fakes import ProductDBFake

TITLES = {"p1": "Red desk lamp", "p2": "Blue desk lamp", "p3": "Oak table", "p4": None}
GROUP = ("shop", "US")
TEXTS = ["red lamp", "table of oak", "Blue desk lamp", "something else"]


class World:
    """A shop with a cache; titles may change between runs."""

    def __init__(self, folder: Path, **merchant_config: Any) -> None:
        self.folder, self.config, self.cache = folder, merchant_config, MemoryCache()
        self.titles: dict[str, Any] = dict(TITLES)
        self.options, self.embedder = SearchOptions(), HashingEmbedder(64)

    @property
    def context(self) -> Context:
        return Context(
            product_db=ProductDBFake({name: {"title": title} for name, title in self.titles.items()}),
            embedder=self.embedder,
            matrices=MatrixStore(self.folder / "matrices", options=self.options),
            merchant_config=self.config,
        )

    def build(self) -> None:
        Controller(self.context, self.cache).get(ProductEmbeddingDB, GROUP, gather=True).require()

    def service(self, **options: Any) -> TextSearch:
        return TextSearch(self.context, self.cache, merchant="shop", market="US", **options)

    def matrix(self) -> Any:
        return Controller(self.context, self.cache).get(ProductEmbeddingDB, GROUP).require()

    def by_builder(self, text: str) -> Any:
        return Controller(self.context, self.cache).get(ProductEmbeddingSearcher, (*GROUP, text)).value


@pytest.fixture(params=["float32", "float16", "int8"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    return World(tmp_path, top_k=2, storage=request.param)


def test_answers_are_the_builder_s(world: World) -> None:
    world.build()
    service = world.service()
    for text in TEXTS:
        assert service.nearest(text) == world.by_builder(text)
        assert len(service.nearest(text) or []) == 3
    assert service.nearest(" \t") is None
    assert [hit["product_id"] for hit in service.nearest("red lamp", 1) or []] == ["p1"]


@pytest.mark.parametrize("mode", ["partitioned", "ivf"])
def test_a_matrix_that_is_not_mapped_is_searched_as_the_builder_does(tmp_path: Path, mode: Any) -> None:
    world = World(tmp_path, top_k=2)
    world.options = SearchOptions(mode=mode, lists=2, nprobe=2)
    world.build()
    if mode == "ivf":
        prepare_search(world.context.matrices, world.matrix(), Probes(2, 2))
    service = world.service()
    for text in TEXTS:
        assert service.nearest(text) == world.by_builder(text)
    assert [hit["product_id"] for hit in service.nearest("red lamp", 1) or []] == ["p1"]


class Long(HashingEmbedder):
    """Vectors that are not of unit length: float32 does not hold 6 decimals of their scores."""

    def embed(self, texts: Any) -> Any:
        return super().embed(texts) * np.float32(31.7)


def test_scores_above_sixteen_are_the_same_in_every_mode(tmp_path: Path) -> None:
    found = {}
    for mode in ("broadcast", "partitioned"):
        world = World(tmp_path / mode, top_k=2)
        world.embedder = Long(64)
        world.options = SearchOptions(mode=mode)
        world.build()
        found[mode] = [world.by_builder(text) for text in TEXTS]
        assert [world.service().nearest(text) for text in TEXTS] == found[mode]
    assert found["broadcast"] == found["partitioned"]
    assert max(hit["score"] for hits in found["broadcast"] for hit in hits) > 16


def test_nothing_is_stored_for_a_text(world: World) -> None:
    world.build()
    world.service().nearest("red lamp")
    assert not len(world.cache.history("ProductEmbeddingSearcher"))


def test_without_a_matrix_there_is_no_answer(world: World) -> None:
    with pytest.raises(NotBuiltError, match="ProductEmbeddingDB was never built"):
        world.service().nearest("red lamp")


def test_a_new_matrix_is_taken_when_it_is_looked_up_again(world: World) -> None:
    world.build()
    now = [0.0]
    service = world.service(refresh_s=60, clock=lambda: now[0])
    before = service.nearest("red lamp")
    world.titles["p5"] = "red lamp"
    world.build()
    assert service.nearest("red lamp") == before
    now[0] = 60.0
    assert (service.nearest("red lamp") or [{}])[0] == {
        "product_id": "p5",
        "score": pytest.approx(1, abs=1e-3),
    }


def test_threads_share_it(world: World) -> None:
    world.build()
    service = world.service()
    expected, answers = [world.by_builder(text) for text in TEXTS], {}

    def ask(number: int) -> None:
        answers[number] = [service.nearest(text) for text in TEXTS]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found == expected for found in answers.values()) and len(answers) == 4
