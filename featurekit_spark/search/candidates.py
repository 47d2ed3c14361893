"""Candidates of a search: pairs (query, matrix row) that may belong to a query's best, kept until exact scores decide.

Owns the running k-th best score of each query and the order of answers. Knows neither vectors nor products of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from featurekit_spark.search.arguments import Doubles, Floats, Rows

__all__ = ["Best", "Candidates", "lower_bound"]

Score: TypeAlias = Callable[[Rows, Rows], Doubles]  # exact scores of pairs (query, matrix row)
Rank: TypeAlias = Callable[[Rows], Rows]  # places of matrix rows in the order of their ids

HELD = 2_000_000  # candidates that are held before they are thinned out (many equal rows)


class Best:
    """The k best float32 scores so far of each query, in no order."""

    def __init__(self, queries: int, k: int) -> None:
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)

    def least(self) -> Floats:
        """The k-th best of each query; -inf where fewer were seen."""
        least: Floats = self.scores.min(axis=1)
        return least

    def take(self, rows: Rows, values: Floats) -> None:
        """Take in new scores, given query by query."""
        if not len(rows):
            return
        k = self.scores.shape[1]
        starts = np.flatnonzero(np.append(True, rows[1:] != rows[:-1]))
        counts = np.diff(np.append(starts, len(rows)))
        widest = int(counts.max())
        touched = rows[starts]
        packed = np.full((len(touched), k + widest), -np.inf, dtype=np.float32)
        packed[:, :k] = self.scores[touched]
        at = np.repeat(np.arange(len(touched)) * (k + widest) + k - starts, counts) + np.arange(len(rows))
        packed.ravel()[at] = values
        packed.partition(widest, axis=1)
        self.scores[touched] = packed[:, widest:]


def lower_bound(scores: Floats, k: int, groups: int) -> Floats:
    """A lower bound of the k-th largest of each row: the k-th largest of the maxima of disjoint groups of columns."""
    width = scores.shape[1]
    fold = width // groups
    if fold > 1:
        scores = scores[:, : fold * groups].reshape(len(scores), fold, groups).max(axis=1)
    if scores.shape[1] < k:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    place = scores.shape[1] - k
    bound: Floats = np.partition(scores, place, axis=1)[:, place]
    return bound


class Candidates:
    """Candidates of some queries, as flat arrays of (query, matrix row, float32 score)."""

    def __init__(self, k: int, score: Score, rank: Rank, held: int) -> None:
        self._k, self._score, self._rank = k, score, rank
        self._limit = held
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
        exact = self._score(rows, columns)
        order = np.lexsort((self._rank(columns), -exact, rows))
        sorted_rows = rows[order]
        starts = np.flatnonzero(np.append(True, sorted_rows[1:] != sorted_rows[:-1])) if len(rows) else rows
        counts = np.diff(np.append(starts, len(rows)))
        places = np.arange(len(rows)) - np.repeat(starts, counts)
        inside = places < self._k
        chosen = order[inside]
        return exact[chosen], places[inside], chosen
