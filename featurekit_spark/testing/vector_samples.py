"""Rows, filters and checks for tests of vector indexes. Needs no test framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featurekit_spark.search.filters import And, Equals, Filter, In, Or, Range
from featurekit_spark.search.index import Hit, IndexSpec

__all__ = ["DIM", "FILTERS", "ODD_IDS", "SPEC", "assert_as_reference", "assert_raises", "sample"]

DIM = 8
SPEC = IndexSpec(
    DIM, "ip", {"brand": "str", "stock": "int", "price": "float", "New": "bool"}, source="vectors of a test"
)
ODD_IDS = (
    "a b",
    "ü/Ö",
    "日本",
    "🙂",
    "it's",
    'say "x"',
    "back\\slash",
    "line\nbreak",
    "100%",
    "`tick`",
    "[0]",
    "--",
    "null",
)


def sample(rows: int, *, seed: int = 0, dim: int = DIM) -> tuple[list[str], Any, list[dict[str, Any]]]:
    """ids, vectors of unit length and payloads; some fields are null."""
    numbers = np.random.default_rng(seed)
    vectors = numbers.standard_normal((rows, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    brands = ("Sony", "LG", "it's", 'b"q', "Ünï", None)
    payloads: list[dict[str, Any]] = [
        {
            "brand": brands[row % len(brands)],
            "stock": row % 7 - 2 if row % 5 else None,
            "price": float(row) / 4 if row % 4 else None,
            "New": row % 2 == 0 if row % 3 else None,
        }
        for row in range(rows)
    ]
    return [f"p-{row:05}" for row in range(rows)], vectors, payloads


FILTERS: tuple[Filter, ...] = (
    Equals("brand", "Sony"),
    Equals("brand", "it's"),
    Equals("brand", "nobody's"),
    Equals("stock", -2),
    Equals("price", 2.5),
    Equals("price", 3),
    Equals("New", True),
    Equals("New", False),
    In("brand", ("LG", 'b"q', "Ünï")),
    In("stock", (0, 1, 99)),
    In("price", (0.25, 2.5)),
    In("New", (False,)),
    In("brand", ()),
    Range("stock", gt=0, lte=3),
    Range("price", gte=2.5, lt=7),
    Range("price", lt=1e-9),
    And(Equals("brand", "Sony"), Range("price", gte=1.0)),
    Or(Equals("brand", "LG"), Equals("New", True)),
    And(Or(Equals("brand", "LG"), Equals("brand", "Sony")), Or(Range("stock", lt=1), Equals("New", True))),
    And(),
    Or(),
    Or(Equals("brand", "LG"), And()),
    And(Equals("brand", "LG"), Or()),
)


def assert_as_reference(
    found: list[list[Hit]],
    ids: Sequence[str],
    vectors: Any,
    queries: Any,
    k: int,
    *,
    cosine: bool = False,
    told: object = None,
    tolerance: float = 0.0,
) -> None:
    """`found` equals a search that compares all rows in float64."""
    exact = np.asarray(queries, dtype=np.float64) @ np.asarray(vectors, dtype=np.float64).reshape(-1, DIM).T
    if cosine:
        exact = exact / np.linalg.norm(np.asarray(queries, np.float64), axis=1)[:, None]
        exact = exact / np.linalg.norm(np.asarray(vectors, np.float64), axis=1)[None, :]
    exact = np.round(exact, 6)
    for hits, scores in zip(found, exact, strict=True):
        order = sorted(range(len(ids)), key=lambda place: (-scores[place], ids[place]))[:k]
        own = dict(zip(ids, scores.tolist(), strict=True))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True), told
        assert np.allclose(
            [hit.score for hit in hits],
            [scores[place] for place in order],
            rtol=0,
            atol=tolerance + 1e-12,
        ), told
        assert all(abs(hit.score - own[hit.id]) <= tolerance + 1e-12 for hit in hits), told
        if not tolerance:
            assert [hit.id for hit in hits] == [ids[place] for place in order], told


def assert_raises(kind: type[BaseException], ask: Any, *given: Any, told: Sequence[str] = ()) -> None:
    """`ask(*given)` raises `kind`, and its message has the words `told`."""
    message = None
    try:
        ask(*given)
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__} for {given!r}"
    assert all(word in message for word in told), message
