"""A vector index over any store that keeps generations of rows: what is checked, what is sent, when is switched.

Owns the promises of `VectorIndex` but for those that only a store can keep: one switch, and rows that are whole. Knows
no store. Scores are float64 over the vectors that the store gives back, rounded, ties by id: so that a store's own
rounding and order do not show, wherever its candidates are complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np

from featurekit_spark.errors import ConfigError, DataError, ServiceError, UsageError
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.filters import Filter, checked_filter
from featurekit_spark.search.generation_store import Candidates, GenerationGoneError, GenerationStore, Live
from featurekit_spark.search.index import (
    Hit,
    IndexSpec,
    IndexState,
    Row,
    Written,
    checked_queries,
    checked_rows,
)
from featurekit_spark.search.kernel import DECIMALS

__all__ = ["StoredIndex"]

_MARGIN = 8  # candidates more than asked for, so that a tie at the end is seen whole
_MOST = 4096  # candidates of one query, however many tie
_QUERIES = 128  # in one request
_UNIT = 2.0**-24
_TRIES = 3
_FIRST = "first"  # the generation of an index that nobody exported as a whole
_OWN = re.compile(
    rf"{_FIRST}|[0-9a-f]{{16}}(-[0-9]+)?"
)  # as `_names` gives them; what else is there is somebody's

T = TypeVar("T")


class StoredIndex:
    """A `VectorIndex` over `store`. Without a spec it takes that of what is there."""

    def __init__(self, store: GenerationStore, spec: IndexSpec | None = None) -> None:
        self.store = store
        self._spec = spec

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store.place!r})"

    @property
    def spec(self) -> IndexSpec:
        if self._spec is None:
            live = self.store.live()
            if live is None:
                raise UsageError(
                    f"{self.store.place} holds no index yet: give a spec to make one, or export to it first"
                )
            self._spec = live.spec
        return self._spec

    def upsert(
        self, ids: Sequence[str], vectors: Any, payloads: Sequence[Mapping[str, Any]] | None = None
    ) -> Written:
        rows = checked_rows(self.spec, ids, vectors, payloads)
        live = self._live() or self._begun()
        there = dict(self.store.hashes(live.generation, [row.id for row in rows])) if rows else {}
        new = [row for row in rows if there.get(row.id) != row.hash]
        if new:
            self._unsettled(live)
            self.store.put(live.generation, live.spec, new)
        return Written(sent=len(new), same=len(rows) - len(new))

    def delete(self, ids: Sequence[str]) -> int:
        live = self._live()
        if live is None or not ids:
            return 0
        there = [name for name, _ in self.store.hashes(live.generation, list(dict.fromkeys(ids)))]
        if there:
            self._unsettled(live)
            self.store.remove(live.generation, there)
        return len(there)

    def search(
        self,
        vectors: Any,
        k: int,
        *,
        filter: Filter | None = None,  # noqa: A002
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Hit]]:
        if k < 1:
            raise UsageError(f"k must be at least 1, found {k!r}")
        queries = checked_queries(self.spec, vectors)
        if exclude is not None and len(exclude) != len(queries):
            raise UsageError(
                f"exclude has {len(exclude)} items for {len(queries)} queries; give one per query"
            )
        wanted = self._wanted(filter)
        left_out = (
            [frozenset(names) for names in exclude] if exclude is not None else [frozenset()] * len(queries)
        )
        if wanted is False or not len(queries):
            return [[] for _ in queries]

        def once(live: Live) -> list[list[Hit]]:
            found: list[list[Hit]] = []
            for start in range(0, len(queries), _QUERIES):
                part = slice(start, start + _QUERIES)
                found += self._search_block(live, queries[part], k, wanted, left_out[part])
            return found

        return self._reading(once) or [[] for _ in queries]

    def count(self, filter: Filter | None = None) -> int:  # noqa: A002
        wanted = True if filter is None else self._wanted(filter)
        if wanted is False:
            return 0
        asked = None if wanted is True else wanted
        return self._reading(lambda live: self.store.count(live.generation, asked)) or 0

    def hashes(self) -> Iterator[tuple[str, str]]:
        live = self._live()
        return iter(()) if live is None else self.store.hashes(live.generation)

    def describe(self) -> IndexState | None:
        live = self.store.live()
        if live is None:
            return None
        rows = self.store.count(live.generation, None)
        return IndexState(live.generation, live.spec, rows, live.content, self.store.exact, self.store.place)

    def replace(self, batches: Iterable[Sequence[Row]], content: str) -> Written:
        spec, live = self.spec, self.store.live()
        # The one before may be taken up again: what it still has of this content need not be sent.
        name = next(name for name in _names(spec, content) if live is None or name != live.generation)
        self.store.create(name, spec)
        there = dict(self.store.hashes(name))
        seen: set[str] = set()
        sent = 0
        for batch in batches:
            for row in batch:
                if row.id in seen:
                    raise DataError(f"id {row.id!r} is given twice; ids must be distinct")
                seen.add(row.id)
            new = [row for row in batch if there.get(row.id) != row.hash]
            if new:
                self.store.put(name, spec, new)
            sent += len(new)
        extra = [member for member in there if member not in seen]
        if extra:
            self.store.remove(name, extra)
        found = self.store.count(name, None)
        if found != len(seen):
            raise ServiceError(
                f"{self.store.place} has {found} rows of the {len(seen)} that were sent; nothing was switched. Is "
                "somebody else exporting to it? Run the export again."
            )
        self.store.finish(name, spec)
        self.store.publish(Live(name, spec, content, None if live is None else live.generation))
        for old in self.store.generations():
            if _OWN.fullmatch(old) and old not in (name, None if live is None else live.generation):
                self.store.drop(old)
        return Written(sent=sent, same=len(seen) - sent, removed=len(extra))

    def change(self, batches: Iterable[Sequence[Row]], gone: Sequence[str], content: str) -> Written:
        live = self._live() or self._begun()
        self._unsettled(live)
        sent = 0
        for batch in batches:
            if batch:
                self.store.put(live.generation, live.spec, batch)
                sent += len(batch)
        if gone:
            self.store.remove(live.generation, gone)
        self.store.tidy(live.generation)
        self.store.publish(Live(live.generation, live.spec, content, live.before))
        return Written(sent=sent, removed=len(gone))

    def close(self) -> None:
        self.store.close()

    def _live(self) -> Live | None:
        """Raises ConfigError where another kind of index is there."""
        live = self.store.live()
        if live is None or self._spec is None:
            return live
        own, there = self._spec.to_json(), live.spec.to_json()
        differing = [name for name in own if own[name] != there[name]]
        if differing:
            told = ", ".join(f"{name} {there[name]!r}, not {own[name]!r}" for name in differing)
            raise ConfigError(
                f"{self.store.place} holds an index with {told}. Export to it anew, which replaces it as a whole, or "
                "open it as it is."
            )
        return live

    def _begun(self) -> Live:
        live = Live(_FIRST, self.spec, None)
        self.store.create(_FIRST, self.spec)
        self.store.publish(live)
        return live

    def _unsettled(self, live: Live) -> None:
        """From now on it is not what an export left."""
        if live.content is not None:
            self.store.publish(Live(live.generation, live.spec, None, live.before))

    def _wanted(self, given: Filter | None) -> Filter | bool:
        wanted = checked_filter(given, self.spec.fields)
        if not isinstance(wanted, bool):
            self.store.check(wanted)
        return wanted

    def _reading(self, ask: Callable[[Live], T]) -> T | None:
        """`ask` of what is live; None where nothing is. Again where it was removed meanwhile."""
        for _ in range(_TRIES - 1):
            live = self._live()
            if live is None:
                return None
            try:
                return ask(live)
            except GenerationGoneError:
                continue
        live = self._live()
        return None if live is None else ask(live)

    def _search_block(
        self, live: Live, queries: Floats, k: int, wanted: Filter | bool, left_out: Sequence[frozenset[str]]
    ) -> list[list[Hit]]:
        asked = None if isinstance(wanted, bool) else wanted
        limit = k + max(map(len, left_out)) + _MARGIN
        if limit > _MOST:
            limit = max(1, min(limit, self.store.count(live.generation, None)))
        answers: list[list[Hit]] = [[] for _ in queries]
        left = list(range(len(queries)))
        while left:
            found = self.store.candidates(live.generation, live.spec, queries[left], limit, asked)
            unsure = []
            for place, candidates in zip(left, found, strict=True):
                answers[place], sure = _ranked(
                    live.spec, queries[place], candidates, k, left_out[place], limit
                )
                if not sure:
                    unsure.append(place)
            if not self.store.exact or limit >= _MOST:
                break
            left, limit = unsure, min(4 * limit, _MOST)
        return answers


def _ranked(
    spec: IndexSpec, query: Floats, found: Candidates, k: int, left_out: frozenset[str], limit: int
) -> tuple[list[Hit], bool]:
    """The k best, and whether no row that is not among the candidates can belong to them."""
    if not len(found.ids):
        return [], True
    # Row by row as the kernel does: equal vectors get equal scores.
    scores = np.multiply(query, found.vectors, dtype=np.float64).sum(axis=1)
    lengths = np.sqrt(np.square(found.vectors, dtype=np.float64).sum(axis=1))
    length = float(np.sqrt(np.square(query, dtype=np.float64).sum()))
    if spec.metric == "cosine":
        scores = scores / (length * lengths)
    scores = np.round(scores, DECIMALS) + 0.0  # no -0.0
    kept = [place for place, name in enumerate(found.ids) if name not in left_out]
    best = sorted(kept, key=lambda place: (-scores[place], found.ids[place]))[:k]
    hits = [
        Hit(found.ids[place], float(scores[place]), dict(_typed(spec, found.payloads[place])))
        for place in best
    ]
    if len(found.ids) < limit:
        return hits, True
    # What the store left out scores at most as much as its last candidate, but for float32 rounding on either side.
    product = 1.0 if spec.metric == "cosine" else length * float(lengths.max())
    slack = 4 * (spec.dim + 8) * _UNIT * product + 10.0**-DECIMALS
    return hits, len(best) == k and scores[best[-1]] > float(found.scores[-1]) + slack


def _typed(spec: IndexSpec, payload: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All declared fields; a store may give 1 for 1.0."""
    for name, kind in spec.fields.items():
        value = payload.get(name)
        yield name, float(value) if kind == "float" and value is not None else value


def _names(spec: IndexSpec, content: str) -> Iterator[str]:
    """Names for a generation of this content; one that was killed is found again by its name."""
    name = sha256(json.dumps([spec.to_json(), content], sort_keys=True).encode()).hexdigest()[:16]
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
