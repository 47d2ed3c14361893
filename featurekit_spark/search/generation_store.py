"""What a store must be able to do for a vector index: keep generations of rows, and say in one step which is searched.

Knows no store, and not what is promised on top: `StoredIndex` is that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from featurekit_spark.errors import CacheError
from featurekit_spark.search.arguments import Doubles, Floats
from featurekit_spark.search.filters import Filter
from featurekit_spark.search.index import IndexSpec, Row

__all__ = ["Candidates", "GenerationGoneError", "GenerationStore", "Live"]


class GenerationGoneError(CacheError):
    """The generation was removed since it was looked up: a second switch came in between."""


@dataclass(frozen=True)
class Live:
    """What is searched, and the generation that was before it."""

    generation: str
    spec: IndexSpec
    content: str | None
    before: str | None = None


@dataclass(frozen=True)
class Candidates:
    """A store's nearest rows to one query, best first: `scores` as the store has them, higher is better."""

    ids: Sequence[str]
    vectors: Floats
    scores: Doubles
    payloads: Sequence[Mapping[str, Any]]


class GenerationStore(Protocol):
    """Where generations of rows are. Methods raise GenerationGoneError, ConfigError or ServiceError."""

    @property
    def place(self) -> str:
        """For people; without secrets."""
        ...

    @property
    def exact(self) -> bool:
        """Whether candidates are the nearest rows, but for rounding."""
        ...

    def live(self) -> Live | None: ...

    def publish(self, live: Live) -> None:
        """Make it what is searched, in one step; or note that its content changed."""
        ...

    def generations(self) -> list[str]:
        """Their names; others' things whose names begin alike may be among them."""
        ...

    def create(self, generation: str, spec: IndexSpec) -> None:
        """Make it empty, where it is not there yet."""
        ...

    def drop(self, generation: str) -> None: ...

    def finish(self, generation: str, spec: IndexSpec) -> None:
        """All rows are written, and it is not searched yet."""
        ...

    def tidy(self, generation: str) -> None:
        """Rows of it were changed while it is searched, which goes on: let go of what piled up, where that pays."""
        ...

    def put(self, generation: str, spec: IndexSpec, rows: Sequence[Row]) -> None:
        """Add rows, or put them in place of those with their ids."""
        ...

    def remove(self, generation: str, ids: Sequence[str]) -> None: ...

    def hashes(self, generation: str, ids: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        """(id, hash) of all rows, or of those among `ids`."""
        ...

    def count(self, generation: str, wanted: Filter | None) -> int: ...

    def check(self, wanted: Filter) -> None:
        """Raises UsageError for a filter that it cannot do."""
        ...

    def candidates(
        self, generation: str, spec: IndexSpec, queries: Floats, limit: int, wanted: Filter | None
    ) -> list[Candidates]: ...

    def close(self) -> None: ...
