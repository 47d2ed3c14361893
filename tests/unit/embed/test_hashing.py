from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest

from featurekit_spark.builder import bind
from featurekit_spark.context import Context
from featurekit_spark.embed import Embedder, HashingEmbedder, TextEmbedding
from featurekit_spark.errors import ContextError, UsageError

TEXTS = [
    "Sony Turntable - PSLX350H",
    "a",
    "\u00dcbergr\u00f6\u00dfe caf\u00e9",
    "\u65e5\u672c\u8a9e \U0001f600",
    "x" * 5000,
    "sony turntable pslx-350h",
]


def test_rows_are_unit_vectors_in_any_dimension() -> None:
    for dim in (1, 5, 16, 384):
        vectors = HashingEmbedder(dim).embed(TEXTS)
        assert vectors.shape == (len(TEXTS), dim) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert HashingEmbedder(7).embed([]).shape == (0, 7)
    assert isinstance(HashingEmbedder(), Embedder)


def test_a_text_has_the_same_bits_in_any_batch() -> None:
    embedder = HashingEmbedder()
    texts = TEXTS + [f"product {i} of brand {i % 7}" for i in range(300)]
    together = embedder.embed(texts)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    turned = embedder.embed(texts[::-1])[::-1]
    assert together.tobytes() == alone.tobytes() == np.ascontiguousarray(turned).tobytes()


def test_the_vectors_are_pinned() -> None:
    """They are stored in caches: another result needs another identity."""
    steps = np.rint(HashingEmbedder(32).embed(TEXTS).astype(np.float64) * 1e5).astype("<i4")
    assert sha256(steps.tobytes()).hexdigest()[:16] == "daf7673aaf4a9b49"
    assert HashingEmbedder().identity == "hashing/1:char_wb:3-4:262144:dim=384:seed=0"


def test_shared_spelling_is_near() -> None:
    first, *_, other = HashingEmbedder().embed(TEXTS)
    lamp = HashingEmbedder().embed(["Oak Floor Lamp"])[0]
    assert first @ other > 0.7 > 0.3 > abs(first @ lamp)


def test_seed_and_dimension_are_identity() -> None:
    assert len({e.identity for e in (HashingEmbedder(), HashingEmbedder(seed=1), HashingEmbedder(8))}) == 3
    assert not np.array_equal(HashingEmbedder().embed(["a"]), HashingEmbedder(seed=1).embed(["a"]))


@pytest.mark.parametrize("text", ["", "  ", "\u00a0\t\n"])
def test_white_space_has_no_embedding(text: str) -> None:
    with pytest.raises(UsageError, match="nothing to embed"):
        HashingEmbedder().embed(["fine", text])
    context = Context()
    bound = bind(TextEmbedding, context)
    values = bound.builder.build(pd.DataFrame({"text": ["fine", text]}), bound.config, bound.view(context))
    assert values[0] is not None and values[1] is None


def test_the_builder_follows_the_contexts_embedder() -> None:
    context = Context(embedder=HashingEmbedder(16))
    bound = bind(TextEmbedding, context)
    assert bound.config.dim == 16
    with pytest.raises(ContextError, match="Give the context the embedder you mean"):
        bound.builder.build(pd.DataFrame({"text": ["a"]}), bound.config, Context())


def test_nothing_heavy_is_imported_before_the_first_use() -> None:
    code = (
        "import sys, featurekit_spark.context as c; c.Context()\n"
        "heavy = {'sklearn', 'scipy', 'openai', 'pyspark', 'deltalake'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
