"""Top-k after a matrix changed: old lists merged with a search of the changed rows alone, equal to a full search.

Knows matrices and ranked lists; who kept the old lists, and that they are the old matrix's, is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featurekit_spark.search.kernel import DECIMALS, FlatIndex, Floats, Rows

__all__ = ["Change", "OldLists", "change_between", "merge_top_k"]

_COMPARED = 4096  # rows at a time
Doubles: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Change:
    """From one matrix to another: `kept`, id -> row in the new one, of those with one vector in both; `fresh`,
    rows of the new one that are not kept, and `index` over those (None where there are none)."""

    kept: Mapping[str, int]
    fresh: Rows
    index: FlatIndex | None


@dataclass(frozen=True)
class OldLists:
    """Ranked lists of the old matrix, k places each: `rows` int64 [q, k] in the new matrix, -1 for a member that is not
    kept or an empty place; `scores` float64 [q, k], -inf at an empty place."""

    rows: Rows
    scores: Doubles

    @classmethod
    def of(cls, lists: Iterable[Sequence[Mapping[str, Any]]], k: int, kept: Mapping[str, int]) -> OldLists:
        """Lists of {"product_id", "score"}, the best first."""
        lists = list(lists)
        rows = np.full((len(lists), k), -1, dtype=np.int64)
        scores = np.full((len(lists), k), -np.inf)
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        places = np.arange(k)[None, :] < lengths[:, None]
        rows[places] = [kept.get(hit["product_id"], -1) for found in lists for hit in found]
        scores[places] = [hit["score"] for found in lists for hit in found]
        return cls(rows, scores)


def merge_top_k(
    index: FlatIndex, queries: Floats, old: OldLists, change: Change
) -> tuple[Doubles, Rows, Mask]:
    """(scores float64 [q, k], rows int64 [q, k], settled bool [q]); only settled lists are right.

    `index` is the whole new matrix. A list that lost members is settled where enough of what is left or new ranks
    before everything that the old list had no place for.
    """
    k = old.rows.shape[1]
    lost = ((old.rows < 0) & (old.scores > -np.inf)).any(axis=1)
    scores, rows = np.where(old.rows < 0, -np.inf, old.scores), old.rows
    # What an old list had no place for scores at most as much as its last member; a list with empty places had all.
    unseen = old.scores[:, -1]
    if change.index is not None:
        found, at = change.index.search(queries, min(k, len(change.fresh)), floor=unseen)
        fresh_scores = np.round(found.astype(np.float64), DECIMALS)
        scores = np.concatenate([scores, fresh_scores], axis=1)
        rows = np.concatenate([rows, np.where(at < 0, -1, change.fresh[at])], axis=1)
    order = np.lexsort((index.rank_of(rows), -scores), axis=-1)[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    certain = (order < k) & (best > -np.inf) | (best > unseen[:, None])
    settled = ~lost | (unseen == -np.inf) | certain.all(axis=1)
    return best, np.take_along_axis(rows, order, axis=1), settled


def change_between(former: Floats, row_of: Mapping[str, int], vectors: Floats, ids: Sequence[str]) -> Change:
    """What makes the matrix (vectors, ids) of a former one (its vectors, and the row of each of its ids)."""
    before = np.fromiter((row_of.get(member, -1) for member in ids), dtype=np.int64, count=len(ids))
    same = before >= 0
    if former.shape[1] != vectors.shape[1]:
        same[:] = False
    rows = np.flatnonzero(same)
    for start in range(0, len(rows), _COMPARED):
        part = rows[start : start + _COMPARED]
        same[part] = (former[before[part]] == vectors[part]).all(axis=1)
    fresh = np.flatnonzero(~same)
    kept = {ids[row]: row for row in np.flatnonzero(same).tolist()}
    index = FlatIndex(vectors[fresh], ids=[ids[row] for row in fresh.tolist()]) if len(fresh) else None
    return Change(kept, fresh, index)
