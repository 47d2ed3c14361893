"""Old lists merged with a search of the changed rows equal a full search, whatever changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featurekit_spark.search import FlatIndex, OldLists, merge_top_k
from featurekit_spark.search.incremental import change_between


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def draw(random: Any, kind: str, rows: int, dim: int) -> Any:
    if kind == "few":  # many equal scores
        return unit(random.integers(-1, 2, (rows, dim)) + 3 * np.eye(dim)[random.integers(0, 2, rows)])
    if kind == "long":  # scores that float32 does not hold to 6 decimals
        return (random.standard_normal((rows, dim)) * 1000).astype(np.float32)
    return unit(random.standard_normal((rows, dim)))


def full(vectors: Any, ids: Any, queries: Any, k: int) -> tuple[Any, Any]:
    return FlatIndex(vectors, ids=ids).ranked(queries, k)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["random", "few", "long"]),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 60),
    changed=st.integers(0, 12),
    gone=st.integers(0, 12),
    new=st.integers(0, 12),
    k=st.integers(1, 15),
    margin=st.integers(0, 4),
    dim=st.sampled_from([2, 5, 32]),
)
@example(kind="few", seed=0, size=4, changed=3, gone=0, new=0, k=1, margin=0, dim=2)
def test_equal_to_a_full_search(
    kind: str, seed: int, size: int, changed: int, gone: int, new: int, k: int, margin: int, dim: int
) -> None:
    random = np.random.default_rng(seed)
    former = {
        f"p{i:03}": row
        for i, row in zip(random.permutation(size), draw(random, kind, size, dim), strict=True)
    }
    now = dict(former)
    for name, row in zip(
        random.permutation(list(now))[: min(changed, size)], draw(random, kind, changed, dim), strict=False
    ):
        now[str(name)] = row
    for name in random.permutation(list(now))[: min(gone, size)]:
        del now[str(name)]
    now |= {
        f"p{i:03}": row
        for i, row in zip(random.integers(0, 99, new), draw(random, kind, new, dim), strict=True)
    }
    queries = np.stack([*draw(random, kind, 6, dim), *list(now.values())[:4]])
    (old_ids, old_vectors), (ids, vectors) = (
        (sorted(m), np.array([m[name] for name in sorted(m)], np.float32).reshape(-1, dim))
        for m in (former, now)
    )
    change = change_between(old_vectors, old_ids, vectors, ids)
    old_scores, old_rows = full(old_vectors, old_ids, queries, k + margin)
    # Margins that earlier merges left: lists longer than k end anywhere.
    old_rows[np.arange(k + margin)[None, :] >= k + random.integers(0, margin + 1, (len(queries), 1))] = -1
    old_scores[old_rows < 0] = -np.inf
    carried = [[change.kept.get(old_ids[row], -1) if row >= 0 else -1 for row in rows] for rows in old_rows]

    index = FlatIndex(vectors, ids=ids)
    old = OldLists(np.array(carried, np.int64).reshape(-1, k + margin), old_scores, k)
    scores, rows, settled = merge_top_k(index, queries, old, change)

    expected_scores, expected_rows = full(vectors, ids, queries, k + margin)
    named = rows >= 0
    np.testing.assert_array_equal(scores[named], expected_scores[named])
    np.testing.assert_array_equal(rows[named], expected_rows[named])
    assert (scores[~named] == -np.inf).all()
    np.testing.assert_array_equal(rows[settled, :k], expected_rows[settled, :k])
    lost = (old.rows < 0) & (old_scores > -np.inf)
    assert settled[~lost.any(axis=1)].all()
    spare = (old_scores > -np.inf).sum(axis=1) - k
    assert settled[lost.sum(axis=1) <= spare].all(), "a margin makes up for as many members"


@pytest.mark.parametrize("margin", [0, 1])
def test_a_list_that_lost_nothing_is_settled_where_new_ones_of_its_last_score_come_first(margin: int) -> None:
    queries = np.array([[1, 0]], np.float32)
    old_vectors, vectors = np.tile(queries, (2, 1)), np.tile(queries, (4, 1))
    change = change_between(old_vectors, ["c", "d"], vectors, ["a", "b", "c", "d"])
    lists = [[{"product_id": name, "score": 1.0} for name in "cd"[: 1 + margin]]]
    old = OldLists.of(lists, 1, change.kept, margin=margin)
    scores, rows, settled = merge_top_k(FlatIndex(vectors, ids=["a", "b", "c", "d"]), queries, old, change)
    assert rows.tolist() == [list(range(1 + margin))] and (scores == 1.0).all() and settled.all()


def test_a_list_that_lost_a_member_is_settled_where_new_rows_fill_it() -> None:
    queries = np.array([[1, 0]], np.float32)
    former = unit(np.array([[1.0, 0.1], [1.0, 0.5], [1.0, 2.0]]))
    ids = ["a", "b", "c"]

    def settled(new: list[float]) -> bool:
        vectors = np.concatenate([former[1:], unit(np.array([new]))])
        change = change_between(former, ids, vectors, ["b", "c", "d"])
        old = OldLists(
            np.array([[-1, 0]]), np.round((former[:2] @ queries[0]).astype(np.float64), 6)[None], 2
        )
        return bool(merge_top_k(FlatIndex(vectors), queries, old, change)[2][0])

    assert settled([1.0, 0.2])  # better than b, which was last in a list of two
    assert not settled([1.0, 1.9])  # worse than b: somebody in between may have been left out of the list
