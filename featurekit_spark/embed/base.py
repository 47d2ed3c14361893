"""What an embedder is. Knows neither builders nor any implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import BuildError, UsageError

__all__ = ["Embedded", "Embedder", "HostedEmbedder", "Vectors", "is_hosted", "refuse_blank", "unit_rows"]

Vectors = npt.NDArray[np.float32]


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors.

    `identity` goes into the config hash of what is made with it: model, parameters, version of the algorithm.
    A text's vector must not depend on the texts beside it.
    """

    @property
    def identity(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dim], rows of unit length; never asked for a text of white space only."""
        ...


@dataclass(frozen=True)
class Embedded:
    """A hosted model's vector of one text, with the text's share of what its requests cost, those that failed among
    them. `usd` None: no price is known. `estimated_tokens`: how many of the tokens the provider did not count;
    `attempts`: in how many requests the text was sent."""

    vector: Vectors
    tokens: int = 0
    usd: float | None = None
    estimated_tokens: int = 0
    attempts: int = 1


@runtime_checkable
class HostedEmbedder(Embedder, Protocol):
    """An embedder behind a server that bills: each text is a call of its own to budgets and in the cache.

    How many texts go into one request is the embedder's affair. `embed` asks it by hand, uncounted.
    """

    async def embed_one(self, text: str) -> Embedded:
        """One text's vector, float32 [dim] of unit length.

        Raises ServiceError (worth a retry later), BuildError (this text never succeeds), BudgetError (quota).
        """
        ...


def is_hosted(embedder: Any) -> TypeGuard[HostedEmbedder]:
    """Whether each text is paid for, so that a `HostedTextEmbedding` has to build it."""
    return isinstance(embedder, HostedEmbedder)


def is_blank(text: Any) -> bool:
    """Whether there is nothing to embed."""
    return text is None or not text.strip()


def refuse_blank(texts: Sequence[str]) -> None:
    """UsageError for a text of white space only."""
    for text in texts:
        if is_blank(text):
            raise UsageError(f"{text!r} holds nothing to embed; leave out texts of white space")


def unit_rows(vectors: npt.ArrayLike) -> Vectors:
    """Rows as float32 of unit length. BuildError where one has no direction: zero, or not finite."""
    rows = np.asarray(vectors, dtype=np.float64)
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise BuildError(
            "the model's vector has no direction: it is zero, or holds a number that is not finite"
        )
    scaled: Vectors = (rows / norms).astype(np.float32)
    return scaled
