"""A vector index in this process's memory: exact, and gone with the process. Filters are masks over the payload."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np

from featurekit_spark.search.arguments import Floats, Mask
from featurekit_spark.search.filters import Filter, matches
from featurekit_spark.search.generation_store import Candidates, GenerationGoneError, Live
from featurekit_spark.search.generations import StoredIndex
from featurekit_spark.search.index import IndexSpec, Row
from featurekit_spark.search.kernel import FlatIndex, Metric

__all__ = ["FlatVectorIndex"]

_FILTERS = 16  # filters whose rows are kept


class FlatVectorIndex(StoredIndex):
    """Exact search over rows in memory; other stores are measured against it."""

    def __init__(self, spec: IndexSpec) -> None:
        super().__init__(_Memory(), spec)


class _Searched:
    """The rows of one moment, and for each filter a mask of those that meet it."""

    def __init__(self, rows: dict[str, Row], metric: Metric) -> None:
        self.rows, self.metric = rows, metric
        self._masks: dict[Filter, Mask] = {}

    @cached_property
    def sorted(self) -> list[Row]:
        return [self.rows[name] for name in sorted(self.rows)]

    @cached_property
    def index(self) -> FlatIndex:
        vectors = np.stack([row.vector for row in self.sorted])
        return FlatIndex(vectors, metric=self.metric, ids=[row.id for row in self.sorted])

    def mask(self, wanted: Filter) -> Mask:
        if wanted not in self._masks:
            if len(self._masks) >= _FILTERS:
                self._masks.clear()
            met = [matches(wanted, row.payload) for row in self.sorted]
            self._masks[wanted] = np.array(met, dtype=np.bool_)
        return self._masks[wanted]


class _Memory:
    place = "memory of this process"
    exact = True

    def __init__(self) -> None:
        self._live: Live | None = None
        self._generations: dict[str, _Searched] = {}
        self._lock = threading.Lock()

    def live(self) -> Live | None:
        return self._live

    def publish(self, live: Live) -> None:
        self._live = live

    def generations(self) -> list[str]:
        return list(self._generations)

    def create(self, generation: str, spec: IndexSpec) -> None:
        self._generations.setdefault(generation, _Searched({}, spec.metric))

    def drop(self, generation: str) -> None:
        self._generations.pop(generation, None)

    def finish(self, generation: str, spec: IndexSpec) -> None:
        pass

    def tidy(self, generation: str) -> None:
        pass

    def put(self, generation: str, spec: IndexSpec, rows: Sequence[Row]) -> None:
        self._change(generation, lambda there: {**there, **{row.id: row for row in rows}})

    def remove(self, generation: str, ids: Sequence[str]) -> None:
        gone = set(ids)
        self._change(generation, lambda there: {name: row for name, row in there.items() if name not in gone})

    def hashes(self, generation: str, ids: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        rows = self._rows(generation)
        return iter([(name, rows[name].hash) for name in (rows if ids is None else ids) if name in rows])

    def count(self, generation: str, wanted: Filter | None) -> int:
        rows = self._rows(generation)
        return len(rows) if wanted is None else sum(matches(wanted, row.payload) for row in rows.values())

    def check(self, wanted: Filter) -> None:
        pass  # it can do all of them

    def candidates(
        self, generation: str, spec: IndexSpec, queries: Floats, limit: int, wanted: Filter | None
    ) -> list[Candidates]:
        searched = self._searched(generation)
        rows = searched.sorted
        if not rows:
            return [Candidates([], np.empty((0, spec.dim), np.float32), np.empty(0), []) for _ in queries]
        index = searched.index
        mask = None if wanted is None else searched.mask(wanted)
        scores, places = index.search(queries, min(limit, len(rows)), mask=mask)
        return [
            Candidates(
                [rows[at].id for at in found],
                index.vectors[found],
                own[: len(found)].astype(np.float64),
                [rows[at].payload for at in found],
            )
            for found, own in zip((row[row >= 0] for row in places), scores, strict=True)
        ]

    def close(self) -> None:
        pass

    def _change(self, generation: str, change: Callable[[dict[str, Row]], dict[str, Row]]) -> None:
        with self._lock:  # a search goes on with the rows it began with
            before = self._searched(generation)
            self._generations[generation] = _Searched(change(before.rows), before.metric)

    def _searched(self, generation: str) -> _Searched:
        if generation not in self._generations:
            raise GenerationGoneError(f"generation {generation} is gone; search again")
        return self._generations[generation]

    def _rows(self, generation: str) -> dict[str, Row]:
        return self._searched(generation).rows
