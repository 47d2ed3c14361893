"""What a chat model is, and what it answers with. Knows neither builders nor any implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["ChatModel", "Completion"]


@dataclass(frozen=True)
class Completion:
    """A model's answer to one prompt. `usd` None: no price is known.

    `finish_reason` as the provider says it: `stop`, or `length` where max_tokens cut the answer off.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None
    finish_reason: str = "stop"

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@runtime_checkable
class ChatModel(Protocol):
    """Answers a prompt.

    `identity` names provider and model: answers kept under one identity are taken for each other.
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
    ) -> Completion:
        """Ask the model; `prompt` is the user message as it is.

        Raises ServiceError (worth a retry later), BuildError (this prompt never succeeds), BudgetError
        (quota).
        """
        ...
