"""Another embedder: vectors of two models never meet, and the old matrix answers until the new one is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import Context, Session
from featurekit_spark.apps.product_recs import (
    LLMLogic,
    ProductEmbedding,
    ProductEmbeddingDB,
    ProductIds,
    SimilarProducts,
)
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.embed import HashingEmbedder
from featurekit_spark.errors import ContextError, NotBuiltError
from featurekit_spark.search import MatrixStore
from featurekit_spark.testing.fakes import CountingLLM, ProductDBFake

TITLES = ["red desk lamp", "blue desk lamp", "oak dining table", "pine dining table", "coffee cup"]
GROUP = {"merchant": "abt", "market": "US"}


class Fragile(HashingEmbedder):
    """Another model of the same dimension, whose process ends at its second call."""

    calls = 0

    def embed(self, texts: Sequence[str]) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().embed(texts)


@pytest.fixture(params=["memory", "delta"])
def sessions(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Session, Session]:
    """One with each embedder, over one cache."""
    cache = MemoryCache() if request.param == "memory" else DeltaCache(str(tmp_path / "cache"))
    old = Context(
        product_db=ProductDBFake({f"p{i}": {"title": title} for i, title in enumerate(TITLES)}),
        embedder=HashingEmbedder(32),
        matrices=MatrixStore(tmp_path / "matrices"),
        llm=CountingLLM(),
    )
    new = replace(old, embedder=Fragile(32, seed=1))
    return tuple(Session(context, cache, engine="local") for context in (old, new))  # type: ignore[return-value]


def ids(session: Session, product_id: str) -> list[str]:
    value = session.get(SimilarProducts, ("abt", "US", product_id)).require()
    assert value is not None
    return [hit["product_id"] for hit in value]


def test_queries_of_one_model_never_meet_the_matrix_of_another(sessions: tuple[Session, Session]) -> None:
    old, new = sessions
    old.run(SimilarProducts.over(ProductIds), **GROUP)
    with pytest.raises(NotBuiltError, match="ProductEmbeddingDB was never built .* with this config"):
        ids(new, "p0")


def test_the_old_matrix_answers_until_the_new_one_is_whole(sessions: tuple[Session, Session]) -> None:
    old, new = sessions
    targets = (SimilarProducts.over(ProductIds), LLMLogic.over(ProductIds))
    old.run(*targets, **GROUP)
    answers = [ids(old, f"p{i}") for i in range(5)]
    ref = old.get(ProductEmbeddingDB, ("abt", "US")).value
    asked = dict(old.context.llm.calls)

    new.limits = replace(new.limits, batch_rows=2)
    with pytest.raises(KeyboardInterrupt):
        new.run(*targets, **GROUP)
    with pytest.raises(NotBuiltError):
        ids(new, "p0")
    assert [ids(old, f"p{i}") for i in range(5)] == answers

    result = new.run(*targets, **GROUP)
    assert result.status == "ok"
    assert result.builders["ProductEmbedding"].hit == 2, "what the first attempt embedded is kept"
    whole = new.get(ProductEmbeddingDB, ("abt", "US")).value
    assert whole is not None and ref is not None
    assert whole["rows"] == 5 and whole["hash"] != ref["hash"]
    assert dict(old.context.llm.calls) == asked, "a new embedder asks the model nothing"

    # Both are there: whoever still has the old model goes on with the old matrix.
    assert old.get(ProductEmbeddingDB, ("abt", "US")).value == ref
    assert [ids(old, f"p{i}") for i in range(5)] == answers
    again = old.run(*targets, **GROUP)
    assert {name for name, counts in again.builders.items() if counts.computed} == set()


def test_a_config_that_names_another_model_is_refused(sessions: tuple[Session, Session]) -> None:
    """By hand, for what is not cached: the embedder is the context's."""
    old, _ = sessions
    for builder, key in ((ProductEmbedding, ("lamp",)), (ProductEmbeddingDB, ("abt", "US"))):
        with pytest.raises(ContextError, match="Give the context the embedder you mean"):
            old.get(builder, key, {builder: {"embedder": "some/other-model"}}, gather=True)
