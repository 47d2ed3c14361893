from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from featurekit_spark.builder import Metered, bind
from featurekit_spark.context import Context
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
