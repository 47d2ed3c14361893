"""What attempts of a call took, those among them that led to no answer.

Adds up only. Knows neither prices nor who counts, and imports nothing: the retry layer is loaded early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["NOTHING", "Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Of one or more attempts, as far as anybody knows. `usd` None: tokens were used, and no price is known.
    `estimated_tokens`: how many of the tokens the provider did not count."""

    tokens: int = 0
    usd: float | None = 0.0
    estimated_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Cost(self.tokens + other.tokens, usd, self.estimated_tokens + other.estimated_tokens)


NOTHING = Cost()


class _Billed(Protocol):
    tokens: int | None
    usd: float | None
    estimated_tokens: int


def cost_of(failure: _Billed) -> Cost | None:
    """What a failure took all the same; None where nobody knows."""
    if failure.tokens is None and failure.usd is None:
        return None
    return Cost(failure.tokens or 0, failure.usd, failure.estimated_tokens)
