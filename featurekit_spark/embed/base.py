"""What an embedder is. Knows neither builders nor any implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Embedder", "Vectors"]

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


def is_blank(text: Any) -> bool:
    """Whether there is nothing to embed."""
    return text is None or not text.strip()
