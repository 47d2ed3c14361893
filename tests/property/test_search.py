"""Search equals a brute-force float64 reference, whatever the batch, the blocks, the filters or the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.search import FlatIndex, kernel, top_k

Kind = Literal["random", "duplicated", "near", "decimals", "integers", "scaled", "tiny", "huge", "zeros"]
KINDS: list[Kind] = [
    "random",
    "duplicated",
    "near",
    "decimals",
    "integers",
    "scaled",
    "tiny",
    "huge",
    "zeros",
]


def reference(queries: Any, matrix: Any, k: int, ids: Any, metric: str, allowed: Any) -> tuple[Any, Any]:
    """Scores and rows; `allowed` bool [q, n]."""
    scores, rows = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
    norms = np.sqrt(np.square(matrix, dtype=np.float64).sum(axis=1))
    for at, query in enumerate(queries.astype(np.float64)):
        exact = [(query * row).sum() for row in matrix.astype(np.float64)]
        if metric == "cosine":
            own = np.sqrt(np.square(query).sum())
            exact = [score / (own * norm) for score, norm in zip(exact, norms, strict=True)]
        ranked = sorted((-np.round(exact[i], 6), ids[i], i) for i in np.flatnonzero(allowed[at]))[:k]
        for place, (score, _, row) in enumerate(ranked):
            scores[at, place], rows[at, place] = -score, row
    return scores, rows


def data(kind: Kind, seed: int, rows: int, queries: int, dim: int) -> Any:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, dim))
    if kind == "duplicated":
        matrix = matrix[random.integers(0, max(1, rows // 8), rows)]
    elif kind == "near":  # within rounding of each other
        matrix = matrix[:1] + random.standard_normal((rows, dim)) * 1e-7
    elif kind == "decimals":  # scores equal to about 6 decimals
        matrix = matrix[:1] + random.standard_normal((rows, dim)) * 1e-6
    elif kind == "integers":
        matrix = random.integers(-1, 2, (rows, dim)) + np.eye(rows, dim)
        matrix[~matrix.any(axis=1)] = 1
    elif kind == "zeros":  # some of them negative
        matrix[random.random((rows, dim)) < 0.7] = -0.0
        matrix[:, 0] = np.where(matrix.any(axis=1), matrix[:, 0], 1)
    asked = np.concatenate([random.standard_normal((queries, dim)), matrix[: queries // 2]])
    if kind in ("scaled", "tiny", "huge"):
        matrix *= 10.0 ** random.integers(-3, 4, (rows, 1))
        matrix *= {"scaled": 1, "tiny": 1e-40, "huge": 1e25}[kind]
    else:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
    return asked.astype(np.float32), matrix.astype(np.float32), random


@contextmanager
def blocks(queries: int, scores: int, rows: int) -> Iterator[None]:
    with patch.multiple(kernel, _QUERIES=queries, _SCORES=scores, _LEAST_ROWS=rows):
        yield


BLOCKS = st.tuples(
    st.sampled_from([1, 4, 2048]), st.sampled_from([1, 100, 1 << 21]), st.sampled_from([1, 16, 512])
)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    k=st.one_of(st.integers(1, 30), st.integers(250, 350)),
    dim=st.sampled_from([1, 2, 7, 64]),
    metric=st.sampled_from(["ip", "cosine"]),
    shape=BLOCKS,
    filtered=st.sampled_from(["no", "one", "groups", "large groups"]),
)
def test_equal_to_brute_force(
    kind: Kind, seed: int, rows: int, k: int, dim: int, metric: Any, shape: Any, filtered: str
) -> None:
    queries, matrix, random = data(kind, seed, rows, 6, dim)
    ids = random.permutation(rows).tolist()
    exclude = random.integers(-1, rows, len(queries))
    mask = groups = None
    allowed = np.arange(rows)[None, :] != exclude[:, None]
    if filtered == "one":
        mask = random.random(rows) < random.choice([0.0, 0.1, 0.9, 1.0])
        allowed &= mask
    elif filtered != "no":
        groups = random.integers(0, 3, len(queries))
        mask = random.random((4, rows)) < random.choice([0.0, 0.1, 0.9], (4, 1))
        allowed &= mask[groups]
    index = FlatIndex(matrix, metric=metric, ids=ids)
    own = 2 if filtered == "large groups" else 64
    with blocks(*shape), patch("featurekit_spark.search.arguments._OWN", own):
        scores, found = index.ranked(queries, k, exclude=exclude, mask=mask, groups=groups)
    expected, places = reference(queries, matrix, k, ids, metric, allowed)
    assert found.tolist() == places.tolist()
    np.testing.assert_array_equal(scores, expected)
    short, same = top_k(queries, matrix, k, metric=metric, ids=ids, exclude=exclude, mask=mask, groups=groups)
    assert short.dtype == np.float32 and same.tolist() == places.tolist()
    np.testing.assert_array_equal(short, expected.astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12), shape=BLOCKS)
def test_a_query_alone_and_in_any_batch(kind: Kind, seed: int, k: int, shape: Any) -> None:
    queries, matrix, random = data(kind, seed, 1500, 40, 48)
    index = FlatIndex(matrix)
    scores, found = index.search(queries, k)
    for row in range(0, len(queries), 7):
        alone = index.search(queries[row : row + 1], k)
        assert alone[0].tobytes() == scores[row : row + 1].tobytes()
        assert alone[1].tolist() == found[row : row + 1].tolist()
    order = random.permutation(len(queries))
    with blocks(shape[0], max(shape[1], 100), max(shape[2], 16)):
        mixed = index.search(queries[order], k)
    assert mixed[0].tobytes() == scores[order].tobytes()
    assert mixed[1].tolist() == found[order].tolist()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    k=st.integers(1, 20),
    cuts=st.integers(0, 6),
    metric=st.sampled_from(["ip", "cosine"]),
)
def test_partitions_merge_to_the_whole(
    kind: Kind, seed: int, rows: int, k: int, cuts: int, metric: Any
) -> None:
    queries, matrix, random = data(kind, seed, rows, 6, 24)
    ids = random.permutation(rows)
    scores, found = FlatIndex(matrix, metric=metric, ids=ids.tolist()).ranked(queries, k)
    bounds = [0, *sorted(random.integers(0, rows + 1, cuts).tolist()), rows]
    lists: list[tuple[Any, Any]] = []
    for start, stop in pairwise(bounds):
        part = FlatIndex(matrix[start:stop], metric=metric, ids=ids[start:stop].tolist())
        best, at = part.ranked(queries, k)
        lists.append((best, np.where(at < 0, -1, at + start)))
    merged = np.concatenate([best for best, _ in lists], axis=1)
    at = np.concatenate([where for _, where in lists], axis=1)
    order = np.lexsort((ids[at], -merged), axis=-1)[:, :k]
    assert np.take_along_axis(at, order, axis=1).tolist() == found.tolist()
    np.testing.assert_array_equal(np.take_along_axis(merged, order, axis=1), scores)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12))
def test_a_floor_leaves_out_nothing_at_or_above_it(kind: Kind, seed: int, k: int) -> None:
    queries, matrix, random = data(kind, seed, 300, 8, 16)
    index = FlatIndex(matrix)
    scores, found = index.ranked(queries, k)
    floor = scores[np.arange(len(queries)), random.integers(0, k, len(queries))]
    floor[random.random(len(queries)) < 0.2] = -np.inf
    above, at = index.ranked(queries, k, floor=floor)
    wanted = scores >= floor[:, None]
    assert at[wanted].tolist() == found[wanted].tolist()
    np.testing.assert_array_equal(above[wanted], scores[wanted])
