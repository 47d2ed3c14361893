"""Parts of a stored matrix: some of its blocks at a time, for hosts that do not hold all of it.

Owns how a matrix is cut into parts of about one size, and the reading of one part. Knows the store's table, no query.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from featurekit_spark.errors import CacheError
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.matrix import MatrixRef, MatrixStore
from featurekit_spark.search.rounded import Storage, as_rows, unpack
from featurekit_spark.search.table import streamed

__all__ = [
    "Part",
    "PartedMatrix",
    "block_ranges",
    "read_part",
    "read_parts",
    "stored_blocks",
    "stored_type",
    "vectors_in",
]


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix, from row number `start` on: ids and vectors (float32 [rows, dim]), aligned."""

    ids: tuple[str, ...]
    vectors: Floats
    start: int = 0


def block_ranges(
    store: MatrixStore, ref: MatrixRef, *, part_bytes: int, least: int = 1
) -> list[tuple[int, int]]:
    """The matrix's blocks as runs (first, end) of about equal length, each of at most `part_bytes` (but a whole block),
    and at least `least` of them where there are as many blocks. CacheError where the matrix is gone."""
    blocks = len({row["block"] for row in stored_blocks(store, ref.hash, columns="block")})
    if not blocks:
        raise CacheError(f"matrix {ref.hash} is not in {store.path}; compute the embedding DB again")
    wanted = -(-4 * ref.rows * ref.dim // max(1, part_bytes))
    parts = min(blocks, max(1, -(-wanted // least)) * least)  # as many for every task slot
    ends = [blocks * (i + 1) // parts for i in range(parts)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def read_part(store: MatrixStore, ref: MatrixRef, first: int, end: int, *, of: int) -> Part:
    """Blocks `first` up to `end` of the matrix's `of` blocks, as one part. CacheError where some are gone."""
    where = f"block >= {first} AND block < {end}"
    return _part(store, ref, stored_blocks(store, ref.hash, where), first, end, of)


def read_parts(store: MatrixStore, ref: MatrixRef, *, part_bytes: int) -> Iterator[Part]:
    """All of the matrix, part by part, in the order of its rows; its vectors are read in one pass."""
    ranges = block_ranges(store, ref, part_bytes=part_bytes)
    vectors = streamed(store.path, ref.hash, range(ranges[-1][1]))
    for first, end in ranges:
        where = f"block >= {first} AND block < {end}"
        found = {row["block"]: row for row in stored_blocks(store, ref.hash, where, columns="block, ids")}
        rows = [{**found[block], "vectors": next(vectors)} for block in sorted(found)]
        yield _part(store, ref, rows, first, end, ranges[-1][1])


def _part(
    store: MatrixStore, ref: MatrixRef, found: Iterable[dict[str, Any]], first: int, end: int, of: int
) -> Part:
    blocks = {row["block"]: row for row in found}  # two writers at once leave a block twice
    if len(blocks) < end - first:
        raise CacheError(
            f"{end - first - len(blocks)} blocks of matrix {ref.hash} are not in {store.path}; compute the embedding "
            "DB again"
        )
    rows = [blocks[block] for block in sorted(blocks)]
    ids = tuple(member for row in rows for member in row["ids"])
    vectors = vectors_in(rows, ref.dim)
    if len(vectors) != len(ids):
        raise CacheError(f"matrix {ref.hash} is damaged: {len(ids)} ids, {len(vectors)} vectors in one part")
    # All blocks but the last are of one length.
    return Part(ids, vectors, first * len(rows[0]["ids"]) if end < of else ref.rows - len(ids))


class PartedMatrix:
    """`ids` and `vectors` of a stored matrix, as `Matrix` has them; of the vectors one part is in memory at a time."""

    def __init__(self, store: MatrixStore, ref: MatrixRef, *, part_bytes: int) -> None:
        own = {row["block"]: row["ids"] for row in stored_blocks(store, ref.hash, columns="block, ids")}
        self.ids = [member for block in sorted(own) for member in own[block]]
        starts = [0, *accumulate(len(own[block]) for block in sorted(own))]
        self.vectors = _PartedRows(store, ref, block_ranges(store, ref, part_bytes=part_bytes), starts)


class _PartedRows:
    """Rows by slices; those who ask for one after the other have each part read once."""

    def __init__(
        self, store: MatrixStore, ref: MatrixRef, ranges: list[tuple[int, int]], starts: list[int]
    ) -> None:
        self._store, self._ref, self._ranges = store, ref, ranges
        self._starts = [starts[first] for first, _ in ranges]
        self._read: tuple[int, Part] | None = None

    def __len__(self) -> int:
        return self._ref.rows

    def __getitem__(self, rows: slice) -> Floats:
        start, stop, _ = rows.indices(len(self))
        found = []
        while start < stop:
            part = self._part(bisect_right(self._starts, start) - 1)
            found.append(part.vectors[start - part.start : stop - part.start])
            start += len(found[-1])
        return np.concatenate(found) if found else np.empty((0, self._ref.dim), dtype=np.float32)

    def _part(self, number: int) -> Part:
        if self._read is None or self._read[0] != number:
            self._read = None  # the last one goes before the next one comes
            first, end = self._ranges[number]
            self._read = number, read_part(self._store, self._ref, first, end, of=self._ranges[-1][1])
        return self._read[1]


@lru_cache(maxsize=256)
def _type_of(path: str, name: str) -> Storage:
    row = next(stored_blocks(MatrixStore(path), name, "block = 0", columns="block"), None)
    if row is None:
        raise CacheError(f"matrix {name} is not in {path}; compute the embedding DB again")
    storage: Storage = row["storage"] or "float32"
    return storage


def stored_type(store: MatrixStore, ref: MatrixRef) -> Storage:
    """The type of a stored matrix's numbers. CacheError where the matrix is gone."""
    return _type_of(store.path, ref.hash)


def stored_blocks(
    store: MatrixStore, name: str, where: str = "true", *, columns: str = "block, ids, vectors"
) -> Iterator[dict[str, Any]]:
    """The table's rows of what is called `name`, `vectors` as buffers of `storage`, in no order."""
    import pyarrow as pa
    from deltalake import DeltaTable, QueryBuilder

    if not DeltaTable.is_deltatable(store.path):
        return
    # Not to_pyarrow_table: it can abort the interpreter's exit on large tables.
    query = QueryBuilder().register("matrices", table := DeltaTable(store.path))
    # What was written before there were other types does not name any.
    typed = "storage" in {field.name for field in table.schema().fields}
    columns += f", {'storage' if typed else 'NULL AS storage'}"
    answer: Any = query.execute(f"SELECT {columns} FROM matrices WHERE hash = '{name}' AND ({where})")
    batches = pa.RecordBatchReader.from_stream(answer) if hasattr(answer, "__arrow_c_stream__") else answer
    for batch in batches:
        for at in range(batch.num_rows):
            cells = {name: batch.column(i)[at] for i, name in enumerate(batch.schema.names)}
            yield {n: cell.as_buffer() if n == "vectors" else cell.as_py() for n, cell in cells.items()}


def vectors_in(rows: Sequence[Mapping[str, Any]], dim: int) -> Floats:
    """The vectors of some of the table's rows, one after the other, float32 [rows, dim]."""
    blocks = [unpack(row["vectors"], row["storage"] or "float32", dim) for row in rows]
    parts = [np.asarray(as_rows(*block)) for block in blocks]
    return np.concatenate(parts) if parts else np.empty((0, dim), dtype=np.float32)
