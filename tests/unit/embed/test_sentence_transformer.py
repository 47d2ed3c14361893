"""The adapter of sentence-transformers, around a stand-in for the library: torch is too large to test with here.

The stand-in has the library's signature and nothing more, so these tests say what is asked of it, and not that the
library does it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurekit_spark.embed import SentenceTransformerEmbedder
from featurekit_spark.embed import sentence_transformer as module
from featurekit_spark.errors import ContextError, UsageError

STAND_IN = """
import numpy as np

ASKED = []

class SentenceTransformer:
    def __init__(self, model_name_or_path=None, *, device=None, revision=None):
        self.dim = int(model_name_or_path.rpartition("-")[2])
        ASKED.append((model_name_or_path, revision, device))

    def encode(self, sentences, *, prompt=None, batch_size=32, show_progress_bar=None, convert_to_numpy=True):
        ASKED.append((prompt, batch_size))
        rows = [[len(prompt + text) + i for i in range(self.dim)] for text in sentences]
        return np.array(rows, dtype=np.float32)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if find_spec("sentence_transformers") is not None:
        pytest.skip("the library itself is installed")
    (tmp_path / "sentence_transformers.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    import sentence_transformers  # type: ignore[import-not-found, unused-ignore]

    yield sentence_transformers
    del sys.modules["sentence_transformers"]
    module._loaded.cache_clear()


def test_what_is_asked_of_the_library(library: Any) -> None:
    embedder = SentenceTransformerEmbedder("tiny-8", dim=8, prefix="query: ", revision="abc", batch_size=4)
    assert library.ASKED == [], "loaded at the first use"
    vectors = embedder.embed(["a lamp", "a table"])
    assert library.ASKED == [("tiny-8", "abc", None), ("query: ", 4)]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, 8)


def test_vectors_are_cut_to_the_dimension_asked_for(library: Any) -> None:
    assert SentenceTransformerEmbedder("tiny-8", dim=3).embed(["a"]).shape == (1, 3)
    with pytest.raises(ContextError, match="has 8 dimensions, fewer than dim=9: set embedder.dim to 8"):
        SentenceTransformerEmbedder("tiny-8", dim=9).embed(["a"])


def test_what_makes_other_vectors_has_another_identity(library: Any) -> None:
    made = [
        SentenceTransformerEmbedder("tiny-8", dim=8),
        SentenceTransformerEmbedder("small-8", dim=8),
        SentenceTransformerEmbedder("tiny-8", dim=7),
        SentenceTransformerEmbedder("tiny-8", dim=8, prefix="query: "),
        SentenceTransformerEmbedder("tiny-8", dim=8, revision="abc"),
    ]
    assert len({embedder.identity for embedder in made}) == len(made)
    same = SentenceTransformerEmbedder("tiny-8", dim=8, batch_size=1, device="cpu")
    assert same.identity == made[0].identity
    with pytest.raises(UsageError, match="nothing to embed"):
        same.embed([" "])


def test_what_to_install_is_told() -> None:
    if find_spec("sentence_transformers") is not None:
        pytest.skip("the library itself is installed")
    with pytest.raises(ContextError, match=r"pip install 'featurekit-spark\[semantic-st\]'"):
        SentenceTransformerEmbedder("any", dim=8)
