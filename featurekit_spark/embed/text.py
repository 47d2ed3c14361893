"""The builder of text embeddings, shared by all applications: keyed by the text, so equal texts share one
entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.embed.base import Vectors, is_blank
from featurekit_spark.errors import ContextError
from featurekit_spark.values import vector

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TextEmbedding"]


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
        embedder = context.embedder
        if (embedder.identity, embedder.dim) != (config.embedder, config.dim):
            raise ContextError(
                f"{self.name} is configured for {config.embedder!r} (dim {config.dim}), but context.embedder "
                f"is {embedder.identity!r} (dim {embedder.dim}). Give the context the embedder you mean; the "
                "config follows."
            )
        texts = list(inputs["text"])
        rows = [row for row, text in enumerate(texts) if not is_blank(text)]
        values: list[Vectors | None] = [None] * len(texts)
        vectors = np.asarray(embedder.embed([texts[row] for row in rows]), dtype=np.float32)
        for row, made in zip(rows, vectors, strict=True):
            values[row] = made
        return values
