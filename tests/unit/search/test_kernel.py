from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search import FlatIndex, kernel, top_k

EYE = np.eye(4, dtype=np.float32)


def test_best_first_and_padded() -> None:
    matrix = np.array([[1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
    scores, rows = top_k(matrix[:1], matrix, 5)
    assert rows.tolist() == [[0, 1, 2, -1, -1]]
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    np.testing.assert_allclose(scores[0], [1, 0.6, 0, -np.inf, -np.inf])


def test_an_empty_matrix_and_no_queries() -> None:
    scores, rows = top_k(EYE, np.empty((0, 4), np.float32), 2)
    assert (rows == -1).all() and np.isneginf(scores).all()
    assert top_k(np.empty((0, 4), np.float32), EYE, 2)[1].shape == (0, 2)


def test_ties_go_by_id() -> None:
    matrix = np.repeat(EYE[:1], 4, axis=0)
    assert top_k(EYE[:1], matrix, 3)[1].tolist() == [[0, 1, 2]]
    assert top_k(EYE[:1], matrix, 3, ids=["d", "a", "c", "b"])[1].tolist() == [[1, 3, 2]]


def test_cosine_ignores_length() -> None:
    matrix = np.array([[10, 1], [1, 0], [0.001, 0.001]], dtype=np.float32)
    scores, rows = top_k(np.array([[5, 5]], np.float32), matrix, 3, metric="cosine")
    assert rows.tolist() == [[2, 0, 1]]
    assert scores[0, 0] == 1


def test_exclusion() -> None:
    assert top_k(EYE, EYE, 1, exclude=np.array([0, -1, 2, 3]))[1].tolist() == [[1], [1], [0], [0]]
    lists: list[Any] = [[0, 1], [], [3], [0, 1, 2, 3]]
    assert top_k(EYE, EYE, 2, exclude=lists)[1].tolist() == [[2, 3], [1, 0], [2, 0], [-1, -1]]
    with pytest.raises(UsageError, match="3 items for 4 queries"):
        top_k(EYE, EYE, 1, exclude=np.array([0, 1, 2]))
    with pytest.raises(UsageError, match="names row 4"):
        top_k(EYE, EYE, 1, exclude=np.array([0, 1, 2, 4]))


def test_many_equal_rows_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_POOL", 100)
    matrix = np.repeat(EYE, 500, axis=0)
    _, rows = top_k(EYE, matrix, 3)
    assert rows.tolist() == [[500 * i, 500 * i + 1, 500 * i + 2] for i in range(4)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_vectors_without_a_direction_are_named(bad: float) -> None:
    matrix = EYE.copy()
    matrix[2] = bad
    with pytest.raises(DataError, match="'c'"):
        FlatIndex(matrix, ids=["a", "b", "c", "d"])
    with pytest.raises(DataError, match="query 2"):
        top_k(matrix, EYE, 1)


def test_products_that_overflow_are_refused() -> None:
    with pytest.raises(DataError, match="overflow"):
        top_k(EYE * 1e20, EYE * 1e20, 1)
    assert top_k(EYE * 1e20, EYE * 1e20, 1, metric="cosine")[1].tolist() == [[0], [1], [2], [3]]


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(UsageError, match="4 dimensions, the matrix has 3"):
        top_k(EYE, EYE[:, :3] + 1, 1)
    with pytest.raises(UsageError, match=r"found shape \(4,\)"):
        top_k(EYE[0], EYE, 1)
    with pytest.raises(UsageError, match="k must be"):
        top_k(EYE, EYE, 0)
    with pytest.raises(UsageError, match="2 ids for 4 rows"):
        top_k(EYE, EYE, 1, ids=["a", "b"])
    with pytest.raises(UsageError, match="Known: cosine, ip"):
        top_k(EYE, EYE, 1, metric="l2")  # type: ignore[arg-type]
