"""The builder of completions, shared by all applications: keyed by the prompt, so that equal prompts are one
call.

Owns what identifies a request. How a call is made, retried and priced is the model's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.costs import Expected, Pricing
from featurekit_spark.errors import BuildError, ContextError

__all__ = ["LIST_INSTRUCTION", "LLMCompletion", "RequestPricing"]

LIST_INSTRUCTION = (
    "Answer with a numbered list only, one item per line and no other text. "
    "Each item is a short description of one product."
)


class LLMCompletion(FeatureBuilder[str]):
    """prompt -> the model's answer, by `context.llm`. The user message is the prompt, byte for byte.

    Paid: an answer is kept until a refresh is asked for. Its config is the request's identity, so another
    model, temperature or system message pays again. An answer that was cut off is an error of its key, its text kept
    beside it.
    """

    key = ("prompt",)
    value = pa.string()
    version = "1"
    paid = True
    needs = ("llm",)

    @dataclass(frozen=True)
    class Config:
        """`model`: the identity of `context.llm`. None for temperature or max_tokens leaves it to the
        provider."""

        model: str
        system: str | None = LIST_INSTRUCTION
        temperature: float | None = None
        max_tokens: int | None = None

    def default_config(self, context: Any) -> Config:
        merchant = context.merchant_config
        wanted = merchant.get("suggestions")
        return self.Config(
            context.llm.identity,
            system=LIST_INSTRUCTION if wanted is None else f"{LIST_INSTRUCTION} Give {wanted} items.",
            temperature=merchant.get("temperature"),
            max_tokens=merchant.get("max_tokens"),
        )

    def pricing(self, config: Config, context: Any) -> Pricing | None:
        """What the model says of its calls before they are made; None for one that says nothing."""
        ask = getattr(context.llm, "expected_cost", None)
        return None if ask is None else RequestPricing(ask, config.system, config.max_tokens)

    async def build_one(self, inputs: dict[str, Any], config: Config, context: Any) -> Metered[str]:
        model = context.llm
        if model.identity != config.model:
            raise ContextError(
                f"{self.name} is configured for {config.model!r}, but context.llm is {model.identity!r}. "
                "Give the context the model you mean; the config follows."
            )
        answer = await model.complete(
            inputs["prompt"],
            system=config.system,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
        )
        cost = answer.cost
        if answer.finish_reason == "length":
            limit = "not set" if config.max_tokens is None else config.max_tokens
            cut = BuildError(
                f"the answer was cut off after {answer.completion_tokens} tokens; raise llm.max_tokens, which is "
                f"{limit}: with another one it is asked again. What the model said is kept with the entry."
            ).with_cost(cost.tokens, cost.usd, cost.estimated_tokens)
            cut.answer, cut.attempts = answer.text, answer.attempts
            raise cut
        return Metered(answer.text, cost.tokens, cost.usd, cost.estimated_tokens, answer.attempts)


@dataclass(frozen=True)
class RequestPricing:
    """What a model says of its calls before they are made, by `ask`, its `expected_cost`."""

    ask: Callable[..., Expected]
    system: str | None
    max_tokens: int | None

    @property
    def priced(self) -> bool:
        return self.expected({"prompt": ""}).priced

    def expected(self, key: Mapping[str, Any]) -> Expected:
        return self.ask(key["prompt"], system=self.system, max_tokens=self.max_tokens)
