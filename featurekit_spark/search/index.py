"""What a vector index is, wherever its rows are: names, shapes, errors, and the checks that all of them share.

Knows no store. Every index keeps the same promises (`testing.vectors.VectorIndexBehaviour`); what only some can do is
told by `describe()`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Protocol, Self, get_args, runtime_checkable

import numpy as np

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.filters import FieldKind, Filter, checked_value
from featurekit_spark.search.kernel import Metric

__all__ = [
    "Hit",
    "IndexSpec",
    "IndexState",
    "Row",
    "VectorIndex",
    "Written",
    "checked_queries",
    "checked_rows",
]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 5


@dataclass(frozen=True)
class IndexSpec:
    """What an index is made for, stated when it is made. `fields`: what can be filtered on and comes back with a hit.

    `source` names what made the vectors, such as the embedder's identity: rows of two sources never meet in one
    generation.
    """

    dim: int
    metric: Metric = "ip"
    fields: Mapping[str, FieldKind] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UsageError(f"an index needs at least 1 dimension, found {self.dim!r}")
        if self.metric not in get_args(Metric):
            raise UsageError(f"metric {self.metric!r} is not known. Known: cosine, ip.")
        for name, kind in self.fields.items():
            if not _NAME.fullmatch(name):
                raise UsageError(
                    f"field {name!r}: a field's name is letters, digits and _, and begins with no digit"
                )
            if kind not in get_args(FieldKind):
                raise UsageError(
                    f"field {name!r}: type {kind!r} is not known. Known: {', '.join(get_args(FieldKind))}."
                )
        object.__setattr__(self, "fields", MappingProxyType(dict(sorted(self.fields.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dim, self.metric, dict(self.fields), self.source)

    def __hash__(self) -> int:
        return hash((self.dim, self.metric, tuple(self.fields.items()), self.source))

    def to_json(self) -> dict[str, Any]:
        return {"dim": self.dim, "metric": self.metric, "fields": dict(self.fields), "source": self.source}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        return cls(found["dim"], found["metric"], found["fields"], found["source"])


@dataclass(frozen=True)
class Hit:
    """A row that was found. `score` is rounded to 6 decimals; `payload` has all declared fields."""

    id: str
    score: float
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row, checked. `hash` is of all that is in it: rows with equal hashes need not be sent again."""

    id: str
    vector: Floats
    payload: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class Written:
    """What became of the rows given: `sent` to the store, `same` there already, `removed` from it."""

    sent: int = 0
    same: int = 0
    removed: int = 0


@dataclass(frozen=True)
class IndexState:
    """What is searched now. `content`: hash over all rows as an export left them; None since somebody changed single
    rows, or while that goes on. `exact`: False where the store may miss neighbours. `store`: for people."""

    generation: str
    spec: IndexSpec
    rows: int
    content: str | None
    exact: bool
    store: str

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "spec": self.spec.to_json()}


@runtime_checkable
class VectorIndex(Protocol):
    """Rows (id, vector, payload) that can be searched. Ids are any distinct text.

    Raises UsageError for wrong shapes, dimensions, fields or filters (also one that this store cannot do); DataError,
    naming ids, for vectors that are zero or not finite; ConfigError for a store that refuses this user or holds another
    kind of index; ServiceError (worth a retry) for one that fails or does not answer.
    """

    @property
    def spec(self) -> IndexSpec:
        """As stated when it was made, else that of what is there; UsageError where neither is."""
        ...

    def upsert(
        self, ids: Sequence[str], vectors: Any, payloads: Sequence[Mapping[str, Any]] | None = None
    ) -> Written:
        """Add rows, or put them in place of those with their ids: vectors float32 [len(ids), dim]. A row is searched as
        it was or as it is, never half; rows that are there already as given are not sent."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Remove rows; how many there were. Ids that are not there are no error."""
        ...

    def search(
        self,
        vectors: Any,
        k: int,
        *,
        filter: Filter | None = None,  # noqa: A002 - the field's own word for it
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[Hit]]:
        """For each query (float32 [q, dim]) the k best rows that meet `filter`, fewer where fewer do; best first, equal
        scores in order of ids. `exclude`: for each query, ids to leave out. All of one call is of one generation."""
        ...

    def count(self, filter: Filter | None = None) -> int:  # noqa: A002
        """How many rows there are, or meet `filter`."""
        ...

    def hashes(self) -> Iterator[tuple[str, str]]:
        """(id, hash) of every row, in no order."""
        ...

    def describe(self) -> IndexState | None:
        """What is searched now; None where nothing was ever written. Asks the store: it is the health check as well."""
        ...

    def replace(self, batches: Iterable[Sequence[Row]], content: str) -> Written:
        """Write all rows as a new generation beside the one that is searched, then switch: a search sees the old whole
        or the new whole. The generation before stays until the next switch; older and unfinished ones are removed.

        `content` is the hash over all rows. What a replace of the same content that was killed had written stays, and
        is not sent again.
        """
        ...

    def change(self, batches: Iterable[Sequence[Row]], gone: Sequence[str], content: str) -> Written:
        """Write changed rows into the generation that is searched and remove those that are gone, which leaves the
        index with `content`."""
        ...

    def close(self) -> None:
        """Let go of what is held open; harmless twice."""
        ...


def checked_rows(
    spec: IndexSpec,
    ids: Sequence[str],
    vectors: Any,
    payloads: Sequence[Mapping[str, Any]] | None,
) -> list[Row]:
    """Rows as stores take them. Raises UsageError or DataError as VectorIndex says."""
    found = _floats(spec, vectors, len(ids))
    if payloads is not None and len(payloads) != len(ids):
        raise UsageError(f"{len(payloads)} payloads for {len(ids)} ids; give one per id, or None")
    _check_ids(ids)
    _check_lengths(found, list(ids))
    rows = []
    for place, name in enumerate(ids):
        payload = _payload(spec, name, {} if payloads is None else payloads[place])
        rows.append(Row(name, found[place], payload, _row_hash(found[place], payload)))
    return rows


def checked_queries(spec: IndexSpec, vectors: Any) -> Floats:
    """Queries, float32 [q, dim]. Raises UsageError or DataError as VectorIndex says."""
    found = _floats(spec, vectors, None)
    _check_lengths(found, [f"query {place}" for place in range(len(found))])
    return found


def _floats(spec: IndexSpec, vectors: Any, rows: int | None) -> Floats:
    found = np.ascontiguousarray(vectors, dtype=np.float32)
    if found.size == 0 and found.ndim < 2:
        found = found.reshape(0, spec.dim)
    if found.ndim != 2:
        raise UsageError(f"vectors must be float32 [rows, {spec.dim}], found shape {found.shape}")
    if rows is not None and len(found) != rows:
        raise UsageError(f"{len(found)} vectors for {rows} ids; give one row per id")
    if found.shape[1] != spec.dim:
        raise UsageError(
            f"vectors have {found.shape[1]} dimensions, the index has {spec.dim}; use one embedder for both"
        )
    return found


def _check_ids(ids: Sequence[str]) -> None:
    for name in ids:
        given: Any = name
        if not isinstance(given, str) or not given:
            raise UsageError(f"id {name!r} is no text that names a row")
        checked_value("id", name, "str", "rows")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"id {twice!r} is given twice; ids must be distinct")


def _check_lengths(vectors: Floats, names: Sequence[str]) -> None:
    lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
    wrong = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
    if len(wrong):
        shown = ", ".join(repr(names[row]) for row in wrong[:_SHOWN])
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(f"cannot search vectors that are zero or not finite: {shown}{more}. Leave them out.")


def _payload(spec: IndexSpec, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(spec.fields))
    if unknown:
        declared = ", ".join(spec.fields) or "none"
        raise UsageError(
            f"payload of {name!r} has {', '.join(unknown)}; the index declares the fields {declared}"
        )
    return {
        at: None if given.get(at) is None else checked_value(at, given[at], kind, f"payload of {name!r}")
        for at, kind in spec.fields.items()
    }


def _row_hash(vector: Floats, payload: Mapping[str, Any]) -> str:
    image = sha256(b"vector row\n")
    image.update(np.ascontiguousarray(vector, dtype="<f4").data)
    image.update(json.dumps(payload, sort_keys=True, ensure_ascii=True).encode())
    return image.hexdigest()[:32]
