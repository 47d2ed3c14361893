"""Model calls as a run makes them, against an unreliable server on loopback."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from featurekit_spark import Context, Controller, MemoryCache, aio
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.paid.limits import LocalLimiter, Rates
from featurekit_spark.testing.load import load_server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")


def outcomes(chat: OpenAIChat, prompts: list[str]) -> Counter[str]:
    """How the prompts of a batch ended."""
    controller = Controller(Context(llm=chat), MemoryCache())
    try:
        features = controller.get_many(LLMCompletion, [(prompt,) for prompt in prompts])
    finally:
        aio.run(chat.aclose())
    found: Counter[str] = Counter()
    for prompt, feature in zip(prompts, features, strict=True):
        right = feature.value == f"1. like {prompt}"
        found["answered" if right else feature.status] += 1
    return found


def test_every_prompt_of_a_storm_ends_in_exactly_one_outcome() -> None:
    prompts = [f"p{i}" for i in range(400)]
    storm = {"busy": 0.3, "broken": 0.05, "hang": 0.02, "malformed": 0.02, "refusal": 0.01}
    with load_server(delay_s=0.01, retry_after_s=0.02, seed=5, **storm) as server:
        chat = OpenAIChat(server.url, "m", api_key_env="TEST_CHAT_KEY", concurrency=32, timeout_s=1.5)
        found = outcomes(chat, prompts)
        seen = server.seen()
    assert found["answered"] + found["error"] == len(prompts) == seen.prompts
    assert found["answered"] > 380
    assert found["error"] >= seen.kinds["refusal"] > 0
    assert seen.paid_twice == 0, "an answer that arrived is not asked for again"
    assert seen.most_in_flight <= 32
    assert {"busy", "broken", "hang", "malformed", "answered"} <= set(seen.kinds)


def test_a_limit_that_the_server_enforces_is_kept() -> None:
    prompts = [f"p{i}" for i in range(120)]
    with load_server(per_minute=1800) as server:
        chat = OpenAIChat(
            server.url,
            "m",
            api_key_env="TEST_CHAT_KEY",
            concurrency=16,
            limiter=LocalLimiter(Rates(requests_per_minute=1800)),
        )
        found = outcomes(chat, prompts)
        seen = server.seen()
    assert found == {"answered": 120}
    # On a busy machine calls that left in time arrive together.
    assert seen.kinds["answered"] == 120
    assert seen.requests <= 122
    assert seen.seconds < 1.6 * (120 - 30) / 30  # how near is what scripts/bench/calls measures


def test_no_more_calls_are_in_flight_than_asked_for() -> None:
    with load_server(delay_s=0.05) as server:
        chat = OpenAIChat(server.url, "m", api_key_env="TEST_CHAT_KEY", concurrency=5)
        assert outcomes(chat, [f"p{i}" for i in range(40)]) == {"answered": 40}
        seen = server.seen()
    assert (seen.requests, seen.most_in_flight) == (40, 5)
    assert 7 * 0.05 <= seen.seconds < 1.0


def test_a_call_that_is_given_up_leaves_the_client_usable() -> None:
    with load_server(hang=0.5, seed=1) as server:
        chat = OpenAIChat(server.url, "m", api_key_env="TEST_CHAT_KEY", concurrency=4, timeout_s=0.1)

        async def main() -> list[object]:
            try:
                return await asyncio.gather(
                    *(chat.complete(str(i)) for i in range(40)), return_exceptions=True
                )
            finally:
                await chat.aclose()

        answers = asyncio.run(main())
        seen = server.seen()
    assert sum(not isinstance(answer, Exception) for answer in answers) > 30
    assert seen.most_in_flight <= 8, "given up here, noticed there a little later"
