"""Search equals a brute-force float64 reference, whatever the batch, the blocks or the data."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.search import FlatIndex, kernel

Kind = Literal["random", "duplicated", "near", "integers", "scaled"]


def reference(queries: Any, matrix: Any, k: int, ids: Any, metric: str, exclude: Any) -> Any:
    scores, rows = [], []
    for query, left_out in zip(queries.astype(np.float64), exclude, strict=True):
        exact = [float((query * row).sum()) for row in matrix.astype(np.float64)]
        if metric == "cosine":
            norms = np.sqrt(np.square(matrix, dtype=np.float64).sum(axis=1))
            own = np.sqrt(np.square(query).sum())
            exact = [score / (own * norm) for score, norm in zip(exact, norms, strict=True)]
        ranked = sorted((-round(s, 6), ids[i], i) for i, s in enumerate(exact) if i != left_out)[:k]
        gap = k - len(ranked)
        scores.append([-s for s, _, _ in ranked] + [-np.inf] * gap)
        rows.append([i for _, _, i in ranked] + [-1] * gap)
    return np.array(scores), np.array(rows)


def data(kind: Kind, seed: int, rows: int, queries: int, dim: int) -> Any:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, dim))
    if kind == "duplicated":
        matrix = matrix[random.integers(0, max(1, rows // 8), rows)]
    elif kind == "near":
        matrix = matrix[:1] + random.standard_normal((rows, dim)) * 1e-7
    elif kind == "integers":
        matrix = random.integers(-1, 2, (rows, dim)) + np.eye(rows, dim)
        matrix[~matrix.any(axis=1)] = 1
    asked = np.concatenate([random.standard_normal((queries, dim)), matrix[: queries // 2]])
    if kind == "scaled":
        matrix = matrix * 10.0 ** random.integers(-3, 4, (rows, 1))
    else:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
    return asked.astype(np.float32), matrix.astype(np.float32), random


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["random", "duplicated", "near", "integers"]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    k=st.integers(1, 30),
    dim=st.sampled_from([2, 7, 64]),
    metric=st.sampled_from(["ip", "cosine"]),
    first=st.sampled_from([1, 16, 512]),
)
def test_equal_to_brute_force(
    kind: Kind, seed: int, rows: int, k: int, dim: int, metric: Any, first: int
) -> None:
    queries, matrix, random = data(kind, seed, rows, 6, dim)
    ids = random.permutation(rows).tolist()
    exclude = random.integers(-1, rows, len(queries))
    before = kernel._FIRST, kernel._ROWS, kernel._QUERIES
    try:
        kernel._FIRST, kernel._ROWS, kernel._QUERIES = first, max(first, 64), 4
        scores, found = FlatIndex(matrix, metric=metric, ids=ids).search(queries, k, exclude=exclude)
    finally:
        kernel._FIRST, kernel._ROWS, kernel._QUERIES = before
    expected, places = reference(queries, matrix, k, ids, metric, exclude)
    assert found.tolist() == places.tolist()
    np.testing.assert_array_equal(scores, expected.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["random", "duplicated", "near", "integers", "scaled"]),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 12),
)
def test_a_query_alone_and_in_a_batch(kind: Kind, seed: int, k: int) -> None:
    queries, matrix, _ = data(kind, seed, 1500, 40, 48)
    index = FlatIndex(matrix)
    scores, found = index.search(queries, k)
    for row in range(0, len(queries), 7):
        alone = index.search(queries[row : row + 1], k)
        assert alone[0].tobytes() == scores[row : row + 1].tobytes()
        assert alone[1].tolist() == found[row : row + 1].tolist()
