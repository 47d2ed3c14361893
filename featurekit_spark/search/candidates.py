"""Candidates of a search: pairs (query, matrix row) that may belong to a query's best, kept until exact scores decide.

Owns the running k-th best score of each query and the order of answers. Knows neither vectors nor products of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from featurekit_spark.search.arguments import Doubles, Floats, Mask, Rows

__all__ = ["Best", "Candidates", "Finder", "lower_bound"]

Score: TypeAlias = Callable[[Rows, Rows], Doubles]  # exact scores of pairs (query, matrix row)
Rank: TypeAlias = Callable[[Rows], Rows]  # places of matrix rows in the order of their ids

HELD = 2_000_000  # candidates that are held before they are thinned out (many equal rows)
_GROUPS, _GROUPED, _FOLD = (
    256,
    8,
    16,
)  # groups of columns: at least, for each of the k wanted; most columns of one
_BUFFER = 256  # numbers in numpy's buffer while rows are compared
_PADDED = 4  # times the memory that is spent to sort all queries' candidates at once


class Best:
    """The k best float32 scores of each query so far, in no order, and the `least` of them; -inf where fewer are."""

    def __init__(self, queries: int, k: int) -> None:
        self._scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.least: Floats = np.full(queries, -np.inf, dtype=np.float32)

    def take(self, rows: Rows, values: Floats) -> None:
        """Take in new scores, given query by query."""
        k = self._scores.shape[1]
        counts = np.bincount(rows)
        touched = np.flatnonzero(counts)
        counts = counts[touched]
        widest = int(counts.max())
        packed = np.full((len(touched), k + widest), -np.inf, dtype=np.float32)
        packed[:, :k] = self._scores[touched]
        at = np.arange(len(touched)) * (k + widest) + k - (np.cumsum(counts) - counts)
        packed.ravel()[np.repeat(at, counts) + np.arange(len(rows))] = values
        packed.partition(widest, axis=1)
        self._scores[touched] = packed[:, widest:]
        self.least[touched] = packed[:, widest]


def lower_bound(scores: Floats, k: int) -> Floats:
    """A lower bound of the k-th largest of each row: the k-th largest of the maxima of disjoint groups of columns."""
    width = scores.shape[1]
    groups = max(_GROUPS, _GROUPED * k, width // _FOLD)
    maxima = scores[:, :groups].copy()
    for start in range(groups, width - groups + 1, groups):
        np.maximum(maxima, scores[:, start : start + groups], out=maxima)
    if maxima.shape[1] < k:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    place = maxima.shape[1] - k
    maxima.partition(place, axis=1)
    bound: Floats = maxima[:, place].copy()
    return bound


class Finder:
    """Finds what lies above a bar, in arrays that are kept from block to block: new memory costs as much as a pass."""

    def __init__(self) -> None:
        self._scores, self._some = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.float32)
        self._marks = np.empty(0, dtype=np.bool_)
        self._crowded = True

    def room(self, rows: int, width: int) -> Floats:
        """An array [rows, width] for scores, the same memory each time."""
        size = rows * width
        if len(self._scores) < size:
            self._scores, self._marks = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.bool_)
        return self._scores[:size].reshape(rows, width)

    def above(self, scores: Floats, bar: Floats) -> tuple[Rows, Rows]:
        """(row, column) of the scores above the bar of their row, row by row."""
        count, width = scores.shape
        lively: Rows | None = None
        if not self._crowded:
            # The largest of each row is found by reading alone; to compare each with its row's bar is to write as well.
            lively = np.flatnonzero(scores.max(axis=1) > bar)
            if 3 * len(lively) > 2 * count:
                lively = None
            else:  # few rows have any: only those are looked through
                if len(self._some) < len(lively) * width:
                    self._some = np.empty(2 * count * width // 3 + width, dtype=np.float32)
                some = self._some[: len(lively) * width].reshape(len(lively), width)
                scores, bar = np.take(scores, lively, axis=0, out=some, mode="clip"), bar[lively]
        marks = self._marks[: scores.size]
        # numpy copies what is broadcast over rows shorter than its buffer, which takes longer than to compare.
        before = np.setbufsize(_BUFFER)
        try:
            np.greater(scores, bar[:, None], out=marks.reshape(scores.shape))
        finally:
            np.setbufsize(before)
        flat = _marked(marks)
        rows = flat // width
        columns = flat - rows * width
        self._crowded = len(rows) > count
        return rows if lively is None else lively[rows], columns


def _marked(marks: Mask) -> Rows:
    """As flatnonzero, where few are marked: looks at eight at once, then at those eight."""
    eights = len(marks) // 8
    found = np.flatnonzero(marks[: 8 * eights].view(np.uint64) != 0)
    flat = np.flatnonzero(marks[: 8 * eights].reshape(eights, 8)[found])
    eight = flat >> 3
    flat += (found[eight] - eight) << 3
    if 8 * eights < len(marks):
        flat = np.append(flat, 8 * eights + np.flatnonzero(marks[8 * eights :]))
    return flat


class Candidates:
    """Candidates of some queries, as flat arrays of (query, matrix row, float32 score)."""

    def __init__(self, queries: int, k: int, score: Score, rank: Rank) -> None:
        self._queries, self._k, self._score, self._rank = queries, k, score, rank
        self._limit = max(HELD, 4 * k * queries)
        self._parts: list[tuple[Rows, Rows, Floats]] = []
        self._held = 0

    def add(self, rows: Rows, columns: Rows, values: Floats, bar: Floats) -> None:
        """Add pairs that lie above the bar of their queries. Thins out what is held where there is much."""
        self._parts.append((rows, columns, values))
        self._held += len(rows)
        if self._held > self._limit:
            self._keep(*self._above(bar))
            if self._held > self._limit // 2:
                rows, columns, values = self._parts[0]
                _, _, chosen = self._ranked(rows, columns)
                self._keep(rows[chosen], columns[chosen], values[chosen])

    def best(self, bar: Floats) -> tuple[Rows, Rows, Rows, Doubles]:
        """(query, place, matrix row, exact score) of the k best of each query; place 0 is the best."""
        rows, columns, _ = self._above(bar)
        exact, places, chosen = self._ranked(rows, columns)
        return rows[chosen], places, columns[chosen], exact

    def _above(self, bar: Floats) -> tuple[Rows, Rows, Floats]:
        if not self._parts:
            none = np.empty(0, dtype=np.int64)
            return none, none, np.empty(0, dtype=np.float32)
        kept = [values > bar[rows] for rows, _, values in self._parts]
        rows, columns, values = (
            np.concatenate([part[i][keep] for part, keep in zip(self._parts, kept, strict=True)])
            for i in range(3)
        )
        return rows, columns, values

    def _keep(self, rows: Rows, columns: Rows, values: Floats) -> None:
        self._parts, self._held = [(rows, columns, values)], len(rows)

    def _ranked(self, rows: Rows, columns: Rows) -> tuple[Doubles, Rows, Rows]:
        """Of the k best of each query, query by query: exact score, place, and which of the given pairs it is."""
        order = np.argsort(rows.astype(np.uint16) if self._queries < 1 << 16 else rows, kind="stable")
        rows, columns = rows[order], columns[order]
        counts = np.bincount(rows, minlength=self._queries)
        exact, rank = self._score(rows, columns), self._rank(columns)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        widest = int(counts.max(initial=0))
        if self._queries * widest <= _PADDED * len(rows):  # small sorts side by side
            at = rows * widest + places
            keys = np.full((2, self._queries * widest), np.inf)
            keys[0, at], keys[1, at] = rank, -exact
            sorts = np.lexsort(keys.reshape(2, self._queries, widest), axis=-1)[:, : self._k]
            inside = np.arange(sorts.shape[1]) < np.minimum(counts, self._k)[:, None]
            chosen = (sorts + (np.cumsum(counts) - counts)[:, None])[inside]
            places = np.nonzero(inside)[1]
        else:
            chosen = np.lexsort((rank, -exact, rows))
            inside = places < self._k
            chosen, places = chosen[inside], places[inside]
        return exact[chosen], places, order[chosen]
