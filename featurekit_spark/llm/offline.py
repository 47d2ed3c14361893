"""The default chat model: a deterministic stand-in that calls nothing, costs nothing, and says so in every
answer."""

from __future__ import annotations

import re
import zlib

from featurekit_spark.errors import UsageError
from featurekit_spark.llm.base import Completion

__all__ = ["OFFLINE_NOTICE", "OfflineLLM"]

OFFLINE_NOTICE = "(offline stand-in: no model was called)"

_LEAD = re.compile(
    r"^\s*(?:get|find|give|list|suggest|show)?\s*(?:me\s+)?recommendations?\s+for\s*:?\s*", re.IGNORECASE
)


class OfflineLLM:
    """Answers with a numbered list of `suggestions` descriptions made from the prompt's own words: some left
    out, some in another order. Searching for them finds products with similar titles."""

    def __init__(self, suggestions: int = 3) -> None:
        if suggestions < 1:
            raise UsageError(f"the stand-in makes at least one suggestion, found suggestions={suggestions!r}")
        self.suggestions = suggestions
        self.identity = f"offline/1:suggestions={suggestions}"

    def __repr__(self) -> str:
        return f"OfflineLLM(suggestions={self.suggestions})"

    async def complete(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Completion:
        """The same answer to the same prompt, everywhere; tokens are a rough count, usd is 0."""
        words = _LEAD.sub("", prompt).split() or prompt.split()
        chance = zlib.crc32(prompt.encode("utf-8", "replace"))
        items = dict.fromkeys(_variant(words, chance, turn) for turn in range(self.suggestions))
        lines = [OFFLINE_NOTICE, *(f"{i}. {item}" for i, item in enumerate(items, start=1) if item)]
        text = "\n".join(lines)
        return Completion(text, _tokens(system or "") + _tokens(prompt), _tokens(text), usd=0.0)


def _variant(words: list[str], chance: int, turn: int) -> str:
    """A description near the words: the first turns drop one word, later ones also rotate what is left."""
    size = len(words)
    if size < 3:
        return " ".join(words if turn % 2 == 0 else reversed(words))
    drop = (chance + turn) % size
    kept = words[:drop] + words[drop + 1 :]
    shift = (turn // 2) % len(kept)
    return " ".join(kept[shift:] + kept[:shift])


def _tokens(text: str) -> int:
    """About four characters to a token, as a rule of thumb for English."""
    return (len(text) + 3) // 4
