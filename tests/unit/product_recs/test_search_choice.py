"""A searcher's config says how a matrix is searched, and the store's options only how an exact search is done."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from featurekit_spark import Context, Controller, MemoryCache
from featurekit_spark.apps.product_recs import (
    ProductEmbeddingDB,
    ProductEmbeddingSearcher,
    ProductIds,
    SimilarProducts,
    builders,
)
from featurekit_spark.apps.product_recs.text_search import TextSearch
from featurekit_spark.embed import HashingEmbedder
from featurekit_spark.errors import NotBuiltError
from featurekit_spark.pipelines.vectors import export_matrix
from featurekit_spark.search import MatrixStore, SearchOptions, choice, ivf
from featurekit_spark.search import matrix as module
from featurekit_spark.search.choice import (
    is_mapped,
    is_prepared,
    open_stored,
    prepare_search,
    queries_at_once,
    query_table,
)
from featurekit_spark.search.index import IndexSpec
from featurekit_spark.search.options import Mode, Probes
from featurekit_spark.search.stores import FlatVectorIndex
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import ProductDBFake

GROUP = ("shop", "US")
KEY = (*GROUP, "thing 5 colour")
FEW, EXACT = SearchOptions(mode="ivf", lists=20, nprobe=1), SearchOptions()
Searcher = ProductEmbeddingSearcher


class Shop:
    def __init__(self, folder: Path) -> None:
        self.path, self.cache = folder / "matrices", MemoryCache()
        self.titles = {f"p{i:03}": f"thing {i} of kind {i % 7} colour {i % 11}" for i in range(200)}

    def context(self, options: SearchOptions) -> Context:
        return Context(
            product_db=ProductDBFake({name: {"title": title} for name, title in self.titles.items()}),
            embedder=HashingEmbedder(64),
            matrices=MatrixStore(self.path, options=options),
        )

    def matrix(self) -> Any:
        found = Controller(self.context(EXACT), self.cache).get(ProductEmbeddingDB, GROUP, gather=True)
        return found.require()

    def lists(self, nlists: int | None = 20) -> None:
        prepare_search(MatrixStore(self.path), self.matrix(), Probes(1, nlists))

    def found(self, options: SearchOptions, config: Any = None, *, cache: Any = None) -> Any:
        configs = None if config is None else {Searcher: config}
        return Controller(self.context(options), cache or MemoryCache()).get(
            Searcher, KEY, configs, gather=True
        )


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_whole_config_of_an_exact_search_has_exact_answers(shop: Shop) -> None:
    shop.lists()
    exact = shop.found(EXACT).require()
    assert shop.found(FEW).require() != exact  # or nothing would be tested
    own = shop.found(FEW, Searcher.Config(top_k=10), cache=shop.cache)
    assert own.require() == exact
    hit = shop.found(EXACT, cache=shop.cache)
    assert hit.origin == "hit" and hit.require() == exact


def test_a_whole_config_of_an_approximate_search_is_followed(shop: Shop) -> None:
    shop.lists()
    exact, few = shop.found(EXACT).require(), shop.found(FEW).require()
    for options in (FEW, EXACT, SearchOptions(mode="partitioned")):
        assert shop.found(options, Searcher.Approximate(10, 20, 20)).require() == exact
        assert shop.found(options, Searcher.Approximate(10, 20, 1)).require() == few
    with pytest.raises(NotBuiltError, match="inverted lists"):  # other ones
        shop.found(FEW, Searcher.Approximate(10, 7, 1))


@pytest.mark.parametrize("override", [False, True])
def test_a_run_makes_the_lists_of_the_config(shop: Shop, override: bool) -> None:
    configs = {Searcher: Searcher.Approximate(10, 20, 1)} if override else None
    session = Session(shop.context(EXACT if override else FEW), shop.cache, engine="local")
    done = session.run(SimilarProducts.over(ProductIds), merchant="shop", market="US", configs=configs)
    assert done.status == "ok" and is_prepared(MatrixStore(shop.path), shop.matrix(), Probes(1, 20))


def test_changed_matrices_are_searched_as_the_config_says(shop: Shop) -> None:
    """What follows an earlier list does, too."""
    shop.lists()
    exact = Searcher.Config(top_k=10)
    shop.found(FEW, exact, cache=shop.cache)
    shop.titles["p999"] = "thing 5 colour"
    shop.lists()
    again = shop.found(FEW, exact, cache=shop.cache)
    assert again.require() == shop.found(EXACT).require() and again.require()[0]["product_id"] == "p999"


def test_requests_train_nothing(shop: Shop) -> None:
    shop.matrix()
    version = DeltaTable(shop.path).version()
    search = TextSearch(shop.context(FEW), shop.cache, merchant="shop", market="US")
    with pytest.raises(NotBuiltError, match="inverted lists"):
        search.nearest("thing 5")
    with pytest.raises(NotBuiltError, match="inverted lists"):
        shop.found(FEW, cache=shop.cache)
    assert DeltaTable(shop.path).version() == version
    shop.lists()
    assert search.nearest("thing 5")


def test_the_matrix_before_is_searched_until_the_lists_are_there(shop: Shop) -> None:
    shop.lists()
    now = [0.0]
    search = TextSearch(shop.context(FEW), shop.cache, merchant="shop", market="US", clock=lambda: now[0])
    before = search.nearest("new lamp")
    shop.titles["p999"] = "new lamp"
    shop.matrix()
    now[0] = 61.0
    assert search.nearest("new lamp") == before
    shop.lists()
    assert search.nearest("new lamp") == before
    now[0] = 122.0
    assert (search.nearest("new lamp") or [{}])[0]["product_id"] == "p999"


def test_lists_are_made_once_by_whoever_asks_at_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, trained, train = shop.matrix(), [], ivf.train
    started = threading.Barrier(4)

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(1)
        return train(*args, **options)

    def prepare() -> None:
        started.wait()
        prepare_search(MatrixStore(shop.path), ref, Probes(1, 20))

    monkeypatch.setattr(ivf, "train", counted)
    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert not list(shop.path.parent.glob(".featurekit-index-*"))


def test_a_matrix_counts_as_many_bytes_as_are_stored(tmp_path: Path) -> None:
    store = MatrixStore(tmp_path / "matrices", options=SearchOptions(memory_mb=1))
    vectors = np.random.default_rng(1).standard_normal((3000, 128), dtype=np.float32)  # 1.5 MB as float32
    ids = [f"p{i:04}" for i in range(3000)]
    fits = {
        storage: is_mapped(store, store.put(ids, vectors, storage=storage)) for storage in ("float32", "int8")
    }
    assert fits == {"float32": False, "int8": True}


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_what_is_not_mapped_is_exported_part_by_part(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 40 * 4 * 8)
    vectors = np.random.default_rng(1).standard_normal((1000, 8), dtype=np.float32)
    ids = [f"p{i:04}" for i in range(1000)]
    done = {}
    modes: tuple[Mode, ...] = ("broadcast", "partitioned")
    for mode in modes:
        options = SearchOptions(mode=mode, part_mb=0)
        store = MatrixStore(tmp_path / "matrices", options=options)
        opened = open_stored(store, store.put(ids, vectors, storage=storage))
        assert isinstance(opened, module.Matrix) == (mode == "broadcast")
        index = FlatVectorIndex(IndexSpec(8))
        done[mode] = export_matrix(index, opened, ProductDBFake({}), dimensions={}, batch=70).content  # type: ignore[arg-type]
        assert [hit.id for hit in index.search(opened.vectors[5:6], 1)[0]] == ["p0005"]
    assert done["broadcast"] == done["partitioned"]
    assert opened.vectors[990:2000].shape == (10, 8) and opened.vectors[5:5].shape == (0, 8)


def test_a_call_is_given_as_many_queries_as_it_bounds(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    search = choice.search_stored

    def counted(store: Any, ref: Any, queries: Any, k: int, **options: Any) -> Any:
        asked.append(len(queries))
        return search(store, ref, queries, k, **options)

    monkeypatch.setattr(builders, "search_stored", counted)
    monkeypatch.setattr(choice, "_QUERY_BYTES", 90 * 4 * 64)
    session = Session(shop.context(SearchOptions(mode="partitioned")), shop.cache, engine="local")
    session.run(SimilarProducts.over(ProductIds), merchant="shop", market="US")
    assert max(asked) == 90 and sum(asked) == 200


def test_queries_are_bounded_by_their_bytes() -> None:
    assert queries_at_once({"hash": "", "rows": 9, "dim": 3072, "path": ""}) * 3072 * 4 <= 256 << 20
    queries = np.arange(70, dtype=np.float32).reshape(10, 7)
    table = query_table(queries, chunk_bytes=3 * 4 * 7)
    assert table["vector"].num_chunks == 4 and table["key"].to_pylist() == list(range(10))
    assert b"".join(table["vector"].to_pylist()) == queries.tobytes()
    assert query_table(queries[:0]).num_rows == 0
