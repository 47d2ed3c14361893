from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search import FlatIndex, candidates, top_k
from featurekit_spark.search.blocks import Part
from featurekit_spark.search.partitioned import search_parts

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
    with pytest.raises(UsageError, match="row numbers"):
        top_k(EYE, EYE, 1, exclude=np.array([0.5, 1, 2, 3]))
    with pytest.raises(UsageError, match="row numbers, found bool"):
        top_k(EYE, EYE, 1, exclude=np.ones(4, dtype=bool))
    everything = [np.arange(4)] * 4
    assert (top_k(EYE, EYE, 2, exclude=everything)[1] == -1).all()


@pytest.mark.parametrize("of", [np.array, list], ids=["array", "list"])
@pytest.mark.parametrize(
    "wrong", [np.eye(4, dtype=bool), np.eye(4) / 2, np.eye(4).astype(str), np.zeros(4, bool)]
)
def test_what_holds_no_row_numbers_is_refused(wrong: Any, of: Any) -> None:
    with pytest.raises(UsageError, match="must hold row numbers, found"):
        top_k(EYE, EYE, 1, exclude=of(wrong))
    part = Part(tuple("abcd"), EYE)
    with pytest.raises(UsageError, match="must hold row numbers, found"):
        search_parts([part], EYE, 1, exclude=of(wrong))


def test_float32_holds_the_scores_of_unit_vectors() -> None:
    rows = np.random.default_rng(1).standard_normal((500, 7))
    index = FlatIndex(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    scores, found = index.search(index.vectors[:99], 500)
    exact, same = index.ranked(index.vectors[:99], 500)
    assert np.array_equal(found, same)
    assert np.round(scores.astype(np.float64), 6).tobytes() == exact.tobytes()


def test_many_equal_rows_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "HELD", 100)
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


def test_vectors_of_another_dimension_are_named() -> None:
    ragged = [[1.0, 0.0], [1.0], [0.0, 1.0], [1.0, 2.0, 3.0]]
    with pytest.raises(DataError, match=r"most have 2, not so 'b', 'd'"):
        FlatIndex(ragged, ids=["a", "b", "c", "d"])
    with pytest.raises(DataError, match="queries 1, queries 3"):
        top_k(ragged, EYE, 1)
    with pytest.raises(UsageError, match="found list"):
        FlatIndex([["a", "b"]])


def test_numbers_that_float32_does_not_hold_are_refused() -> None:
    with pytest.raises(DataError, match="row 1"):
        FlatIndex([[1.0, 0.0], [1e300, 1.0]])
    with pytest.raises(DataError, match="row 0"):
        FlatIndex([[1e-300, 0.0], [1.0, 1.0]])


def test_tiny_vectors_have_a_direction() -> None:
    matrix = (EYE * 1e-42).astype(np.float32)
    assert top_k(EYE, matrix, 1, metric="cosine")[1].tolist() == [[0], [1], [2], [3]]
    scores, rows = top_k(-matrix, matrix, 1)
    assert rows.tolist() == [[0]] * 4, "all score 0"
    assert not np.signbit(scores).any()


def test_no_rows_and_no_queries_of_any_kind() -> None:
    for metric in ("ip", "cosine"):
        index = FlatIndex([], metric=metric, ids=[])  # type: ignore[arg-type]
        assert index.search(EYE, 3)[1].tolist() == [[-1] * 3] * 4
        assert index.search([], 3)[1].shape == (0, 3)
        mask = np.zeros((2, 0), dtype=bool)
        assert index.search(EYE, 3, mask=mask, groups=np.array([0, 1, 1, 0]))[1].tolist() == [[-1] * 3] * 4
    nobody = np.empty(0, dtype=np.int64)
    scores, rows = top_k([], EYE, 2, exclude=nobody, mask=np.ones((3, 4), bool), groups=nobody)
    assert scores.shape == rows.shape == (0, 2)
    assert top_k([], EYE, 2, exclude=[])[0].dtype == np.float32


def test_k_up_to_the_size_and_beyond() -> None:
    random = np.random.default_rng(3)
    matrix = random.standard_normal((300, 4)).astype(np.float32)
    _, all_rows = top_k(matrix[:3], matrix, 300)
    assert (np.sort(all_rows, axis=1) == np.arange(300)).all()
    scores, rows = top_k(matrix[:3], matrix, 1_000)
    assert (rows[:, :300] == all_rows).all() and (rows[:, 300:] == -1).all()
    assert np.isneginf(scores[:, 300:]).all()


def test_a_filter_for_all_queries() -> None:
    mask = np.array([True, False, True, False])
    assert top_k(EYE, EYE, 3, mask=mask)[1].tolist() == [[0, 2, -1], [0, 2, -1], [2, 0, -1], [0, 2, -1]]
    nothing = top_k(EYE, EYE, 2, mask=np.zeros(4, dtype=bool))
    assert (nothing[1] == -1).all() and np.isneginf(nothing[0]).all()


def test_a_filter_for_each_group_of_queries() -> None:
    mask = np.array([[True, True, False, False], [False, False, True, True], [False] * 4])
    groups = np.array([1, 0, 1, 2])
    exclude = np.array([-1, 1, 2, 0])
    found = top_k(EYE, EYE, 2, mask=mask, groups=groups, exclude=exclude)[1]
    assert found.tolist() == [[2, 3], [0, -1], [3, -1], [-1, -1]]


def test_filters_of_large_groups_and_of_one_query_each() -> None:
    random = np.random.default_rng(5)
    matrix = random.standard_normal((500, 8)).astype(np.float32)
    queries = random.standard_normal((300, 8)).astype(np.float32)
    index = FlatIndex(matrix)
    mask = random.random((300, 500)) < 0.3
    for groups in (np.arange(300), np.arange(300) % 3, random.integers(0, 100, 300) // 60 * 60):
        found = index.search(queries, 5, mask=mask, groups=groups)[1]
        for query in range(0, 300, 37):
            alone = index.search(queries[query : query + 1], 5, mask=mask[groups[query]])[1]
            assert found[query].tolist() == alone[0].tolist()


def test_filters_that_do_not_fit_are_told() -> None:
    two = np.ones((2, 4), dtype=bool)
    with pytest.raises(UsageError, match=r"mask must be bool \[4\].*int64 \[4\]"):
        top_k(EYE, EYE, 1, mask=np.arange(4))
    with pytest.raises(UsageError, match=r"found bool \[3\]"):
        top_k(EYE, EYE, 1, mask=np.ones(3, dtype=bool))
    with pytest.raises(UsageError, match="goes with groups"):
        top_k(EYE, EYE, 1, mask=two)
    with pytest.raises(UsageError, match="give mask"):
        top_k(EYE, EYE, 1, groups=np.zeros(4, dtype=np.int64))
    with pytest.raises(UsageError, match="4 numbers, one per query"):
        top_k(EYE, EYE, 1, mask=two, groups=np.zeros(3, dtype=np.int64))
    with pytest.raises(UsageError, match="rows 0 to 1 of the mask, found -1 to 2"):
        top_k(EYE, EYE, 1, mask=two, groups=np.array([0, -1, 2, 0]))


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
