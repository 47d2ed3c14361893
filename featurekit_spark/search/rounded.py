"""The number types a matrix is stored in: float32, or float16 and int8, which are smaller and only near it.

Owns how rows become small numbers and how these are read as float32 again, always as the same bits. Knows arrays only.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import UsageError
from featurekit_spark.search.arguments import Decoded, Floats

__all__ = [
    "STORAGES",
    "Block",
    "RoundedRows",
    "Storage",
    "as_rows",
    "decode_block",
    "encode",
    "pack",
    "stored_bytes",
    "unpack",
    "value_type",
]

Storage = Literal["float32", "float16", "int8"]
STORAGES: Final[tuple[Storage, ...]] = ("float32", "float16", "int8")
Block: TypeAlias = tuple[npt.NDArray[Any], Floats | None]  # values [rows, dim], factors [rows]

_TYPES: Final[dict[str, str]] = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
_ENCODED = _DECODED = 4096  # rows at a time


class RoundedRows(Decoded):
    """float32 [rows, dim], stored as float16 or as int8 with a factor per row; decoded where it is asked for.

    Indexed by a slice or by an array of rows, as the array that it stands for would be.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, values: npt.NDArray[Any], factors: Floats | None) -> None:
        self.values, self.factors = values, factors
        self.shape: tuple[int, int] = (values.shape[0], values.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Floats:
        found: Floats = self.values[rows].astype(np.float32)
        if self.factors is not None:
            found *= self.factors[rows][..., None]
        return found

    def products(self, queries: Floats, rows: Any, out: Floats) -> None:
        """Inner products of `queries` [q, dim] with some rows into `out` [q, rows], a few thousand rows decoded at a
        time."""
        chosen = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        for start in range(0, len(chosen), _DECODED):
            part = chosen[start : start + _DECODED]
            some = slice(part.start, part.stop) if isinstance(part, range) else part
            out[:, start : start + _DECODED] = queries @ self[some].T

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


def value_type(storage: str) -> str:
    """numpy's name of the type. Raises UsageError for a storage that is not known."""
    if storage not in _TYPES:
        raise UsageError(f"storage {storage!r} is not known. Known: {', '.join(STORAGES)}.")
    return _TYPES[storage]


def stored_bytes(rows: int, dim: int, storage: str) -> int:
    """What so many rows take, with their factors."""
    return rows * (dim * np.dtype(value_type(storage)).itemsize + (4 if storage == "int8" else 0))


def encode(vectors: Floats, storage: str) -> tuple[npt.NDArray[Any], Floats | None]:
    """(values [rows, dim], factors [rows] or None) of rows that are neither zero nor infinite.

    float16 is the nearest one. int8 splits a row's largest coordinate into 127 steps; the factor gives what comes out
    the row's own length, so that inner products of unit rows are still cosines.
    """
    kind = value_type(storage)
    if storage != "int8":
        with np.errstate(over="ignore"):  # what becomes infinite is refused by its id
            return np.ascontiguousarray(vectors, dtype=kind), None
    values = np.empty(vectors.shape, dtype=kind)
    factors = np.empty(len(vectors), dtype="<f4")
    for start in range(0, len(vectors), _ENCODED):
        part = slice(start, start + _ENCODED)
        rows = vectors[part].astype(np.float64)
        steps = np.rint(rows * (127 / np.abs(rows).max(axis=1, initial=0))[:, None])
        values[part] = steps
        factors[part] = np.sqrt(np.square(rows).sum(axis=1) / np.square(steps).sum(axis=1))
    return values, factors


def as_rows(values: npt.NDArray[Any], factors: Floats | None) -> Floats | RoundedRows:
    """What can be searched: the array itself where it is float32."""
    return values if values.dtype == np.float32 else RoundedRows(values, factors)


def pack(values: npt.NDArray[Any], factors: Floats | None) -> Any:
    """A block's bytes: its values, row by row, and then its factors."""
    return values.reshape(-1).view(np.uint8).data if factors is None else values.tobytes() + factors.tobytes()


def unpack(data: Any, storage: str, dim: int) -> tuple[npt.NDArray[Any], Floats | None]:
    """What `pack` packed, without a copy. ValueError where the bytes are not whole rows."""
    kind = np.dtype(value_type(storage))
    width = dim * kind.itemsize + (4 if storage == "int8" else 0)
    flat = np.frombuffer(data, dtype=np.uint8)
    rows = len(flat) // width if width else 0
    if rows * width != len(flat):
        raise ValueError(f"{len(flat)} bytes are no whole rows of {width}")
    split = rows * dim * kind.itemsize
    values = flat[:split].view(kind).reshape(rows, dim)
    return values, flat[split:].view("<f4") if storage == "int8" else None


def decode_block(data: Any, storage: str, dim: int) -> Floats:
    """What `pack` packed, as float32 [rows, dim]."""
    return as_rows(*unpack(data, storage, dim))[:]
