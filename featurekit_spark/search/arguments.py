"""What a search is asked with, checked: vectors and their lengths, the order of ids, rows to leave out, filters.

Knows arrays, and nothing of how they are searched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import DataError, UsageError

__all__ = [
    "Decoded",
    "Doubles",
    "Floats",
    "Mask",
    "Part",
    "Rows",
    "as_vectors",
    "excluded_pairs",
    "lengths",
    "parts",
    "ranks",
    "row_numbers",
    "unit_rows",
]

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

CHUNK_BYTES = (
    1 << 19
)  # of float64 at a time: stays in a core's own cache, and is not given back to the system
_OWN = 64  # queries of one group that are worth products of their own
_NAMED = 5  # rows that a message names


class Decoded(ABC):
    """float32 [rows, dimensions] that are kept as another type: indexed by a slice or by an array of rows."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: Any) -> Floats: ...

    @abstractmethod
    def products(self, queries: Floats, rows: slice | Rows, out: Floats) -> None:
        """Inner products of `queries` with some rows, few of them decoded at a time, into `out` [queries, rows]."""


def as_vectors(vectors: Any, what: str, ids: Sequence[Any] | None = None) -> Floats:
    """float32 [rows, dimensions], C-ordered; without a copy where it is that already."""
    try:
        array = np.asarray(vectors)
        if array.ndim == 1 and array.size == 0:
            array = array.reshape(0, 0)
        if array.ndim == 2 and (array.dtype != np.float32 or not array.flags.c_contiguous):
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused as not finite
                array = np.ascontiguousarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise _misshapen(vectors, what, ids) or UsageError(
            f"{what} must be float32 [rows, dimensions], found {type(vectors).__name__}: {error}"
        ) from error
    if array.ndim != 2:
        raise UsageError(f"{what} must be float32 [rows, dimensions], found shape {array.shape}")
    return array


def _misshapen(vectors: Any, what: str, ids: Sequence[Any] | None) -> DataError | None:
    """The error that names the vectors of another length than most; None where that is not what is wrong."""
    try:
        sizes = [len(vector) for vector in vectors]
    except TypeError:
        return None
    usual = Counter(sizes).most_common(1)[0][0]
    wrong = [row for row, size in enumerate(sizes) if size != usual]
    if not wrong:
        return None
    return DataError(
        f"vectors of {what} have different dimensions: most have {usual}, not so {_named(wrong, what, ids)}. "
        "Use one embedder for all."
    )


def _named(rows: Sequence[int], what: str, ids: Sequence[Any] | None) -> str:
    names = ", ".join(repr(ids[row]) if ids is not None else f"{what} {row}" for row in rows[:_NAMED])
    return names + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


def chunk_rows(dim: int) -> int:
    """How many rows of float64 are small enough together."""
    return max(1, CHUNK_BYTES // (8 * max(dim, 1)))


def chunks(rows: int, dim: int) -> Iterator[slice]:
    """Slices of rows of which float64 copies stay small."""
    step = chunk_rows(dim)
    return (slice(start, start + step) for start in range(0, rows, step))


def lengths(vectors: Floats | Decoded, what: str, ids: Sequence[Any] | None) -> Doubles:
    """Euclidean lengths in float64 [n]. DataError, naming them, for vectors that are zero or not finite."""
    found = np.empty(len(vectors), dtype=np.float64)
    for part in chunks(*vectors.shape):
        found[part] = np.square(vectors[part], dtype=np.float64).sum(axis=1)
    np.sqrt(found, out=found)
    wrong = np.flatnonzero(~((found > 0) & np.isfinite(found)))
    if len(wrong):
        raise DataError(
            f"cannot search vectors that are zero or not finite: {_named(wrong.tolist(), what, ids)}. "
            "Leave them out."
        )
    return found


def unit_rows(vectors: Floats | Decoded, norms: Doubles) -> Floats:
    """The vectors divided by their lengths."""
    scaled = np.empty(vectors.shape, dtype=np.float32)
    for part in chunks(*vectors.shape):
        scaled[part] = vectors[part] / norms[part, None]
    return scaled


def ranks(ids: Sequence[Any] | None) -> Rows | None:
    """Each row's place in the order of ids; None where that is the order of rows."""
    if ids is None or all(a <= b for a, b in pairwise(ids)):
        return None
    places = np.empty(len(ids), dtype=np.int64)
    places[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return places


def excluded_pairs(exclude: Any, queries: int, size: int) -> tuple[Rows, Rows]:
    """Pairs (query, matrix row) to leave out."""
    none = np.empty(0, dtype=np.int64)
    if exclude is None:
        return none, none
    if len(exclude) != queries:
        raise UsageError(f"exclude has {len(exclude)} items for {queries} queries; give one per query")
    if isinstance(exclude, np.ndarray) and exclude.ndim == 1 and exclude.dtype != object:
        columns, rows = row_numbers(exclude), np.arange(queries)
    else:
        arrays = list(map(_no_flags, exclude))
        rows = np.repeat(np.arange(queries), np.fromiter(map(len, arrays), dtype=np.int64, count=queries))
        columns = row_numbers(np.concatenate([none, *arrays]))
    if len(columns) and columns.max() >= size:
        raise UsageError(f"exclude names row {columns.max()}, but the matrix has {size} rows")
    inside = columns >= 0
    return rows[inside], columns[inside]


def row_numbers(rows: Any) -> Rows:
    """int64 [n], whatever of one dimension at most holds them. UsageError where they are no row numbers."""
    found = _no_flags(rows)
    if found.dtype.kind not in "iuf" or (found.astype(np.int64) != found).any():
        raise _no_rows(found)
    return found.astype(np.int64, copy=False)


def _no_flags(rows: Any) -> npt.NDArray[Any]:
    """An array that is not bool: a mask beside numbers would become rows 0 and 1."""
    found = np.atleast_1d(rows)
    if found.dtype.kind == "b":
        raise _no_rows(found)
    return found


def _no_rows(found: npt.NDArray[Any]) -> UsageError:
    return UsageError(f"exclude must hold row numbers, found {found.dtype} {found[:_NAMED].tolist()!r}")


@dataclass(frozen=True)
class Part:
    """Queries that are searched together: their places, and the matrix rows that any of them may find (None: all).

    Where they may not all find the same, `filters` is bool [groups, n] and `group` names each query's row of it."""

    members: slice | Rows
    rows: Rows | None = None
    filters: Mask | None = None
    group: Rows | None = None


def parts(queries: int, size: int, mask: Any, groups: Any, at_once: int) -> Iterator[Part]:
    """The queries in parts of at most `at_once`, those of a large group apart, small groups together."""
    allowed, group_of = _checked_filters(mask, groups, queries, size)
    if group_of is None or allowed is None:
        rows = None if allowed is None or allowed.all() else np.flatnonzero(allowed)
        for start in range(0, queries, at_once):
            yield Part(slice(start, min(start + at_once, queries)), rows)
        return
    large = np.bincount(group_of, minlength=len(allowed)) >= _OWN
    for group in np.flatnonzero(large):
        members, rows = np.flatnonzero(group_of == group), np.flatnonzero(allowed[group])
        for start in range(0, len(members), at_once):
            yield Part(members[start : start + at_once], rows)
    rest = np.argsort(group_of, kind="stable")
    rest = rest[~large[group_of[rest]]]
    for start in range(0, len(rest), at_once):
        members = rest[start : start + at_once]
        here = np.unique(group_of[members])
        yield Part(members, np.flatnonzero(allowed[here].any(axis=0)), allowed, group_of[members])


def _checked_filters(mask: Any, groups: Any, queries: int, size: int) -> tuple[Mask | None, Rows | None]:
    if mask is None:
        if groups is not None:
            raise UsageError("groups say which row of a mask counts for a query; give mask, bool [groups, n]")
        return None, None
    allowed = np.asarray(mask)
    if allowed.dtype != np.bool_ or allowed.ndim not in (1, 2) or allowed.shape[-1] != size:
        raise UsageError(
            f"mask must be bool [{size}], or bool [g, {size}] with groups; found {allowed.dtype} "
            f"{list(allowed.shape)}"
        )
    if (allowed.ndim == 2) != (groups is not None):
        raise UsageError("a mask [g, n] goes with groups, one number per query; a mask [n] goes without")
    if groups is None:
        return allowed, None
    group_of = np.asarray(groups)
    if group_of.shape != (queries,) or (queries and group_of.dtype.kind not in "iu"):
        raise UsageError(
            f"groups must be {queries} numbers, one per query; found {group_of.dtype} {list(group_of.shape)}"
        )
    if queries and (group_of.min() < 0 or group_of.max() >= len(allowed)):
        raise UsageError(
            f"groups must name rows 0 to {len(allowed) - 1} of the mask, found {group_of.min()} to {group_of.max()}"
        )
    return allowed, group_of.astype(np.int64)
