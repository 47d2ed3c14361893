"""Exact top-k by inner product or cosine: float32 matrix products to find candidates, float64 to rank them.

Owns the promise that a query's answer does not depend on the queries beside it, nor on how rows are blocked.
Knows arrays only.

The last bits of a float32 product depend on block shapes, so it only proposes: every row within the proven
rounding error of a query's k-th best score stays a candidate. Candidates are scored in float64, one row at a
time, rounded to 6 decimals, and ordered by score, then by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search.arguments import (
    Decoded,
    Doubles,
    Floats,
    Mask,
    Part,
    Rows,
    as_vectors,
    chunk_rows,
    chunks,
    excluded_pairs,
    lengths,
    parts,
    ranks,
    unit_rows,
)
from featurekit_spark.search.candidates import Best, Candidates, Finder, lower_bound

__all__ = ["Doubles", "FlatIndex", "Floats", "Mask", "Metric", "Rows", "top_k"]

Metric = Literal["ip", "cosine"]

DECIMALS = 6
_QUERIES = 1024  # queries in one product, at most
_SCORES = 1 << 22  # scores in one product: large enough for the product's speed, small enough for the caches
_LEAST_ROWS = 512  # rows in one product, at least
_PLACES = 1 << 20  # places of answers in the works at a time: fewer queries at once where k is large
_UNIT = 2.0**-24  # unit roundoff of float32


def top_k(
    queries: Any,
    matrix: Any,
    k: int,
    *,
    metric: Metric = "ip",
    ids: Sequence[Any] | None = None,
    exclude: Rows | Sequence[Any] | None = None,
    mask: Mask | None = None,
    groups: Rows | None = None,
) -> tuple[Floats, Rows]:
    """The k best rows of `matrix` [n, d] for each of `queries` [q, d]: scores float32 [q, k], row numbers
    int64 [q, k].

    Best first; equal scores (to 6 decimals) in order of `ids`, else of row numbers; padded with -inf and -1
    where fewer than k rows are left. `exclude`: a row number to leave out for each query (-1: none), or an
    array of them for each. `mask`: bool [n], the rows that may be found; or [g, n], where `groups` int [q] names
    each query's row of it. Raises DataError, naming the ids, for vectors that are zero or not finite or of another
    dimension than the rest; UsageError for wrong shapes.

    A matrix that is searched more than once is better kept as a FlatIndex, which checks it once.
    """
    index = FlatIndex(matrix, metric=metric, ids=ids)
    return index.search(queries, k, exclude=exclude, mask=mask, groups=groups)


class FlatIndex:
    """A checked matrix, ready to be searched many times. `vectors` may be a memory-mapped array.

    `norms` float64 [n]: the rows' lengths, of a matrix that was checked before; `order` then takes the place of `ids`:
    int64 [n], each row's place in the order of ids, None where that is the order of rows.
    """

    def __init__(
        self,
        vectors: Any,
        *,
        metric: Metric = "ip",
        ids: Sequence[Any] | None = None,
        norms: Doubles | None = None,
        order: Rows | None = None,
    ) -> None:
        if metric not in ("ip", "cosine"):
            raise UsageError(f"metric {metric!r} is not known. Known: cosine, ip.")
        if ids is not None and len(ids) != len(vectors):
            raise UsageError(f"{len(ids)} ids for {len(vectors)} rows; give one id per row")
        self.vectors = vectors if isinstance(vectors, Decoded) else as_vectors(vectors, "matrix", ids)
        self.metric = metric
        self._norms = lengths(self.vectors, "row", ids) if norms is None else norms
        self._rank = ranks(ids) if norms is None else order
        self.largest = float(self._norms.max()) if len(self._norms) and metric == "ip" else 1.0
        self.searched = self.vectors if metric == "ip" else unit_rows(self.vectors, self._norms)

    def search(
        self,
        queries: Any,
        k: int,
        *,
        exclude: Rows | Sequence[Any] | None = None,
        mask: Mask | None = None,
        groups: Rows | None = None,
        floor: Doubles | None = None,
    ) -> tuple[Floats, Rows]:
        """As `top_k`. `floor` float64 [q]: rows that score less than this may be left out; -inf for none."""
        scores, found = self.ranked(queries, k, exclude=exclude, mask=mask, groups=groups, floor=floor)
        return scores.astype(np.float32), found

    def ranked(
        self,
        queries: Any,
        k: int,
        *,
        exclude: Rows | Sequence[Any] | None = None,
        mask: Mask | None = None,
        groups: Rows | None = None,
        floor: Doubles | None = None,
    ) -> tuple[Doubles, Rows]:
        """As `search`, with the rounded float64 scores that decide the order: what lists are merged by."""
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k!r}")
        asked = as_vectors(queries, "queries")
        size, dim = self.vectors.shape
        if asked.shape[1] != dim and size and len(asked):
            raise UsageError(
                f"queries have {asked.shape[1]} dimensions, the matrix has {dim}; use one embedder for both"
            )
        norms = lengths(asked, "query", None)
        if self.metric == "ip" and len(asked) and self.largest * norms.max() > np.finfo(np.float32).max:
            raise DataError("inner products overflow float32: scale the vectors, or use metric='cosine'")
        left_out = excluded_pairs(exclude, len(asked), size)
        scores = np.full((len(asked), k), -np.inf)
        found = np.full((len(asked), k), -1, dtype=np.int64)
        at_once = max(1, min(_QUERIES, _PLACES // min(k, size + 1)))
        finder = Finder()
        for part in parts(len(asked), size, mask, groups, at_once):
            members = part.members
            search = _Search(self, asked[members], norms[members], k, part)
            if search.rows:
                search.leave_out(*_of_members(left_out, members, len(asked)))
                rows, places, columns, exact = search.best(None if floor is None else floor[members], finder)
                at = rows + members.start if isinstance(members, slice) else members[rows]
                scores[at, places], found[at, places] = exact, columns
        return scores, found

    def rank_of(self, columns: Rows) -> Rows:
        """Places of matrix rows in the order of their ids."""
        return columns if self._rank is None else self._rank[columns]

    def exact(self, queries: Floats, norms: Doubles, rows: Rows, columns: Rows) -> Doubles:
        """Scores of pairs (query row, matrix row) in float64, rounded; each pair for itself."""
        scores, dim = np.empty(len(rows)), self.vectors.shape[1]
        asked, products = queries.astype(np.float64), np.empty((chunk_rows(dim), dim))
        for part in chunks(len(rows), dim):
            some = rows[part]
            product = np.take(asked, some, axis=0, out=products[: len(some)], mode="clip")
            product *= self.vectors[columns[part]]
            # numpy's own sum over a row: its order of additions is the same on every machine.
            product.sum(axis=1, out=scores[part])
        if self.metric == "cosine":
            scores /= norms[rows] * self._norms[columns]
        return np.round(scores, DECIMALS) + 0.0  # no -0.0


class _Search:
    """The search of one part of the queries."""

    def __init__(self, index: FlatIndex, queries: Floats, norms: Doubles, k: int, part: Part) -> None:
        self._index, self._queries, self._norms, self._part = index, queries, norms, part
        self.rows = len(index.vectors) if part.rows is None else len(part.rows)
        self._k = min(k, self.rows)
        self._left_out: tuple[Rows, Rows] = (np.empty(0, dtype=np.int64),) * 2

    def leave_out(self, rows: Rows, columns: Rows) -> None:
        """Pairs (query of this part, matrix row) that must not be found."""
        allowed = self._part.rows
        if allowed is not None and len(columns):
            at = np.searchsorted(allowed, columns)
            there = allowed[np.minimum(at, self.rows - 1)] == columns
            rows, columns = rows[there], at[there]
        order = np.argsort(columns, kind="stable")
        self._left_out = rows[order], columns[order]

    def best(self, floor: Doubles | None, finder: Finder) -> tuple[Rows, Rows, Rows, Doubles]:
        """(query, place, matrix row, score) of all answers."""
        index, count, k = self._index, len(self._queries), self._k
        ip = index.metric == "ip"
        wanted = self._queries if ip else unit_rows(self._queries, self._norms)
        # |error| of a float32 inner product is at most d * u * |q||m| (Higham 2002, 3.1), with a few u for
        # scaling. Twice, for the k-th best and for the rival, and the rounding to 6 decimals.
        error = (index.vectors.shape[1] + 8) * _UNIT * index.largest * (self._norms if ip else np.ones(count))
        slack = (2 * error + 10.0**-DECIMALS).astype(np.float32)
        # Where nothing below a floor is asked for, it is as if k rows of that score were there already.
        bar = np.full(count, -np.inf, dtype=np.float32)
        lowest = bar if floor is None else np.nextafter(floor.astype(np.float32), bar)
        if floor is not None:
            bar = lowest - slack
        best = Best(count, k)
        found = Candidates(count, k, partial(index.exact, self._queries, self._norms), index.rank_of)
        width = max(_LEAST_ROWS, _SCORES // count)
        for start in range(0, self.rows, width):
            got = self._products(wanted, start, min(start + width, self.rows), finder)
            if start == 0 and (floor is None or np.isneginf(floor).any()):
                bar = np.maximum(bar, lower_bound(got, k) - slack)
            rows, columns = finder.above(got, bar)
            if len(rows):
                values = got[rows, columns]
                best.take(rows, values)
                bar = np.maximum(best.least, lowest) - slack
                columns += start
                found.add(rows, columns if self._part.rows is None else self._part.rows[columns], values, bar)
        return found.best(bar)

    def _products(self, wanted: Floats, start: int, stop: int, finder: Finder) -> Floats:
        """Inner products with some of the rows that may be found; -inf for pairs that are left out."""
        part = self._part
        some = slice(start, stop) if part.rows is None else part.rows[start:stop]
        got = finder.room(len(wanted), stop - start)
        searched = self._index.searched
        if isinstance(searched, Decoded):
            searched.products(wanted, some, got)
        else:
            np.matmul(wanted, searched[some].T, out=got)
        if part.filters is not None and part.group is not None:
            got[~part.filters[part.group[:, None], some]] = -np.inf
        rows, columns = self._left_out
        if len(columns):
            here = slice(*np.searchsorted(columns, (start, stop)))
            got[rows[here], columns[here] - start] = -np.inf
        return got


def _of_members(pairs: tuple[Rows, Rows], members: slice | Rows, queries: int) -> tuple[Rows, Rows]:
    """Those of the pairs (query, matrix row), in order of queries, whose query is a member, named by its place."""
    rows, columns = pairs
    if isinstance(members, slice):
        here = slice(*np.searchsorted(rows, (members.start, members.stop)))
        return rows[here] - members.start, columns[here]
    place = np.full(queries, -1)
    place[members] = np.arange(len(members))
    at = place[rows]
    return at[at >= 0], columns[at >= 0]
