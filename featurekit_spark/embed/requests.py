"""What the requests of some texts took before they led to vectors, and each text's share of it.

Knows texts and errors. How a request is made, and when its texts are asked for in halves, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featurekit_spark.embed.coalesce import shares
from featurekit_spark.errors import FeaturekitError
from featurekit_spark.failures import of_others

__all__ = ["Before", "each_failed"]


@dataclass(frozen=True)
class Before:
    """Requests that some texts were sent in together: how many, and what the failed ones took (None: nobody knows)."""

    attempts: int = 0
    tokens: int | None = None

    def and_lost(self, attempts: int, tokens: int | None) -> Before:
        """And so many more, of which those that failed took `tokens`."""
        known = [part for part in (self.tokens, tokens) if part]
        return Before(self.attempts + attempts, sum(known) if known else None)

    def and_failed(self, error: FeaturekitError) -> Before:
        """And those of a request that failed in the end."""
        return self.and_lost(error.attempts or 0, error.tokens)

    def parted(self, *parts: Sequence[str]) -> list[Before]:
        """For some of the texts each, as they are going to be sent apart."""
        if self.tokens is None:
            return [self] * len(parts)
        counts = shares(self.tokens, [sum(map(len, part)) for part in parts])
        return [Before(self.attempts, count) for count in counts]

    def shares(self, texts: Sequence[str]) -> list[int]:
        """The tokens of failed requests, by text."""
        return [0] * len(texts) if self.tokens is None else shares(self.tokens, [len(text) for text in texts])


def each_failed(
    error: FeaturekitError,
    texts: Sequence[str],
    asked: Before,
    usd: Callable[[int], float | None],
    *,
    to_blame: bool,
) -> list[Exception]:
    """A failed request as the error of each of its texts. `to_blame`: what is said of the request holds for each."""
    found: list[Exception] = []
    for tokens in asked.shares(texts):
        own = of_others(error) if not to_blame else type(error)(str(error))
        if isinstance(own, FeaturekitError):
            if to_blame:
                own.blames_request, own.attempts = error.blames_request, asked.attempts
            if asked.tokens is not None:
                own.with_cost(tokens, usd(tokens))
        own.__cause__ = error.__cause__
        found.append(own)
    return found
