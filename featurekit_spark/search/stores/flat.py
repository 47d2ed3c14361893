"""A vector index in this process's memory: exact, and gone with the process. Filters are masks over the payload."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

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

    def __init__(self, rows: dict[str, Row]) -> None:
        self.rows = rows
        self.mask = lru_cache(_FILTERS)(self._mask)

    @cached_property
    def sorted(self) -> list[Row]:
        return [self.rows[name] for name in sorted(self.rows)]

    def index(self, metric: Metric) -> FlatIndex:
        vectors = np.stack([row.vector for row in self.sorted])
        return FlatIndex(vectors, metric=metric, ids=[row.id for row in self.sorted])

    def _mask(self, wanted: Filter) -> Mask:
        return np.array([matches(wanted, row.payload) for row in self.sorted], dtype=np.bool_)


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
        self._generations.setdefault(generation, _Searched({}))

    def drop(self, generation: str) -> None:
        self._generations.pop(generation, None)

    def finish(self, generation: str, spec: IndexSpec) -> None:
        pass

    def put(self, generation: str, spec: IndexSpec, rows: Sequence[Row]) -> None:
        with self._lock:  # a search goes on with the rows it began with
            self._generations[generation] = _Searched(
                {**self._rows(generation), **{row.id: row for row in rows}}
            )

    def remove(self, generation: str, ids: Sequence[str]) -> None:
        gone = set(ids)
        with self._lock:
            left = {name: row for name, row in self._rows(generation).items() if name not in gone}
            self._generations[generation] = _Searched(left)

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
        index = searched.index(spec.metric)
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

    def _searched(self, generation: str) -> _Searched:
        if generation not in self._generations:
            raise GenerationGoneError(f"generation {generation} is gone; search again")
        return self._generations[generation]

    def _rows(self, generation: str) -> dict[str, Row]:
        return self._searched(generation).rows
