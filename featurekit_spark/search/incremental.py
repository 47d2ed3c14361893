"""Top-k after a matrix changed: old lists merged with a search of the changed rows alone, equal to a full search.

Knows matrices and ranked lists; who kept the old lists, and that they are the old matrix's, is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from featurekit_spark.errors import UsageError
from featurekit_spark.search.arguments import Decoded, Doubles, Floats, Mask, Rows
from featurekit_spark.search.ids import Ids
from featurekit_spark.search.kernel import FlatIndex

__all__ = ["Change", "OldLists", "change_between", "merge_top_k"]

_COMPARED = 4096  # rows at a time
_FEW = 4096  # changed rows that may be copied and searched, whatever their share


@dataclass(frozen=True)
class Change:
    """From one matrix to another: `kept`, id -> row in the new one, of those with one vector in both; `fresh`,
    rows of the new one that are not kept, and `index` over those (None where there are none).

    `too_large`: lists are searched anew rather than merged; there is no index then, and nothing is kept."""

    kept: Mapping[str, int]
    fresh: Rows
    index: FlatIndex | None
    too_large: bool = False


@dataclass(frozen=True)
class OldLists:
    """Ranked lists of the old matrix, as many places each: `rows` int64 [q, places] in the new matrix, -1 for a member
    that is not kept or an empty place; `scores` float64 [q, places], -inf at an empty place.

    `k`: a list of fewer members names every row that there was; one of k or more may be followed by others. Lists may
    have more places than k, filled or not: a margin, from which a list that lost members fills up.
    """

    rows: Rows
    scores: Doubles
    k: int

    @classmethod
    def of(
        cls, lists: Iterable[Sequence[Mapping[str, Any]]], k: int, kept: Mapping[str, int], *, margin: int = 0
    ) -> OldLists:
        """Lists of {"product_id", "score"}, the best first, at most `k + margin` long."""
        lists = list(lists)
        rows = np.full((len(lists), k + margin), -1, dtype=np.int64)
        scores = np.full(rows.shape, -np.inf)
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        places = np.arange(k + margin)[None, :] < lengths[:, None]
        rows[places] = [kept.get(hit["product_id"], -1) for hit in chain.from_iterable(lists)]
        scores[places] = [hit["score"] for hit in chain.from_iterable(lists)]
        return cls(rows, scores, k)

    def unseen(self) -> Doubles:
        """What rows that a list does not name score at most, where they rank after its last; -inf: there were none."""
        lengths = np.count_nonzero(self.scores > -np.inf, axis=1)
        if not len(lengths):
            return np.empty(0)
        last = np.take_along_axis(self.scores, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(lengths < self.k, -np.inf, last)


def merge_top_k(
    index: FlatIndex, queries: Floats, old: OldLists, change: Change
) -> tuple[Doubles, Rows, Mask]:
    """(scores float64 [q, places], rows int64 [q, places], settled bool [q]): lists of the new matrix.

    `index` is the whole new matrix. What a list names is right, place by place, and ends where something that the old
    list had no place for could come next; the rest is -inf and -1. `settled`: k places are right, or all there are.
    """
    if change.too_large:
        raise UsageError(f"{len(change.fresh)} rows changed: too many to merge; search the new matrix")
    places = old.rows.shape[1]
    survives = old.rows >= 0
    scores, rows = np.where(survives, old.scores, -np.inf), old.rows
    unseen = old.unseen()
    if change.index is not None:
        fresh_scores, at = change.index.ranked(queries, min(places, len(change.fresh)), floor=unseen)
        scores = np.concatenate([scores, fresh_scores], axis=1)
        rows = np.concatenate([rows, np.where(at < 0, -1, change.fresh[at])], axis=1)
    order = np.lexsort((index.rank_of(rows), -scores), axis=-1)
    best = np.take_along_axis(scores, order, axis=1)
    # Certain: up to the last member that survives, as the unseen rank after it, also where new ones push it out of the
    # list; and what scores more than they do.
    of_old = (order < places) & (best > -np.inf)
    certain = np.logical_or.accumulate(of_old[:, ::-1], axis=1)[:, ::-1] | (best > unseen[:, None])
    right, best = np.logical_and.accumulate(certain, axis=1)[:, :places], best[:, :places]
    found = np.where(right, np.take_along_axis(rows, order[:, :places], axis=1), -1)
    settled = (np.count_nonzero(right, axis=1) >= old.k) | (unseen == -np.inf)
    return np.where(right, best, -np.inf), found, settled


def change_between(
    former: Floats | Decoded,
    former_ids: Sequence[str],
    vectors: Floats | Decoded,
    ids: Sequence[str],
    *,
    most: float = 1.0,
) -> Change:
    """What makes the matrix (vectors, ids) of a former one; too large where more than the share `most` of the rows
    changed, and more than a few thousand."""
    before = _places(ids, former_ids)
    same = before >= 0
    if former.shape[1] != vectors.shape[1]:
        same[:] = False
    rows = np.flatnonzero(same)
    for start in range(0, len(rows), _COMPARED):
        part = rows[start : start + _COMPARED]
        same[part] = (_some(former, before[part]) == _some(vectors, part)).all(axis=1)
    fresh = np.flatnonzero(~same)
    if len(fresh) > max(_FEW, most * len(ids)):
        return Change({}, fresh, None, too_large=True)
    kept = {ids[row]: row for row in np.flatnonzero(same).tolist()}
    index = FlatIndex(vectors[fresh], ids=[ids[row] for row in fresh.tolist()]) if len(fresh) else None
    return Change(kept, fresh, index)


def _places(ids: Sequence[str], among: Sequence[str]) -> Rows:
    """Where ids are among others, -1 where they are not; without a text object for each of a mapped matrix's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts, others = (
        some.to_arrow() if isinstance(some, Ids) else pa.array(some, pa.large_string())
        for some in (ids, among)
    )
    found: Rows = (
        pc.index_in(texts, value_set=others).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    return found


def _some(vectors: Floats | Decoded, rows: Rows) -> Floats:
    """Some rows, in ascending order for the most part; not copied where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (np.diff(rows) == 1).all():
        return vectors[first : last + 1]
    return vectors[rows]
