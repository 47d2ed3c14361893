from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from featurekit_spark.builder import Metered, bind
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.context import Context
from featurekit_spark.controller import Controller, Feature
from featurekit_spark.errors import ContextError, UsageError
from featurekit_spark.llm import OFFLINE_NOTICE, ChatModel, Completion, LLMCompletion, OfflineLLM


def complete(model: ChatModel, prompt: str, **options: Any) -> Completion:
    return asyncio.run(model.complete(prompt, **options))


def test_the_stand_in_says_so_and_repeats_itself() -> None:
    prompt = "get recommendations for Red Wireless Headphones with Microphone"
    answer = complete(OfflineLLM(), prompt)
    lines = answer.text.splitlines()
    assert lines[0] == OFFLINE_NOTICE
    assert [line[:3] for line in lines[1:]] == ["1. ", "2. ", "3. "]
    for line in lines[1:]:
        assert set(line[3:].split()) < {"Red", "Wireless", "Headphones", "with", "Microphone"}
    assert answer == complete(OfflineLLM(), prompt)
    assert answer.usd == 0
    assert answer.prompt_tokens > 0 and answer.completion_tokens > 0


@pytest.mark.parametrize("prompt", ["", " ", "x", "x y", "get recommendations for ", "\ud800"])
def test_the_stand_in_answers_anything(prompt: str) -> None:
    assert complete(OfflineLLM(), prompt).text.startswith(OFFLINE_NOTICE)


def test_the_stand_in_makes_as_many_as_asked() -> None:
    answer = complete(OfflineLLM(suggestions=5), "one two three four five six")
    assert len(answer.text.splitlines()) == 6
    assert OfflineLLM(5).identity != OfflineLLM(3).identity
    with pytest.raises(UsageError, match="at least one"):
        OfflineLLM(0)


class Recorder:
    identity = "recorder"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def complete(self, prompt: str, **options: Any) -> Completion:
        self.calls.append((prompt, options))
        return Completion("answer", 5, 2, usd=0.25)


def test_the_request_is_the_config_and_the_prompt_as_it_is() -> None:
    model = Recorder()
    context = Context(llm=model, merchant_config={"temperature": 0.5, "max_tokens": 9})
    bound = bind(LLMCompletion, context)
    value = asyncio.run(bound.builder.build_one({"prompt": " p\n"}, bound.config, bound.view(context)))
    assert value == Metered("answer", 7, 0.25)
    system = LLMCompletion.Config("x").system
    assert model.calls == [(" p\n", {"system": system, "temperature": 0.5, "max_tokens": 9})]


@pytest.mark.parametrize("limit", [None, 9])
def test_an_answer_that_was_cut_off_is_an_error_and_kept(limit: int | None) -> None:
    class Short(Recorder):
        async def complete(self, prompt: str, **options: Any) -> Completion:
            whole = await super().complete(prompt, **options)
            return replace(
                whole, text="1. a de", finish_reason="length" if options["max_tokens"] == limit else "stop"
            )

    model, cache = Short(), MemoryCache()

    def asked(max_tokens: int | None) -> Feature[str]:
        context = Context(llm=model, merchant_config={"max_tokens": max_tokens})
        return Controller(context, cache).get(LLMCompletion, ("p",))

    cut = asked(limit)
    assert cut.error is not None
    assert "[terminal, 1 attempt] the answer was cut off after 2 tokens; raise llm.max_tokens" in cut.error
    (row,) = cache.history("LLMCompletion").to_pylist()
    assert (row["value"], row["tokens"], row["usd"], row["status"]) == (b"1. a de", 7, 0.25, "error")
    assert asked(limit).error == cut.error
    assert len(model.calls) == 1, "asked once under one identity"
    assert asked(20).value == "1. a de"


def test_everything_in_a_request_is_part_of_its_identity() -> None:
    context = Context()
    plain = bind(LLMCompletion, context)
    assert plain.config_hash == bind(LLMCompletion, Context()).config_hash
    changes = ({"system": "s"}, {"temperature": 0.1}, {"max_tokens": 1}, {"model": "other"})
    hashes = {bind(LLMCompletion, context, {LLMCompletion: change}).config_hash for change in changes}
    hashes.add(bind(LLMCompletion, replace(context, llm=OfflineLLM(4))).config_hash)
    assert len(hashes | {plain.config_hash}) == 6


def test_the_number_of_suggestions_is_asked_for() -> None:
    config = bind(LLMCompletion, Context(merchant_config={"suggestions": 4})).config
    assert config.system.endswith("Give 4 items.")


def test_a_config_for_another_model_is_refused() -> None:
    context = Context()
    with pytest.raises(ContextError, match="configured for 'other'"):
        asyncio.run(LLMCompletion().build_one({"prompt": "p"}, LLMCompletion.Config("other"), context))
