"""What one call took, and what one will take: tokens as the provider counted them, or as they can be counted here.

Knows prices and tokenizers; must not know clients, nor how a call is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from featurekit_spark.costs import Expected
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.tokens import TokenCount, count_request, count_tokens

__all__ = ["CountedBy", "Usage", "expected_cost", "usage_of"]

CountedBy = Literal["provider", "tokenizer", "estimate"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call, who counted them, and what they cost (None: no price is known)."""

    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None
    counted_by: CountedBy = "provider"


def usage_of(
    reported: Any, *, prompt: str, system: str | None, text: str, model: str, price: Price | None
) -> Usage:
    """Of an answer, by its `usage` (an object as OpenAI's clients give it, or None).

    Servers that leave it out are common; then request and answer are counted here.
    """
    asked, answered = _number(reported, "prompt_tokens"), _number(reported, "completion_tokens")
    counted_by: CountedBy = "provider"
    cached = min(_number(getattr(reported, "prompt_tokens_details", None), "cached_tokens") or 0, asked or 0)
    # A prompt is never empty: a server that counts 0 tokens in it does not count.
    if not asked or answered is None:
        own = (count_request(prompt, system, model), count_tokens(text, model))
        asked, answered, cached = own[0].count, own[1].count, 0
        counted_by = "estimate" if _estimated(*own) else "tokenizer"
    usd = None if price is None else float(price.usd(asked, answered, cached))
    return Usage(asked, answered, usd, counted_by)


def expected_cost(
    prompt: str, *, system: str | None, answer_tokens: int | None, model: str, price: Price | None
) -> Expected:
    """Of a call that nobody has made yet, with an answer of so many tokens (None: nobody knows how many)."""
    if answer_tokens is None:
        return Expected(None, None, priced=price is not None)
    asked = count_request(prompt, system, model).count
    usd = None if price is None else float(price.usd(asked, answer_tokens))
    return Expected(asked + answer_tokens, usd, priced=price is not None)


def _number(holder: Any, name: str) -> int | None:
    found = getattr(holder, name, None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def _estimated(*counts: TokenCount) -> bool:
    return any(count.estimated for count in counts)
