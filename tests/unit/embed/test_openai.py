"""Hosted embeddings against a real server: what is asked, whose vector is whose, what failures mean, who pays what."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest

from featurekit_spark import aio
from featurekit_spark.embed import Embedded, HashingEmbedder, HostedEmbedder, OpenAIEmbedder, is_hosted
from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.paid.limits import LocalLimiter, Rates
from featurekit_spark.paid.prices import Price
from featurekit_spark.testing.embeddings import EmbeddingServer

Make = Callable[..., OpenAIEmbedder]


def asked(embedder: OpenAIEmbedder, *texts: str) -> list[Any]:
    """Answers or exceptions, all texts asked at once."""

    async def run() -> list[Any]:
        return await asyncio.gather(*map(embedder.embed_one, texts), return_exceptions=True)

    return aio.run(run())


def one(embedder: OpenAIEmbedder, text: str) -> Embedded:
    return aio.run(embedder.embed_one(text))


def test_what_is_sent_and_what_comes_back(server: EmbeddingServer, by_server: Make) -> None:
    embedder = by_server(prefix="query: ")
    assert isinstance(embedder, HostedEmbedder) and is_hosted(embedder) and not is_hosted(HashingEmbedder())
    made = asked(embedder, "red lamp", "oak table")
    assert server.requests == [
        {
            "input": ["query: red lamp", "query: oak table"],
            "model": "m",
            "dimensions": 32,
            "encoding_format": "base64",
        }
    ]
    assert server.keys == ["Bearer sk-secret"]
    expected = HashingEmbedder(32).embed(["query: red lamp", "query: oak table"])
    np.testing.assert_allclose(np.stack([found.vector for found in made]), expected, atol=1e-6)


def test_the_dimension_may_be_the_models_own(server: EmbeddingServer, by_server: Make) -> None:
    server.dim = 32
    one(by_server(send_dim=False), "a lamp")
    assert "dimensions" not in server.requests[0]
    server.dim = 48
    with pytest.raises(
        ContextError, match="gives vectors of 48 dimensions, embedder.dim is 32: set it to 48"
    ):
        one(by_server(send_dim=False), "a lamp")


def test_vectors_find_their_texts_whatever_order_they_come_in(
    server: EmbeddingServer, by_server: Make
) -> None:
    texts = [f"lamp number {i}" for i in range(40)]
    expected = by_server().embed(texts)
    server.changed = lambda body: {**body, "data": body["data"][::-1]}
    assert by_server(batch_size=7).embed(texts).tobytes() == expected.tobytes()
    assert max(len(request["input"]) for request in server.requests[1:]) == 7


def test_a_server_that_sends_lists_when_asked_for_base64(server: EmbeddingServer, by_server: Make) -> None:
    expected = by_server().embed(["a lamp"])
    server.changed = lambda body: server.answer({**server.requests[-1], "encoding_format": "float"})[2]
    assert by_server().embed(["a lamp"]).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: {**body, "data": body["data"][:1]},
        lambda body: {**body, "data": [*body["data"], body["data"][0]]},
        lambda body: {**body, "data": [{**item, "index": 0} for item in body["data"]]},
        lambda body: {**body, "data": [{**item, "embedding": "%%"} for item in body["data"]]},
        lambda body: {**body, "data": [{**item, "embedding": "AAAA"} for item in body["data"]]},
        lambda body: {**body, "data": [{**item, "embedding": [[1.0]]} for item in body["data"]]},
        lambda body: {**body, "data": [{**item, "embedding": None} for item in body["data"]]},
        lambda body: {"object": "list"},
        lambda body: b"{malformed",
    ],
)
def test_an_answer_that_is_none_is_asked_for_again(
    server: EmbeddingServer, by_server: Make, spoil: Callable[[Any], Any]
) -> None:
    left = [spoil, lambda body: body]
    server.changed = lambda body: left.pop(0)(body)
    vectors = by_server().embed(["red lamp", "oak table"])
    assert len(server.requests) == 2
    np.testing.assert_allclose(vectors, HashingEmbedder(32).embed(["red lamp", "oak table"]), atol=1e-6)
    server.changed = spoil
    for found in asked(by_server(), "red lamp", "oak table"):
        assert isinstance(found, ServiceError) and "attempt 3 of 3" in str(found)


def test_a_vector_without_direction_is_its_own_texts_failure(
    server: EmbeddingServer, by_server: Make
) -> None:
    def spoiled(body: dict[str, Any]) -> dict[str, Any]:
        body["data"][1]["embedding"] = [0.0] * 32
        body["data"][2]["embedding"] = [1e999] + [1.0] * 31
        return body

    server.changed = spoiled
    first, zero, infinite, last = asked(by_server(encoding="float"), "red lamp", "blue", "green", "oak table")
    assert isinstance(first, Embedded) and isinstance(last, Embedded)
    for failed in (zero, infinite):
        assert isinstance(failed, BuildError) and "no direction" in str(failed) and failed.tokens == 1


def test_tokens_are_split_over_the_texts(server: EmbeddingServer, by_server: Make) -> None:
    texts = ["a" * 40, "b" * 20, "c" * 4]
    made = asked(by_server(price=Price.of(0.02)), *texts)
    assert [found.tokens for found in made] == [10, 5, 1]
    assert [found.usd for found in made] == [2e-7, 1e-7, 2e-8]
    assert one(by_server(), "a").usd is None
    server.changed = lambda body: {**body, "usage": None}
    assert [found.tokens for found in asked(by_server(), *texts)] == [10, 5, 1], "counted here"


def test_what_a_text_will_cost_is_told_without_asking(server: EmbeddingServer, by_server: Make) -> None:
    expected = by_server(price=Price.of(0.02)).expected_cost("a" * 40)
    assert (expected.tokens, expected.usd, expected.priced) == (10, 2e-7, True)
    assert not by_server().expected_cost("a").priced
    assert server.requests == []


def test_a_text_that_is_refused_costs_no_other_its_vector(server: EmbeddingServer, by_server: Make) -> None:
    server.refuses = lambda text: text.startswith("bad")
    texts = [f"bad {i}" if i in (3, 50) else f"lamp {i}" for i in range(64)]
    found = asked(by_server(), *texts)
    for text, answer in zip(texts, found, strict=True):
        if text.startswith("bad"):
            assert isinstance(answer, BuildError) and "status 400: " in str(answer)
        else:
            assert isinstance(answer, Embedded)
    assert len(server.requests) <= 1 + 2 * 2 * 6, "halved, not asked one by one"


def test_a_server_that_refuses_everything_is_not_asked_for_each_text(
    server: EmbeddingServer, by_server: Make
) -> None:
    server.refuses = lambda text: True
    found = asked(by_server(batch_size=128), *(f"lamp {i}" for i in range(128)))
    assert all(isinstance(answer, BuildError) for answer in found) and len(found) == 128
    assert len(server.requests) < 64


@pytest.mark.parametrize(
    ("status", "code", "kind", "requests"),
    [
        (401, "invalid_api_key", BuildError, 1),
        (404, "model_not_found", BuildError, 1),
        (429, "insufficient_quota", BudgetError, 1),
        (402, "", BudgetError, 1),
        (429, "", ServiceError, 3),
        (503, "", ServiceError, 3),
    ],
)
def test_errors_say_whether_trying_again_helps(
    server: EmbeddingServer,
    by_server: Make,
    status: int,
    code: str,
    kind: type[FeaturekitError],
    requests: int,
) -> None:
    for _ in range(requests):
        server.fails(status, code)
    found = asked(by_server(), "red lamp", "oak table")
    for answer in found:
        assert type(answer) is kind and f"m at {server.url}: " in str(answer) and str(status) in str(answer)
    assert len(server.requests) == requests


def test_what_may_pass_is_tried_again(server: EmbeddingServer, by_server: Make) -> None:
    server.fails(503).fails(429, retry_after="0.3")
    start = time.monotonic()
    assert isinstance(one(by_server(), "lamp"), Embedded)
    assert time.monotonic() - start >= 0.3 and len(server.requests) == 3


def test_a_server_that_hangs_or_is_not_there(server: EmbeddingServer, by_server: Make) -> None:
    server.delay_s = 1.0
    with pytest.raises(ServiceError, match="no answer in time"):
        one(by_server(policy={"attempts": 1, "timeout_s": 0.1}), "lamp")
    with pytest.raises(ServiceError, match="attempt 2 of 2"):
        one(by_server(url="http://127.0.0.1:9/v1", policy={"attempts": 2}), "lamp")


def test_requests_in_flight_are_bounded(server: EmbeddingServer, by_server: Make) -> None:
    server.delay_s = 0.03
    by_server(batch_size=1, requests=3).embed([f"lamp {i}" for i in range(15)])
    assert len(server.requests) == 15 and server.most_in_flight <= 3


def test_tasks_share_what_is_in_flight(server: EmbeddingServer, by_server: Make) -> None:
    embedder = by_server(batch_size=16, requests=8, limiter=LocalLimiter(Rates(requests_per_minute=60)))
    part = embedder.divided(3)
    assert (embedder.concurrency, part.requests, part.concurrency) == (128, 2, 32)
    assert part.limiter == LocalLimiter(Rates(requests_per_minute=20))
    assert part.identity == embedder.identity and embedder.divided(100).requests == 1


def test_requests_keep_to_the_rate(server: EmbeddingServer, by_server: Make) -> None:
    limiter = LocalLimiter(Rates(requests_per_minute=1200, burst_s=0.05))
    start = time.monotonic()
    by_server(batch_size=1, limiter=limiter).embed([f"lamp {i}" for i in range(11)])
    assert time.monotonic() - start >= 0.45, "20 a second, of which one at once"


def test_texts_that_are_long_together_go_apart(server: EmbeddingServer, by_server: Make) -> None:
    by_server().embed(["lamp " * 10_000 for _ in range(9)])
    # Requests are made side by side, and arrive in any order.
    assert sorted(len(request["input"]) for request in server.requests) == [1, 4, 4]


def test_the_key_stays_in_the_environment(
    server: EmbeddingServer, by_server: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = by_server()
    one(embedder, "lamp")
    assert "sk-secret" not in repr(embedder)
    for dump in (pickle.dumps(embedder), cloudpickle.dumps(embedder)):
        assert b"sk-secret" not in dump
    monkeypatch.delenv("TEST_EMBED_KEY")
    with pytest.raises(ContextError, match="TEST_EMBED_KEY is not set"):
        one(by_server(), "lamp")


def test_what_blames_the_model_is_not_looked_for_in_the_texts(
    server: EmbeddingServer, by_server: Make
) -> None:
    server.fails(400, "model_not_found")
    for answer in asked(by_server(), "red lamp", "oak table"):
        assert type(answer) is BuildError and not answer.blames_request
    assert len(server.requests) == 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="base_url names a user") as told:
        OpenAIEmbedder("http://me:s3cret@127.0.0.1:9/v1", "m", dim=3)
    assert "s3cret" not in str(told.value)
    with pytest.raises(UsageError, match="must be positive"):
        OpenAIEmbedder("http://127.0.0.1:9/v1", "m", dim=0)


def test_each_text_has_its_share_of_what_failed_attempts_cost(
    server: EmbeddingServer, by_server: Make
) -> None:
    texts = ["a red lamp on a table", "oak"]
    server.then(200, {"data": [], "usage": {"prompt_tokens": 48}}).fails(500)
    made = asked(by_server(price=Price.of(1_000_000)), *texts)
    assert [found.attempts for found in made] == [3, 3]
    (own,) = [one(by_server(), text).tokens for text in texts[:1]]
    assert [found.tokens for found in made] == [own + 42, 1 + 6], "24 characters, 48 tokens"
    assert [found.usd for found in made] == [found.tokens for found in made]


def test_texts_whose_request_fails_share_its_cost(server: EmbeddingServer, by_server: Make) -> None:
    for _ in range(2):
        server.then(200, {"data": [], "usage": {"prompt_tokens": 48}})
    embedder = by_server(price=Price.of(1_000_000), policy={"attempts": 2})
    made = asked(embedder, "a red lamp on a table", "oak")
    assert all(isinstance(error, ServiceError) for error in made)
    assert [(error.attempts, error.tokens, error.usd) for error in made] == [(2, 84, 84.0), (2, 12, 12.0)]


def test_a_failure_of_one_half_costs_the_other_no_vector(server: EmbeddingServer, by_server: Make) -> None:
    server.fails(400)
    server.refuses = lambda text: text == "bad"
    embedder = by_server(policy={"attempts": 1})
    good, bad = asked(embedder, "good lamp", "bad")
    assert good.attempts == 2 and isinstance(bad, BuildError) and bad.attempts == 2


def test_tokens_that_are_counted_here_say_so(server: EmbeddingServer, by_server: Make) -> None:
    server.changed = lambda body: {**body, "usage": None}
    found = one(by_server(), "a red lamp")
    assert found.estimated_tokens == found.tokens > 0
    server.changed = lambda body: body
    assert one(by_server(), "another lamp").estimated_tokens == 0
