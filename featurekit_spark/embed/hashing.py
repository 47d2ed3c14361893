"""The default embedder: hashed character n-grams, projected to a few hundred dimensions. No model, no
download.

Owns the exact algorithm, because vectors in a cache outlive the process: every step is defined by integers
and a seed, not by the library version or the platform.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from featurekit_spark.embed.base import Vectors, is_blank
from featurekit_spark.errors import UsageError

__all__ = ["HashingEmbedder"]

_FEATURES = 2**18
_NONZEROS = 16
_AT_ONCE = 2**13


class HashingEmbedder:
    """Character 3-4-grams within words, hashed to 2**18 features, damped by the square root of their counts,
    then projected to `dim` by a seeded sparse matrix of +1 and -1 (Achlioptas 2003; Kane and Nelson 2014) and
    scaled to unit length.

    Texts that share spelling are near each other: typos, word order and plurals matter little, synonyms are
    far apart. A text of white space only has no n-grams and is a UsageError.
    """

    def __init__(self, dim: int = 384, *, seed: int = 0) -> None:
        if dim < 1:
            raise UsageError(f"an embedding needs at least one dimension, found dim={dim!r}")
        self.dim = dim
        self.seed = seed
        self.identity = f"hashing/1:char_wb:3-4:{_FEATURES}:dim={dim}:seed={seed}"

    def __repr__(self) -> str:
        return f"HashingEmbedder({self.dim}, seed={self.seed})"

    def warm_up(self) -> None:
        """Load what the first `embed` of a process would load."""
        self.embed(["warm"])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dim], rows of unit length; equal texts get equal bits in any batch."""
        for text in texts:
            if is_blank(text):
                raise UsageError(f"{text!r} holds nothing to embed; leave out texts of white space")
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        grams = _vectorizer().transform(texts)
        grams.data = np.sqrt(grams.data)
        projected = _projected(grams, self.dim, self.seed)
        norms = np.sqrt(np.square(projected, dtype=np.float64).sum(axis=1, keepdims=True))
        # Signs can cancel out in theory; such a text still gets a direction, and always the same.
        projected[norms[:, 0] == 0, 0] = 1
        norms[norms == 0] = 1
        vectors: Vectors = (projected / norms).astype(np.float32)
        return vectors


@lru_cache(maxsize=1)
def _vectorizer() -> Any:
    # Imported at first use: scikit-learn takes a second or more, and most processes never embed.
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(
        analyzer="char_wb",
        ngram_range=(3, 4),
        n_features=_FEATURES,
        norm=None,
        alternate_sign=False,
        dtype=np.float32,
    )


def _projected(grams: Any, dim: int, seed: int) -> Any:
    """float32 [rows, dim]. Of the projection only the rows that occur are made a matrix: as a whole it would be the
    largest thing that a worker holds."""
    from scipy.sparse import csr_matrix

    used, where = np.unique(grams.indices, return_inverse=True)
    codes = _projection(dim, seed)[used]
    signs = np.where(codes < 0, np.float32(-1), np.float32(1))
    ends = np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32)
    part = csr_matrix((signs.ravel(), np.abs(codes).ravel() - 1, ends), shape=(len(used), dim))
    own = csr_matrix((grams.data, where.astype(np.int32), grams.indptr), shape=(grams.shape[0], len(used)))
    return (own @ part).toarray()


@lru_cache(maxsize=4)
def _projection(dim: int, seed: int) -> Any:
    """[_FEATURES, up to 16]: in each of so many blocks of columns one +1 or -1; its column, counted from 1, with the
    sign."""
    blocks = min(_NONZEROS, dim)
    starts = np.arange(blocks + 1, dtype=np.uint64) * np.uint64(dim) // np.uint64(blocks)
    # The raw stream of a bit generator is fixed for good; numpy's distributions may change between versions.
    stream = np.random.PCG64(seed)
    width = starts[1:] - starts[:-1]
    codes = np.empty((_FEATURES, blocks), dtype=np.int16 if dim < 2**15 else np.int32)
    for start in range(0, _FEATURES, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        bits = stream.random_raw(codes[part].size).reshape(-1, blocks)
        columns = starts[:-1] + ((bits >> np.uint64(32)) * width >> np.uint64(32)) + np.uint64(1)
        codes[part] = np.where(bits & np.uint64(1), 1, -1) * columns.astype(np.int64)
    return codes
