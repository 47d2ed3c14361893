"""Models of the sentence-transformers library, in this process, on a GPU where there is one.

Owns how texts go in and vectors come out; which models there are, and where their files come from, is the library's
affair. Loaded at the first use of a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from featurekit_spark.embed.base import Vectors, refuse_blank, unit_rows
from featurekit_spark.errors import ContextError, UsageError

__all__ = ["SentenceTransformerEmbedder"]


class SentenceTransformerEmbedder:
    """`model`: a name on the hub or a folder; `revision` pins the former. `prefix` goes before every text, in place of
    the prompt that the model may declare (`"query: "` for E5, `""` for most). Vectors longer than `dim` are cut to it.

    A text's last bits may depend on the `batch_size` texts it is computed with; hashes of values do not see them. Needs
    the extra `featurekit-spark[semantic-st]`, which brings torch, else ContextError.
    """

    def __init__(
        self,
        model: str,
        *,
        dim: int,
        prefix: str = "",
        revision: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        if dim < 1 or batch_size < 1:
            raise UsageError(f"dim and batch_size must be positive, found {dim!r}, {batch_size!r}")
        if find_spec("sentence_transformers") is None:
            raise ContextError(
                "this embedder needs the sentence-transformers package: pip install "
                "'featurekit-spark[semantic-st]'"
            )
        self.model, self.dim, self.prefix, self.revision = model, dim, prefix, revision
        self.batch_size, self.device = batch_size, device
        at = "" if revision is None else f"@{revision}"
        self.identity = f"sentence-transformers:{model}{at}:prefix={prefix!r}:dim={dim}"

    def __repr__(self) -> str:
        return f"SentenceTransformerEmbedder({self.model!r}, dim={self.dim}, prefix={self.prefix!r})"

    def warm_up(self) -> None:
        """Load what the first `embed` of a process would load."""
        self.embed(["warm"])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dim], rows of unit length. ContextError where the model has fewer dimensions."""
        refuse_blank(texts)
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        vectors = np.asarray(
            _loaded(self.model, self.revision, self.device).encode(
                list(texts),
                prompt=self.prefix,
                batch_size=self.batch_size,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        )
        if vectors.shape[1] < self.dim:
            raise ContextError(
                f"{self.model} has {vectors.shape[1]} dimensions, fewer than dim={self.dim}: set embedder.dim to "
                f"{vectors.shape[1]} or less."
            )
        return unit_rows(vectors[:, : self.dim])


@lru_cache(maxsize=2)
def _loaded(model: str, revision: str | None, device: str | None) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model, revision=revision, device=device)
