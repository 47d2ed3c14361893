"""An answer that was cut off by max_tokens, online and by batch: an error of its key, until it may be longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import aio
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.session import RunResult, Session
from featurekit_spark.testing.chat import chat_server
from tests.batch_shop import Ids, Reply, World, model

PROMPTS = {"a": {"p1": "red lamp", "p2": "sofa"}}


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_it_is_an_error_until_it_may_be_longer(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    cache = DeltaCache(str(tmp_path / "cache"))
    with chat_server(str.upper) as server:
        server.cut = frozenset({"sofa"})

        def run(**config: Any) -> RunResult:
            llm = model(server.url, str(tmp_path / "cache" / "batches"), wait_s=60.0)
            world = World(llm if mode == "batch" else llm.chat, PROMPTS, config)
            try:
                return Session(world, cache, engine="local").run(Reply.over(Ids), shop="a")
            finally:
                aio.run(llm.aclose())

        def asked() -> list[str]:
            return [
                *server.batches.prompts,
                *(request["messages"][-1]["content"] for request in server.requests),
            ]

        first = run(max_tokens=3)
        assert first.status == "partial" and first.values(Reply)["a", "p1"] == "<RED LAMP>"
        (error,) = first.errors.values()
        assert "[terminal, 1 attempt] the answer was cut off after 3 tokens" in error
        assert "llm.max_tokens, which is 3" in error
        counts = first.builders["LLMCompletion"]
        assert (counts.calls, counts.terminal, counts.tokens) == (2, 1, 20)
        assert counts.usd == (54.0 if mode == "online" else 27.0)
        (row,) = (row for row in cache.history("LLMCompletion").to_pylist() if row["status"] == "error")
        assert row["value"] == b"SOFA"
        again = run(max_tokens=3)
        assert (again.builders["LLMCompletion"].calls, again.builders["LLMCompletion"].remembered) == (0, 1)
        assert sorted(asked()) == ["red lamp", "sofa"]
        server.cut = frozenset()
        assert run(max_tokens=9).values(Reply)["a", "p2"] == "<SOFA>"
        assert sorted(asked()) == ["red lamp", "red lamp", "sofa", "sofa"]
