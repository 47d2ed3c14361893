"""Runs whose matrix is searched part by part, on Spark and in-process, leave what runs that map it leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.apps.product_recs import ProductIds, SimilarProducts
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.context import Context
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.search import MatrixStore, SearchOptions
from featurekit_spark.search import matrix as module
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.testing.fakes import MovingClock
from tests.spark.test_table_mode import dump

pytestmark = pytest.mark.spark

BUILDERS = ("ProductEmbedding", "ProductEmbeddingDB", "ProductEmbeddingSearcher", "SimilarProducts")
WORDS = ["red", "blue", "big", "small", "lamp", "sofa", "chair", "desk", "oak", "steel"]
PARTITIONED = SearchOptions(mode="partitioned", part_mb=0)  # a block is a part


class Watched(MatrixStore):
    """Counts how often a driver was to search by jobs."""

    driven = 0

    def on_spark(self, session: Any) -> MatrixStore:
        Watched.driven += 1
        return super().on_spark(session)


class Shop:
    def __init__(self, spark: Any, folder: Path) -> None:
        self.spark, self.folder, self.clock = spark, folder, MovingClock()
        self.titles = {
            f"p{i:02}": f"{WORDS[i % 10]} {WORDS[i // 7 % 10]} {WORDS[i // 3 % 10]}" for i in range(60)
        }
        self.caches: dict[str, DeltaCache] = {}

    def run(self, cache: str, options: SearchOptions, *, engine: Any = "spark", **limits: Any) -> RunResult:
        with (self.folder / "abt_US.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("product_id", "title"), *self.titles.items()])
        context = Context(
            product_db=FileProductDB(self.folder, merchant="abt", market="US"),
            embedder=HashingEmbedder(16),
            matrices=Watched(self.folder / "matrices", options=options),
            clock=self.clock,
        )
        own = self.caches.setdefault(cache, DeltaCache(str(self.folder / cache)))
        session = Session(
            context,
            own,
            engine=engine,
            spark=self.spark if engine == "spark" else None,
            limits=Limits(in_process_keys=4, **limits),
        )
        self.clock.advance(seconds=1)
        Watched.driven = 0
        found = session.run(SimilarProducts.over(ProductIds), merchant="abt", market="US")
        self.clock.advance(seconds=-1)
        assert found.status == "ok", found.errors
        return found


@pytest.fixture
def abt(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 9 * 4 * 16)  # nine rows a block
    return Shop(spark, tmp_path)


def test_values_hashes_and_entries_are_the_same(abt: Shop) -> None:
    for changes in range(2):
        abt.run("mapped", SearchOptions(), engine="local")
        abt.run("parts", PARTITIONED)
        assert Watched.driven > 0
        abt.run("here", PARTITIONED, engine="local")
        assert Watched.driven == 0
        expected = dump(abt.caches["mapped"], *BUILDERS)
        assert len(expected[0]) > 120 + changes
        assert dump(abt.caches["parts"], *BUILDERS) == expected
        assert dump(abt.caches["here"], *BUILDERS) == expected
        abt.clock.advance(seconds=5)
        abt.titles |= {"p03": "green lamp", "p60": "steel lamp"}
        abt.titles.pop("p07", None)


@pytest.mark.parametrize("options", [PARTITIONED, SearchOptions(mode="ivf", lists=4, nprobe=4)])
def test_by_tables(abt: Shop, options: SearchOptions) -> None:
    abt.run("here", options, engine="local")
    result = abt.run("tables", options, collect_mb=0)
    found, expected = (dump(abt.caches[name], *BUILDERS)[0] for name in ("tables", "here"))
    result.execution.close()
    assert found == expected


def test_what_one_mode_made_is_a_hit_for_the_other(abt: Shop) -> None:
    abt.run("one", SearchOptions(), engine="local")
    abt.clock.advance(seconds=5)
    abt.titles["p03"] = "green lamp"
    abt.run("one", PARTITIONED)
    abt.clock.advance(seconds=5)
    assert abt.run("one", SearchOptions(), engine="local").unchanged


def test_inverted_lists_are_another_value(abt: Shop) -> None:
    exact = abt.run("one", SearchOptions(), engine="local")
    every = SearchOptions(mode="ivf", lists=5, nprobe=5)
    abt.clock.advance(seconds=5)
    result = abt.run("one", every)
    assert Watched.driven > 0
    assert result.builders["ProductEmbeddingSearcher"].hit == 0
    names = ["SimilarProducts"]
    assert result.execution.fingerprint(names) == exact.execution.fingerprint(
        names
    )  # all lists: the same answers
    abt.clock.advance(seconds=5)
    assert abt.run("one", every, engine="local").unchanged
    abt.clock.advance(seconds=5)
    few = abt.run("one", SearchOptions(mode="ivf", lists=5, nprobe=1), engine="local")
    assert few.builders["ProductEmbeddingSearcher"].computed > 0
