"""An embeddings server on a loopback port, and embedders that ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from featurekit_spark import aio
from featurekit_spark.embed import OpenAIEmbedder
from featurekit_spark.paid.retry import RetryPolicy
from featurekit_spark.testing.embeddings import EmbeddingServer, embedding_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingServer]:
    monkeypatch.setenv("TEST_EMBED_KEY", "sk-secret")
    with embedding_server() as running:
        yield running


@pytest.fixture
def by_server(server: EmbeddingServer) -> Iterator[Callable[..., OpenAIEmbedder]]:
    """Makes embedders with short waits, and closes the connections that they open on the library's own loop."""
    made: list[OpenAIEmbedder] = []

    def make(**options: Any) -> OpenAIEmbedder:
        policy = {"attempts": 3, "first_wait_s": 0.01, **options.pop("policy", {})}
        settings = {"dim": 32, "api_key_env": "TEST_EMBED_KEY", "policy": RetryPolicy(**policy), **options}
        embedder = OpenAIEmbedder(settings.pop("url", server.url), "m", **settings)
        made.append(embedder)
        return embedder

    yield make
    for embedder in made:
        aio.run(embedder.aclose())
