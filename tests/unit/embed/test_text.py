"""The builders of text embeddings: local ones are computed, hosted ones are paid for, text by text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import Budget, Context, Controller, DeltaCache, MemoryCache, Session
from featurekit_spark.apps.product_recs import LLMLogic, ProductIds, SimilarProducts, builders, hosted
from featurekit_spark.builder import bind
from featurekit_spark.embed import HashingEmbedder, HostedTextEmbedding, OpenAIEmbedder, TextEmbedding
from featurekit_spark.errors import BudgetReachedError, BuildError, ContextError
from featurekit_spark.graph import Graph
from featurekit_spark.paid.prices import Price
from featurekit_spark.testing.embeddings import EmbeddingServer
from featurekit_spark.testing.fakes import CountingLLM, ProductDBFake

GROUP = {"merchant": "abt", "market": "US"}
TITLES = ["red desk lamp", "blue desk lamp", "oak dining table", "pine dining table", "coffee cup"]
Make = Callable[..., OpenAIEmbedder]
IN_BOTH = [
    "ProductEmbedding",
    "ProductEmbeddingDB",
    "ProductEmbeddingSearcher",
    "LLMLogic",
    "SimilarProducts",
]


def context(embedder: Any, titles: list[str] = TITLES) -> Context:
    return Context(
        product_db=ProductDBFake({f"p{i}": {"title": title} for i, title in enumerate(titles)}),
        embedder=embedder,
        llm=CountingLLM(),
    )


def local_session(made: Context, cache: Any = None) -> Session:
    return Session(made, cache or MemoryCache(), engine="local")


def test_the_identities_of_local_embeddings_are_pinned() -> None:
    """They are in users' caches: whatever is done for other embedders, these must not be computed again."""
    pinned = {
        "TextEmbedding": "00db7240eb6f323685081d6165a281b7",
        "ProductEmbedding": "da981c40247537f44ab5329a1985facf",
        "ProductEmbeddingDB": "98c73dd910a0fef0696ff7b4ffc681a5",
        "ProductEmbeddingSearcher": "a479efb6bf33f5a450a5b2873b9c466f",
        "LLMLogic": "dcbc171b2a534cccc80f4f58ca8b7bd6",
        "SimilarProducts": "49c2fe279e18df61025a5768cd84960b",
    }
    found = [TextEmbedding, *(getattr(builders, name) for name in IN_BOTH)]
    assert {builder.name: bind(builder, Context()).config_hash for builder in found} == pinned
    assert not TextEmbedding.paid and HostedTextEmbedding.paid


def test_hosted_builders_are_the_local_ones_but_for_who_pays() -> None:
    for name in IN_BOTH:
        one, other = getattr(builders, name), getattr(hosted, name)
        assert (one.name, one.key, one.value) == (other.name, other.key, other.value)
        assert bind(one, Context()).config_hash == bind(other, Context()).config_hash
    for target in ("LLMLogic", "SimilarProducts"):
        one, other = (Graph([getattr(module, target)]) for module in (builders, hosted))
        assert [b.name for b in one] == [b.name for b in other]
        assert {b.name: [i.name for i in one.inputs_of(b)] for b in one} == {
            b.name: [i.name for i in other.inputs_of(b)] for b in other
        }
        assert {b.name for b in other if b.paid} - {b.name for b in one if b.paid} == {"ProductEmbedding"}


def test_each_has_its_own_kind_of_embedder(by_server: Make) -> None:
    hosted_embedder = by_server()
    with pytest.raises(ContextError, match="TextEmbedding counts no calls, .* Build on HostedTextEmbedding"):
        Controller(Context(embedder=hosted_embedder), MemoryCache()).get(TextEmbedding, ("lamp",))
    with pytest.raises(ContextError, match="is not hosted. Build on TextEmbedding"):
        Controller(Context(embedder=HashingEmbedder(8)), MemoryCache()).get(HostedTextEmbedding, ("lamp",))
    with pytest.raises(ContextError, match="Give the context the embedder you mean"):
        Controller(Context(embedder=hosted_embedder), MemoryCache()).get(
            HostedTextEmbedding, ("lamp",), {HostedTextEmbedding: {"embedder": "another"}}
        )


def test_hosted_and_local_recommend_the_same(server: EmbeddingServer, by_server: Make) -> None:
    """The server's vectors are the hashing embedder's."""
    paid, local = context(by_server(dim=32)), context(HashingEmbedder(32))
    cache = MemoryCache()
    targets = (hosted.LLMLogic.over(ProductIds), hosted.SimilarProducts.over(ProductIds))
    session = local_session(paid, cache)
    result = session.run(*targets, **GROUP)
    expected = local_session(local).run(LLMLogic.over(ProductIds), SimilarProducts.over(ProductIds), **GROUP)
    assert result.status == expected.status == "ok"
    assert result.values("LLMLogic") == expected.values("LLMLogic")
    assert result.values("SimilarProducts") == expected.values("SimilarProducts")

    prompts = [f"get recommendations for {title}" for title in TITLES]
    assert sorted(server.texts) == sorted([*TITLES, *prompts]), "each text once"
    assert len(server.requests) == 2, "texts that are needed together are asked for together"
    counts = result.builders["ProductEmbedding"]
    assert (counts.computed, counts.calls) == (10, 10)
    assert counts.tokens == sum(len(text) // 4 for text in server.texts)
    assert "paid stage   ProductEmbedding" in session.explain(*targets, **GROUP)

    again = local_session(paid, cache).run(*targets, **GROUP)
    assert again.builders["ProductEmbedding"].calls == 0 and len(server.requests) == 2


def test_local_and_hosted_entries_lie_side_by_side(by_server: Make) -> None:
    cache = MemoryCache()
    paid, local = context(by_server(dim=32)), context(HashingEmbedder(32))
    local_session(local, cache).run(SimilarProducts.over(ProductIds), **GROUP)
    there = local_session(paid, cache).run(hosted.SimilarProducts.over(ProductIds), **GROUP)
    assert there.builders["ProductEmbedding"].calls == 5, "another model's vectors are no answer"
    back = local_session(local, cache).run(SimilarProducts.over(ProductIds), **GROUP)
    assert {name for name, counts in back.builders.items() if counts.computed} == set()


def test_a_budget_counts_texts(server: EmbeddingServer, by_server: Make) -> None:
    cache, target = MemoryCache(), hosted.SimilarProducts.over(ProductIds)
    made = context(by_server(dim=32))
    with pytest.raises(BudgetReachedError, match="max_calls=3"):
        local_session(made, cache).run(target, budget=Budget(max_calls=3), **GROUP)
    assert len(server.texts) == 3
    done = local_session(made, cache).run(target, budget=Budget(max_calls=3), **GROUP)
    assert done.status == "ok" and sorted(server.texts) == sorted(TITLES), "the other two, and none twice"


def test_a_budget_in_money_is_kept(server: EmbeddingServer, by_server: Make) -> None:
    cache, target = MemoryCache(), hosted.SimilarProducts.over(ProductIds)
    made = context(by_server(dim=32, price=Price.of(1_000_000)), ["lamplamp", "sofasofa", "desktops"])
    with pytest.raises(BudgetReachedError, match="max_usd=4"):  # 2 tokens each, a dollar a token
        local_session(made, cache).run(target, budget=Budget(max_usd=4), **GROUP)
    assert len(server.texts) == 2


def test_keeping_answers_as_they_come_leaves_requests_whole(
    server: EmbeddingServer, by_server: Make, tmp_path: Path
) -> None:
    """The journal of a cache on disk holds calls back until answers are written; requests must not become small."""
    titles = [f"lamp number {i}" for i in range(64)]
    session = local_session(
        context(by_server(dim=32, batch_size=16), titles), DeltaCache(str(tmp_path / "cache"))
    )
    assert session.run(hosted.SimilarProducts.over(ProductIds), **GROUP).status == "ok"
    assert [len(request["input"]) for request in server.requests] == [16] * 4


def test_a_text_that_is_refused_is_its_own_keys_error(server: EmbeddingServer, by_server: Make) -> None:
    server.refuses = lambda text: "table" in text
    cache, target = MemoryCache(), hosted.SimilarProducts.over(ProductIds)
    result = local_session(context(by_server(dim=32)), cache).run(target, **GROUP)
    assert result.status == "partial" and result.builders["ProductEmbedding"].error == 2
    values = result.values("SimilarProducts")
    assert [hit["product_id"] for hit in values["abt", "US", "p0"]] == ["p1", "p4"]
    server.refuses = lambda text: False
    before = len(server.texts)
    session = local_session(context(by_server(dim=32)), cache)
    assert session.run(target, **GROUP).status == "partial"
    assert server.texts[before:] == [], "a refused text is not asked again by every run"
    assert session.run(target, retry_errors="terminal", **GROUP).status == "ok"
    assert sorted(server.texts[before:]) == ["oak dining table", "pine dining table"], "only what failed"


def test_a_text_that_was_not_tried_alone_is_not_to_blame(server: EmbeddingServer, by_server: Make) -> None:
    server.refuses = lambda text: True
    cache, target = MemoryCache(), hosted.SimilarProducts.over(ProductIds)
    titles = [f"lamp number {i}" for i in range(64)]
    first = local_session(context(by_server(dim=32, batch_size=64), titles), cache).run(target, **GROUP)
    counts = first.builders["ProductEmbedding"]
    assert (counts.error, counts.terminal, counts.retryable) == (64, 16, 48), (
        "sixteen in a row, and the rest unasked"
    )
    server.refuses = lambda text: False
    again = local_session(context(by_server(dim=32, batch_size=64), titles), cache).run(target, **GROUP)
    counts = again.builders["ProductEmbedding"]
    assert (counts.computed, counts.remembered) == (48, 16)


def test_single_requests_pay_and_keep_too(server: EmbeddingServer, by_server: Make) -> None:
    controller = Controller(Context(embedder=by_server()), MemoryCache())
    first, second = (controller.get(HostedTextEmbedding, ("lamp",)) for _ in range(2))
    assert (first.origin, second.origin) == ("computed", "hit")
    assert server.texts == ["lamp"]
    server.refuses = lambda text: True
    with pytest.raises(BuildError, match="status 400"):
        controller.get(HostedTextEmbedding, ("sofa",)).require()
