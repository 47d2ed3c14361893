"""The builders of text embeddings, shared by all applications: keyed by the text, so equal texts share one
entry.

One is for embedders that run in the process, the other for hosted ones, where each text is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.costs import Expected, Pricing
from featurekit_spark.embed.base import Vectors, is_blank, is_hosted
from featurekit_spark.errors import ContextError
from featurekit_spark.values import vector

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HostedTextEmbedding", "TextEmbedding"]


class TextEmbedding(FeatureBuilder[Vectors]):
    """text -> float32[dim] of unit length, by `context.embedder`; null for a text of white space only.

    An application may subclass it for a name of its own.
    """

    key = ("text",)
    value = vector()
    version = "1"
    needs = ("embedder",)

    @dataclass(frozen=True)
    class Config:
        """Which embedder, by its identity, and the vectors' dimension."""

        embedder: str
        dim: int

    def default_config(self, context: Any) -> Config:
        return self.Config(context.embedder.identity, context.embedder.dim)

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[Vectors | None]:
        embedder = _embedder(self.name, config, context)
        if is_hosted(embedder):
            raise ContextError(
                f"{self.name} counts no calls, and {embedder.identity!r} is paid for by the text. Build on "
                "HostedTextEmbedding instead, as featurekit_spark.apps.product_recs.hosted does."
            )
        texts = list(inputs["text"])
        rows = [row for row, text in enumerate(texts) if not is_blank(text)]
        values: list[Vectors | None] = [None] * len(texts)
        vectors = np.asarray(embedder.embed([texts[row] for row in rows]), dtype=np.float32)
        for row, made in zip(rows, vectors, strict=True):
            values[row] = made
        return values


class HostedTextEmbedding(FeatureBuilder[Vectors]):
    """As `TextEmbedding`, by a hosted `context.embedder`: an entry, a call to budgets and an error for each text.

    A subclass may have name and version of a local one: their entries lie side by side, told apart by the embedder.
    """

    key = ("text",)
    value = vector()
    version = "1"
    paid = True
    needs = ("embedder",)

    @dataclass(frozen=True)
    class Config(TextEmbedding.Config):
        """As of a local one."""

    def default_config(self, context: Any) -> Config:
        return self.Config(context.embedder.identity, context.embedder.dim)

    def pricing(self, config: Config, context: Any) -> Pricing | None:
        """What the embedder says of its calls before they are made; None for one that says nothing."""
        ask = getattr(context.embedder, "expected_cost", None)
        return None if ask is None else _TextPricing(ask)

    async def build_one(
        self, inputs: dict[str, Any], config: Config, context: Any
    ) -> Metered[Vectors | None]:
        embedder = _embedder(self.name, config, context)
        if not is_hosted(embedder):
            raise ContextError(
                f"{self.name} counts each text as a paid call, and {embedder.identity!r} is not hosted. Build on "
                "TextEmbedding instead."
            )
        if is_blank(inputs["text"]):
            return Metered(None, usd=0.0, attempts=0)
        made = await embedder.embed_one(inputs["text"])
        return Metered(made.vector, made.tokens, made.usd, made.estimated_tokens, made.attempts)


@dataclass(frozen=True)
class _TextPricing:
    ask: Callable[[str], Expected]

    @property
    def priced(self) -> bool:
        return self.ask("").priced

    def expected(self, key: Mapping[str, Any]) -> Expected:
        return self.ask(key["text"])


def _embedder(name: str, config: TextEmbedding.Config, context: Any) -> Any:
    """The context's embedder; ContextError where it is another one than the config names."""
    embedder = context.embedder
    if (embedder.identity, embedder.dim) != (config.embedder, config.dim):
        raise ContextError(
            f"{name} is configured for {config.embedder!r} (dim {config.dim}), but context.embedder "
            f"is {embedder.identity!r} (dim {embedder.dim}). Give the context the embedder you mean; the "
            "config follows."
        )
    return embedder
