"""What a chat model is, and what it answers with. Knows neither builders nor any implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from featurekit_spark.paid.cost import NOTHING, Cost

__all__ = ["ChatModel", "Completion", "Message"]

Message: TypeAlias = Mapping[str, str]
"""One message of a conversation: its `role` and `content`."""


@dataclass(frozen=True)
class Completion:
    """A model's answer to one prompt. `usd` None: no price is known.

    `finish_reason` as the provider says it: `stop`, or `length` where max_tokens cut the answer off. `counted_by`: who
    counted the tokens: the `provider`; where its answer said nothing, a `tokenizer` of the model, or a rule of thumb
    (`estimate`). `attempts`: how many requests it took; `lost`: what those before it cost, which led to no answer.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None
    finish_reason: str = "stop"
    counted_by: Literal["provider", "tokenizer", "estimate"] = "provider"
    attempts: int = 1
    lost: Cost = NOTHING

    @property
    def tokens(self) -> int:
        """Of the answer alone."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def estimated_tokens(self) -> int:
        """How many of them the provider did not count."""
        return 0 if self.counted_by == "provider" else self.tokens

    @property
    def cost(self) -> Cost:
        """What all its attempts took."""
        return Cost(self.tokens, self.usd, self.estimated_tokens) + self.lost


@runtime_checkable
class ChatModel(Protocol):
    """Answers a prompt.

    `identity` names provider and model: answers kept under one identity are taken for each other. A model may also say
    what a call will cost, `expected_cost(prompt, *, system, max_tokens) -> costs.Expected`: plans show it, and a limit
    in usd is refused before any call where answers will carry no price.
    """

    @property
    def identity(self) -> str: ...

    async def complete(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        earlier: Sequence[Message] = (),
    ) -> Completion:
        """Ask the model; `prompt` is the user message as it is.

        `response_format`: as the OpenAI protocol has it, such as a JSON Schema that the answer follows. `earlier`:
        messages between the system's and the prompt. Builders that need neither give neither.

        Raises ServiceError (worth a retry later), BuildError (this prompt never succeeds), BudgetError
        (quota).
        """
        ...
