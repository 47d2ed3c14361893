"""Search part by part equals one search over all rows: ids, order and scores, however the rows are cut."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search import FlatIndex
from featurekit_spark.search.blocks import Part
from featurekit_spark.search.partitioned import Lists, PartTask, merge_lists, search_part, search_parts
from tests.property.test_search import data


def cut(ids: list[str], vectors: Any, ends: list[int]) -> list[Part]:
    """Parts that end at `ends`; two equal ends make an empty part."""
    bounds = [0, *sorted(min(end, len(ids)) for end in ends), len(ids)]
    return [Part(tuple(ids[a:b]), vectors[a:b], a) for a, b in pairwise(bounds)]


def whole(ids: list[str], vectors: Any, queries: Any, k: int, **options: Any) -> tuple[Any, Any]:
    metric = options.pop("metric", "ip")
    scores, rows = FlatIndex(vectors, metric=metric, ids=ids).search(queries, k, **options)
    return scores, [[ids[row] if row >= 0 else None for row in own] for own in rows.tolist()]


def assert_equal(found: Lists, expected: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(found.scores.astype(np.float32), expected[0])
    assert found.ids.tolist() == expected[1]


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["random", "duplicated", "near", "integers", "scaled"]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    ends=st.lists(st.integers(0, 300), max_size=6),
    k=st.integers(1, 40),
    metric=st.sampled_from(["ip", "cosine"]),
    excluded=st.sampled_from(["none", "one", "lists"]),
    order=st.sampled_from(["sorted", "shuffled"]),
    masked=st.sampled_from(["no", "one", "groups"]),
)
def test_parts_equal_the_whole(
    kind: Any,
    seed: int,
    rows: int,
    ends: list[int],
    k: int,
    metric: Any,
    excluded: str,
    order: str,
    masked: str,
) -> None:
    queries, vectors, random = data(kind, seed, rows, 6, 16)
    ids = [f"p{i:04}" for i in (range(rows) if order == "sorted" else random.permutation(rows))]
    exclude = {
        "none": None,
        "one": random.integers(-1, rows, len(queries)),
        "lists": [random.integers(0, rows, size) for size in random.integers(0, 9, len(queries))],
    }[excluded]
    options: dict[str, Any] = {"metric": metric, "exclude": exclude}
    if masked == "one":
        options["mask"] = random.random(rows) < 0.4
    elif masked == "groups":
        options |= {"mask": random.random((3, rows)) < 0.4, "groups": random.integers(0, 3, len(queries))}
    found = search_parts(cut(ids, vectors, ends), queries, k, **options)
    assert_equal(found, whole(ids, vectors, queries, k, **options))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 5),
    k=st.integers(1, 8),
    cuts=st.integers(1, 4),
    few=st.booleans(),
)
def test_merging_in_any_grouping_is_the_same(seed: int, size: int, k: int, cuts: int, few: bool) -> None:
    random = np.random.default_rng(seed)
    names = random.permutation(4 * size * k)
    lists = []
    for i in range(cuts):
        scores = random.integers(0, 3 if few else 10**6, (size, k)) / 10
        scores[random.random((size, k)) < 0.2] = -np.inf
        ids = np.array([[f"{name}" for name in names[i * k : (i + 1) * k]]] * size, dtype=object)
        ids[scores == -np.inf] = None
        lists.append(Lists(scores, ids))
    at_once = merge_lists(lists, k)
    one_by_one = Lists.empty(size, k)
    for found in random.permutation(len(lists)):
        one_by_one = merge_lists([lists[found], one_by_one], k)
    assert at_once.ids.tolist() == one_by_one.ids.tolist()
    assert at_once.scores.tolist() == one_by_one.scores.tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ends=st.lists(st.integers(0, 120), max_size=4),
    k=st.integers(1, 9),
    size=st.integers(1, 20),
)
def test_a_task_finds_the_same_in_any_order_and_again(seed: int, ends: list[int], k: int, size: int) -> None:
    """Rows of several parts, shuffled and cut into batches, as a task of Spark may get them, twice."""
    queries, vectors, random = data("duplicated", seed, 120, 6, 8)
    ids = [f"p{i:03}" for i in range(120)]
    parts = cut(ids, vectors, ends)
    pairs = random.permutation([(query, part) for query in range(len(queries)) for part in range(len(parts))])
    rows = pa.table(
        {
            "key": pa.array(pairs[:, 0]),
            "vector": pa.array([queries[query].tobytes() for query in pairs[:, 0]], pa.binary()),
            "part": pa.array(pairs[:, 1], pa.int32()),
            "exclude": pa.array([[ids[query], ids[119 - query]] for query in pairs[:, 0]]),
        }
    )
    task = pickle.loads(pickle.dumps(PartTask(parts.__getitem__, k)))
    once, again = (
        pa.Table.from_batches(task(rows.to_batches(max_chunksize=size))).to_pylist() for _ in range(2)
    )
    assert once == again
    scores, expected = whole(ids, vectors, queries, k, exclude=[[q, 119 - q] for q in range(len(queries))])
    for query in range(len(queries)):
        hits = sorted(
            (hit["cost"], hit["product_id"]) for row in once if row["key"] == query for hit in row["hits"]
        )
        assert [hit for _, hit in hits[:k]] == [member for member in expected[query] if member is not None]
        assert [np.float32(-cost) for cost, _ in hits[:k]] == [s for s in scores[query] if s > -np.inf]


def test_scores_that_float32_cannot_tell_apart_are_ordered() -> None:
    vectors = np.array([[3000.0, 1e-4], [3000.0, 2e-4], [3000.0, 3e-4]], np.float32)
    queries = np.array([[3000.0, 1.0]], np.float32)
    found = search_parts(cut(["a", "b", "c"], vectors, [1, 2]), queries, 3)
    assert found.ids.tolist() == [["c", "b", "a"]]
    assert_equal(found, whole(["a", "b", "c"], vectors, queries, 3))


def test_no_parts_no_queries_and_an_empty_part() -> None:
    nothing = Part((), np.empty((0, 4), np.float32))
    queries = np.ones((2, 4), np.float32)
    for parts in ([], [nothing]):
        assert search_parts(parts, queries, 3).ids.tolist() == [[None] * 3] * 2
    one = Part(("a",), np.ones((1, 4), np.float32))
    assert search_parts([one], queries[:0], 3).ids.shape == (0, 3)
    assert search_part(one, queries, 3).ids.tolist() == [["a", None, None]] * 2


def test_what_the_kernel_refuses_is_refused() -> None:
    part = Part(("a", "b"), np.array([[1, 0], [np.nan, 0]], np.float32))
    with pytest.raises(DataError, match="'b'"):
        search_parts([part], np.ones((1, 2), np.float32), 1)
    with pytest.raises(UsageError, match="k must be at least 1"):
        search_parts([], np.ones((1, 2), np.float32), 0)
