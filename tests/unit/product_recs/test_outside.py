"""A search in an index outside depends on what an export left there, and on nothing less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from featurekit_spark.apps.product_recs import hosted
from featurekit_spark.apps.product_recs.outside import IndexSearcher, SimilarInIndex
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.context import Context
from featurekit_spark.controller import Controller
from featurekit_spark.embed import HashingEmbedder, OpenAIEmbedder
from featurekit_spark.errors import ContextError, ServiceError
from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.index import IndexSpec
from featurekit_spark.search.stores import FlatVectorIndex
from featurekit_spark.testing.embeddings import embedding_server
from featurekit_spark.testing.fakes import ProductDBFake

TITLES = {"p1": "red table lamp", "p2": "blue table lamp", "p3": "espresso machine"}
EMBEDDER = HashingEmbedder(dim=64)


@pytest.fixture
def context() -> Context:
    index = FlatVectorIndex(IndexSpec(64, source=EMBEDDER.identity))
    export_vectors(index, list(TITLES), np.asarray(EMBEDDER.embed(list(TITLES.values()))))
    return Context(embedder=EMBEDDER, merchant_config={"top_k": 1}, vector_index=index)


def found(context: Context, cache: MemoryCache) -> Any:
    return Controller(context, cache).get(IndexSearcher, ("abt", "US", "red table lamp"))


def test_an_answer_is_kept_until_the_index_changes(context: Context) -> None:
    cache = MemoryCache()
    first = found(context, cache)
    assert [hit["product_id"] for hit in first.require()] == ["p1", "p2"]
    assert found(context, cache).ts == first.ts
    titles = {**TITLES, "p0": "red table lamp"}
    export_vectors(context.vector_index, list(titles), np.asarray(EMBEDDER.embed(list(titles.values()))))
    assert [hit["product_id"] for hit in found(context, cache).require()] == ["p0", "p1"]


def test_what_is_not_whole_is_refused(context: Context) -> None:
    cache = MemoryCache()
    context.vector_index.delete(["p1"])
    with pytest.raises(ContextError, match="not whole"):
        found(context, cache)
    for none in (None, FlatVectorIndex(IndexSpec(64, source=EMBEDDER.identity))):
        with pytest.raises(ContextError, match="vectors export"):
            found(replace(context, vector_index=none), cache)


def test_vectors_of_another_embedder_are_not_searched(context: Context) -> None:
    with pytest.raises(ContextError, match="export to it anew"):
        found(replace(context, embedder=HashingEmbedder(dim=32)), MemoryCache())


def test_an_index_that_changes_meanwhile_gives_no_answer(context: Context) -> None:
    index = context.vector_index
    search = index.search

    class Changing(FlatVectorIndex):
        def search(self, *given: Any, **more: Any) -> Any:
            answer = search(*given, **more)
            self.delete(["p2"])
            return answer

    changing = Changing(index.spec)
    changing.store = index.store
    cache = MemoryCache()
    answer = found(replace(context, vector_index=changing), cache)
    assert answer.status == "error" and "was changed while it was searched" in answer.error
    assert ServiceError.retryable


def test_a_hosted_embedder_is_asked_once_for_each_text(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builders have hosted ones beside them, which find the same and count what was paid."""
    monkeypatch.setenv("TEST_EMBED_KEY", "any")
    local = replace(
        context, product_db=ProductDBFake({name: {"title": title} for name, title in TITLES.items()})
    )
    keys = [("abt", "US", name) for name in TITLES]
    wanted = [each.require() for each in Controller(local, MemoryCache()).get_many(SimilarInIndex, keys)]
    with embedding_server() as server:
        embedder = OpenAIEmbedder(server.url, "m", dim=64, api_key_env="TEST_EMBED_KEY")
        index = FlatVectorIndex(IndexSpec(64, source=embedder.identity))
        export_vectors(index, list(TITLES), np.asarray(EMBEDDER.embed(list(TITLES.values()))))
        paid = Controller(replace(local, embedder=embedder, vector_index=index), MemoryCache())
        with pytest.raises(ContextError, match="counts no calls"):
            paid.get(IndexSearcher, ("abt", "US", "red table lamp"))
        for _ in range(2):
            found = [each.require() for each in paid.get_many(hosted.SimilarInIndex, keys)]
            assert found == wanted
        assert sorted(server.texts) == sorted(TITLES.values())
