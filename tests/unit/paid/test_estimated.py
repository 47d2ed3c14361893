"""Tokens that the provider did not count are told as such: in a run's record, and in what was paid."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from featurekit_spark import Context
from featurekit_spark.builder import Metered
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cli import app
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.llm.base import Completion
from featurekit_spark.report.cost import paid_lots, summed
from featurekit_spark.testing.chat import chat_reply, chat_server
from tests.letter_shop import Desk, Initial, run


def test_runs_and_sums_tell_how_many(tmp_path: Path) -> None:
    cache, desk = DeltaCache(str(tmp_path / "cache")), Desk()
    assert run(cache, desk).builders["Ask"].estimated_tokens == 7
    assert run(cache, desk, Initial).builders["Ask"].estimated_tokens == 0, "nothing was asked"
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.tokens, total.estimated_tokens) == (3, 21, 7)
    by_day = summed(paid_lots(cache), ("builder", "day"))
    assert sum(row.estimated_tokens for row in by_day) == 7
    cost = ["cost", "--path", cache.path]
    assert "7 of 21 tokens were counted here" in CliRunner().invoke(app, cost).stdout
    facts = json.loads(CliRunner().invoke(app, [*cost, "--output", "json"]).stdout)
    assert facts["total"]["estimated_tokens"] == 7


def test_who_counted_decides() -> None:
    assert Completion("a", 3, 4).estimated_tokens == 0
    assert Completion("a", 3, 4, counted_by="tokenizer").estimated_tokens == 7
    assert Completion("a", 3, 4, counted_by="estimate").estimated_tokens == 7


def test_an_answer_without_usage_is_counted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY", "key")
    body = chat_reply("hello")
    del body["usage"]
    with chat_server() as server:
        server.script.append((200, {}, body))
        chat = OpenAIChat(base_url=server.url, model="m", api_key_env="ANY")

        async def asked() -> list[Metered[str]]:
            builder, context = LLMCompletion(), Context(llm=chat)
            config = builder.default_config(context)
            try:
                return [await builder.build_one({"prompt": "Why?"}, config, context) for _ in range(2)]
            finally:
                await chat.aclose()

        counted, told = asyncio.run(asked())
    assert counted.estimated_tokens == counted.tokens > 0
    assert (told.tokens, told.estimated_tokens) == (10, 0)
