"""Exact top-k by inner product or cosine: float32 matrix products to find candidates, float64 to rank them.

Owns the promise that a query's answer does not depend on the queries beside it, nor on how rows are blocked.
Knows arrays only.

The last bits of a float32 product depend on block shapes, so it only proposes: every row within the proven
rounding error of a query's k-th best score stays a candidate. Candidates are scored in float64, one row at a
time, rounded to 6 decimals, and ordered by score, then by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import DataError, UsageError

__all__ = ["FlatIndex", "top_k"]

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.int64]
Metric = Literal["ip", "cosine"]

DECIMALS = 6
_QUERIES = 512  # queries in one product
_FIRST = 512  # rows in the first products; doubled up to _ROWS as thresholds rise
_ROWS = 4096
_POOL = 2_000_000  # candidates of one block of queries before they are settled early (many equal rows)
_RESCORE = 4096  # pairs scored at a time
_UNIT = 2.0**-24  # unit roundoff of float32


def top_k(
    queries: Any,
    matrix: Any,
    k: int,
    *,
    metric: Metric = "ip",
    ids: Sequence[Any] | None = None,
    exclude: Rows | Sequence[Any] | None = None,
) -> tuple[Floats, Rows]:
    """The k best rows of `matrix` [n, d] for each of `queries` [q, d]: scores float32 [q, k], row numbers
    int64 [q, k].

    Best first; equal scores (to 6 decimals) in order of `ids`, else of row numbers; padded with -inf and -1
    where fewer than k rows are left. `exclude`: a row number to leave out for each query (-1: none), or an
    array of them for each. Raises DataError, naming the ids, for vectors that are zero or not finite;
    UsageError for wrong shapes.
    """
    return FlatIndex(matrix, metric=metric, ids=ids).search(queries, k, exclude=exclude)


class FlatIndex:
    """A checked matrix, ready to be searched many times. `vectors` may be a memory-mapped array."""

    def __init__(self, vectors: Any, *, metric: Metric = "ip", ids: Sequence[Any] | None = None) -> None:
        if metric not in ("ip", "cosine"):
            raise UsageError(f"metric {metric!r} is not known. Known: cosine, ip.")
        self.vectors = _matrix(vectors, "matrix")
        self.metric = metric
        rows = len(self.vectors)
        if ids is not None and len(ids) != rows:
            raise UsageError(f"{len(ids)} ids for {rows} rows; give one id per row")
        self._norms = _norms(self.vectors, "row", ids)
        self._rank = _ranks(ids)
        self._largest = float(self._norms.max()) if rows and metric == "ip" else 1.0
        self._searched = self.vectors if metric == "ip" else _scaled(self.vectors, self._norms)

    def search(
        self,
        queries: Any,
        k: int,
        *,
        exclude: Rows | Sequence[Any] | None = None,
        floor: Doubles | None = None,
    ) -> tuple[Floats, Rows]:
        """As `top_k`. `floor` float64 [q]: rows that score less than this may be left out; -inf for none."""
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k!r}")
        asked = _matrix(queries, "queries")
        size, dim = self.vectors.shape
        if asked.shape[1] != dim and size:
            raise UsageError(
                f"queries have {asked.shape[1]} dimensions, the matrix has {dim}; use one embedder for both"
            )
        norms = _norms(asked, "query", None)
        if self.metric == "ip" and len(asked) and self._largest * norms.max() > np.finfo(np.float32).max:
            raise DataError("inner products overflow float32: scale the vectors, or use metric='cosine'")
        left_out = _exclusions(exclude, len(asked), size)
        scores = np.full((len(asked), k), -np.inf, dtype=np.float32)
        found = np.full((len(asked), k), -1, dtype=np.int64)
        if size:
            for start in range(0, len(asked), _QUERIES):
                part = slice(start, start + _QUERIES)
                out = tuple(x[(left_out[0] >= start) & (left_out[0] < start + _QUERIES)] for x in left_out)
                self._search_block(
                    asked[part],
                    norms[part],
                    min(k, size),
                    (out[0] - start, out[1]),
                    None if floor is None else floor[part],
                    scores[part],
                    found[part],
                )
        return scores, found

    def _search_block(
        self,
        queries: Floats,
        norms: Doubles,
        k: int,
        left_out: tuple[Rows, Rows],
        floor: Doubles | None,
        scores: Floats,
        found: Rows,
    ) -> None:
        """Fill `scores` and `found` for one block of queries."""
        size, dim = self.vectors.shape
        lengths = norms if self.metric == "ip" else np.ones_like(norms)
        wanted = queries if self.metric == "ip" else _scaled(queries, norms)
        # |error| of a float32 inner product is at most d * u * |q||m| (Higham 2002, 3.1), with a few u for
        # scaling. Twice, for the k-th best and for the rival, and the rounding to 6 decimals.
        slack = (2 * (dim + 8) * _UNIT * self._largest * lengths + 10.0**-DECIMALS).astype(np.float32)
        # Where nothing below a floor is asked for, it is as if k rows of that score were there already.
        lowest = (
            np.float32(-np.inf)
            if floor is None
            else np.nextafter(floor.astype(np.float32), np.float32(-np.inf))
        )
        best = np.full((len(queries), k), -np.inf, dtype=np.float32)
        bar = np.full(len(queries), -np.inf, dtype=np.float32)
        pool = _Pool(self, queries, norms, k)
        buffer = np.empty(len(queries) * _ROWS, dtype=np.float32)
        start, width = 0, _FIRST
        while start < size:
            stop = min(start + width, size)
            got = buffer[: len(queries) * (stop - start)].reshape(len(queries), stop - start)
            np.matmul(wanted, self._searched[start:stop].T, out=got)
            if len(left_out[0]):
                here = (left_out[1] >= start) & (left_out[1] < stop)
                got[left_out[0][here], left_out[1][here] - start] = -np.inf
            if start == 0:
                best = _largest_of(np.concatenate([best, got], axis=1), k)
                bar = np.maximum(best.min(axis=1), lowest) - slack
                flat = np.flatnonzero(got > bar[:, None])
                rows, columns = np.divmod(flat, stop - start)
                pool.add(rows, columns, got.ravel()[flat])
            else:
                flat = np.flatnonzero(got > bar[:, None])
                if len(flat):
                    rows, columns = np.divmod(flat, stop - start)
                    values = got.ravel()[flat]
                    pool.add(rows, columns + start, values)
                    _raise_best(best, rows, values)
                    bar = np.maximum(best.min(axis=1), lowest) - slack
            pool.shrink(bar)
            start, width = stop, min(max(stop, _FIRST), _ROWS)
        pool.shrink(bar, settle=True)
        at, place = pool.places()
        scores[at, place] = pool.exact
        found[at, place] = pool.columns

    def rank_of(self, columns: Rows) -> Rows:
        """Places of matrix rows in the order of their ids."""
        return columns if self._rank is None else self._rank[columns]

    def exact(self, queries: Floats, norms: Doubles, rows: Rows, columns: Rows) -> Doubles:
        """Scores of pairs (query row, matrix row) in float64, rounded; each pair for itself."""
        scores = np.empty(len(rows), dtype=np.float64)
        for start in range(0, len(rows), _RESCORE):
            part = slice(start, start + _RESCORE)
            products = np.multiply(queries[rows[part]], self.vectors[columns[part]], dtype=np.float64)
            scores[part] = products.sum(axis=1)
        if self.metric == "cosine":
            scores /= norms[rows] * self._norms[columns]
        return np.round(scores, DECIMALS) + 0.0  # no -0.0


class _Pool:
    """Candidates of one block of queries, as flat arrays of (query, matrix row, float32 score)."""

    def __init__(self, index: FlatIndex, queries: Floats, norms: Doubles, k: int) -> None:
        self._index, self._queries, self._norms, self._k = index, queries, norms, k
        self._parts: list[tuple[Rows, Rows, Floats]] = []
        self._held = 0
        self.rows: Rows = np.empty(0, dtype=np.int64)
        self.columns: Rows = self.rows
        self.exact: Doubles = np.empty(0)

    def add(self, rows: Rows, columns: Rows, values: Floats) -> None:
        self._parts.append((rows, columns, values))
        self._held += len(rows)

    def shrink(self, bar: Floats, *, settle: bool = False) -> None:
        """Drop what fell below the bar once there is much, or to finish; settle what remains by exact
        scores."""
        if not settle and self._held <= _POOL:
            return
        kept = [part[2] > bar[part[0]] for part in self._parts]
        rows, columns, values = (
            np.concatenate([part[i][keep] for part, keep in zip(self._parts, kept, strict=True)])
            for i in range(3)
        )
        if settle or len(rows) > _POOL // 2:
            exact = self._index.exact(self._queries, self._norms, rows, columns)
            order = np.lexsort((self._index.rank_of(columns), -exact, rows))
            order = order[_place_in_run(rows[order]) < self._k]
            rows, columns, values, self.exact = rows[order], columns[order], values[order], exact[order]
        self.rows, self.columns = rows, columns
        self._parts, self._held = [(rows, columns, values)], len(rows)

    def places(self) -> tuple[Rows, Rows]:
        """Query and place (0 is best) of each settled candidate."""
        return self.rows, _place_in_run(self.rows)


def _matrix(vectors: Any, what: str) -> Floats:
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise UsageError(f"{what} must be float32 [rows, dimensions], found shape {array.shape}")
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        array = np.ascontiguousarray(array, dtype=np.float32)
    return array


def _norms(vectors: Floats, what: str, ids: Sequence[Any] | None) -> Doubles:
    """Lengths in float64 [n]; refuses rows that have none."""
    norms = np.empty(len(vectors), dtype=np.float64)
    for start in range(0, len(vectors), _RESCORE):
        part = vectors[start : start + _RESCORE]
        norms[start : start + _RESCORE] = np.sqrt(np.square(part, dtype=np.float64).sum(axis=1))
    wrong = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(wrong):
        names = ", ".join(repr(ids[row]) if ids is not None else f"{what} {row}" for row in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"cannot search vectors that are zero or not finite: {names}{more}. Leave them out.")
    return norms


def _scaled(vectors: Floats, norms: Doubles) -> Floats:
    return (vectors / norms[:, None]).astype(np.float32)


def _ranks(ids: Sequence[Any] | None) -> Rows | None:
    """Each row's place in the order of ids; None where that is the order of rows."""
    if ids is None or all(a <= b for a, b in pairwise(ids)):
        return None
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return ranks


def _exclusions(exclude: Any, queries: int, size: int) -> tuple[Rows, Rows]:
    """Pairs (query, matrix row) to leave out."""
    if exclude is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if len(exclude) != queries:
        raise UsageError(f"exclude has {len(exclude)} items for {queries} queries; give one per query")
    if isinstance(exclude, np.ndarray) and exclude.ndim == 1 and exclude.dtype != object:
        columns = exclude.astype(np.int64)
        rows = np.arange(queries)
    else:
        lists = [np.asarray(item, dtype=np.int64).ravel() for item in exclude]
        rows = np.repeat(np.arange(queries), [len(item) for item in lists])
        columns = np.concatenate(lists) if lists else np.empty(0, dtype=np.int64)
    inside = columns >= 0
    if (columns >= size).any():
        raise UsageError(f"exclude names row {columns.max()}, but the matrix has {size} rows")
    return rows[inside], columns[inside]


def _largest_of(values: Floats, k: int) -> Floats:
    """The k largest of each row, in no order."""
    if values.shape[1] <= k:
        return values
    return np.ascontiguousarray(np.partition(values, values.shape[1] - k, axis=1)[:, -k:])


def _raise_best(best: Floats, rows: Rows, values: Floats) -> None:
    """Take new scores (grouped by row) into the k best of their rows."""
    places = _place_in_run(rows)
    firsts = np.flatnonzero(places == 0)
    touched = rows[firsts]
    packed = np.full((len(touched), int(places.max()) + 1), -np.inf, dtype=np.float32)
    packed[np.repeat(np.arange(len(touched)), np.diff(np.append(firsts, len(rows)))), places] = values
    best[touched] = _largest_of(np.concatenate([best[touched], packed], axis=1), best.shape[1])


def _place_in_run(rows: Rows) -> Rows:
    """0, 1, 2 ... within each run of equal numbers."""
    if not len(rows):
        return rows
    starts = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
    lengths = np.diff(np.append(starts, len(rows)))
    places: Rows = np.arange(len(rows)) - np.repeat(starts, lengths)
    return places
