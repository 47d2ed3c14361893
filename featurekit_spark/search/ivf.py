"""Inverted lists for matrices of tens of millions of rows: a query looks only at the lists whose centroids are nearest.

Owns training, the layout of the lists among the store's blocks, and the search through them. An index is named by the
hash of its matrix and parameters; with all lists probed it answers as an exact search does.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from featurekit_spark.errors import UsageError
from featurekit_spark.fingerprint import digest
from featurekit_spark.search.arguments import Doubles, Floats, Rows
from featurekit_spark.search.blocks import Part, read_parts, stored_blocks, vectors_in
from featurekit_spark.search.kernel import FlatIndex, Metric
from featurekit_spark.search.matrix import MatrixRef, MatrixStore
from featurekit_spark.search.partitioned import PART_BYTES, Lists, merge_lists, search_part
from featurekit_spark.search.table import append_blocks

__all__ = ["IVFIndex", "IVFParams", "build_index", "list_lengths", "open_index", "search_index", "train"]

_PIECES = 4096  # blocks that one list may have
CENTROIDS = -1  # the block that holds them
_BLOCK_BYTES = 8 << 20
_READ = 64  # lists read at once
_TRAINED = 16_384  # rows of the sample as float64 at a time


@dataclass(frozen=True)
class IVFParams:
    """How an index is made. `lists` None: four times the root of the number of rows. `sample`: rows per list that the
    centroids are trained on, or as many as `sample_bytes` hold, which is what training takes, several times over."""

    lists: int | None = None
    sample: int = 64
    sample_bytes: int = 512 << 20
    iterations: int = 10
    seed: int = 0

    def for_rows(self, rows: int) -> int:
        wanted = self.lists if self.lists is not None else round(4 * math.sqrt(rows))
        return max(1, min(wanted, rows))

    def hash(self, ref: MatrixRef) -> str:
        """The index's name: what it is made of and how."""
        parts = (self.for_rows(ref.rows), self.sample, self.sample_bytes, self.iterations, self.seed)
        return digest("ivf 2", ref.hash, *map(str, parts))


@dataclass(frozen=True)
class IVFIndex:
    """An index in a store: its name, the matrix, and `centroids` float32 [lists, dim], of length 1."""

    hash: str
    ref: MatrixRef
    centroids: Floats

    def probed(self, queries: Floats, nprobe: int) -> Rows:
        """The `nprobe` lists that each query looks at, int64 [q, nprobe]."""
        lists = len(self.centroids)
        return FlatIndex(self.centroids).search(queries, min(nprobe, lists))[1]


def train(sample: Floats, lists: int, *, iterations: int = 10, seed: int = 0) -> Floats:
    """Centroids float32 [lists, dim] of length 1, by spherical k-means over `sample`; the same on every machine, as
    rows are assigned by exact scores."""
    random = np.random.default_rng(seed)
    units = np.empty(sample.shape, dtype=np.float32)
    for start in range(0, len(sample), _TRAINED):
        rows = sample[start : start + _TRAINED].astype(np.float64)
        units[start : start + _TRAINED] = rows / np.sqrt(np.square(rows).sum(axis=1))[:, None]
    centroids = units[np.sort(random.permutation(len(units))[:lists])]
    for _ in range(iterations):
        nearest = assigned(centroids, units)
        sums = list_sums(units, nearest, len(centroids))
        lengths = np.sqrt(np.square(sums).sum(axis=1))
        moved = lengths > 1e-9  # none has no rows, and opposite ones no direction: such a centroid stays
        new = centroids.copy()
        new[moved] = (sums[moved] / lengths[moved, None]).astype(np.float32)
        if np.array_equal(new, centroids):
            break
        centroids = new
    return centroids


def list_sums(rows: Floats, nearest: Rows, lists: int) -> Doubles:
    """The sum of each list's rows, float64 [lists, dim]; some thousand rows as float64 at a time."""
    order = np.argsort(nearest, kind="stable")
    sums = np.zeros((lists, rows.shape[1]))
    for start in range(0, len(order), _TRAINED):
        some = order[start : start + _TRAINED]
        filled, starts = np.unique(nearest[some], return_index=True)
        sums[filled] += np.add.reduceat(rows[some].astype(np.float64), starts, axis=0)
    return sums


def assigned(centroids: Floats, vectors: Floats) -> Rows:
    """The list of each row."""
    found = FlatIndex(centroids).search(vectors, 1)[1]
    return found[:, 0]


def open_index(store: MatrixStore, ref: MatrixRef, params: IVFParams) -> IVFIndex | None:
    """The index, where somebody has made it."""
    name = params.hash(ref)
    for row in stored_blocks(store, name, f"block = {CENTROIDS}"):
        return IVFIndex(name, ref, vectors_in([row], ref.dim))
    return None


def list_lengths(store: MatrixStore, index: IVFIndex) -> Rows:
    """How many rows each list has, int64 [lists]."""
    lengths = np.zeros(len(index.centroids), dtype=np.int64)
    rows = {row["block"]: row for row in stored_blocks(store, index.hash, "block >= 0", columns="block, ids")}
    for block, row in rows.items():
        lengths[block // _PIECES] += len(row["ids"])
    return lengths


def build_index(
    store: MatrixStore, ref: MatrixRef, params: IVFParams, *, part_bytes: int = PART_BYTES
) -> IVFIndex:
    """The index, made and stored if it is not there. Holds a part of the matrix and the sample; the rows pass through a
    file in the temporary folder. Two who make it at once leave the same twice, which does no harm."""
    found = open_index(store, ref, params)
    if found is not None:
        return found
    lists = params.for_rows(ref.rows)
    centroids = np.empty((0, ref.dim), dtype=np.float32)
    if ref.rows:
        rows = chosen_rows(ref, params)
        taken = (
            part.vectors[in_part(rows, part) - part.start]
            for part in read_parts(store, ref, part_bytes=part_bytes)
        )
        sample = gathered(taken, len(rows), ref.dim)
        centroids = train(sample, lists, iterations=params.iterations, seed=params.seed)
    index = IVFIndex(params.hash(ref), ref, centroids)
    _write(store, index, part_bytes)
    return index


def chosen_rows(ref: MatrixRef, params: IVFParams) -> Rows:
    """The rows that the centroids are trained on, drawn by the seed, in the order of rows."""
    lists = params.for_rows(ref.rows)
    size = min(lists * params.sample, max(lists, params.sample_bytes // max(1, 4 * ref.dim)))
    return np.sort(np.random.default_rng(params.seed).permutation(ref.rows)[:size])


def gathered(parts: Iterable[Floats], rows: int, dim: int) -> Floats:
    """Parts of a matrix as one, float32 [rows, dim]; they are never all there beside it."""
    found, end = np.empty((rows, dim), dtype=np.float32), 0
    for part in parts:
        found[end : end + len(part)] = part
        end += len(part)
    return found


def in_part(rows: Rows, part: Part) -> Rows:
    return rows[(rows >= part.start) & (rows < part.start + len(part.ids))]


def _write(store: MatrixStore, index: IVFIndex, part_bytes: int) -> None:
    """The centroids, then each list's rows by id."""
    ref = index.ref
    ids: list[str] = []
    lists = np.empty(ref.rows, dtype=np.int64)
    for part in read_parts(store, ref, part_bytes=part_bytes):
        ids.extend(part.ids)
        if part.ids:
            lists[part.start : part.start + len(part.ids)] = assigned(index.centroids, part.vectors)
    order = np.array(sorted(range(len(ids)), key=lambda row: (lists[row], ids[row])), dtype=np.int64)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.searchsorted(lists[order], np.arange(len(index.centroids) + 1)).tolist()
    with tempfile.NamedTemporaryFile() as file:
        moved = np.memmap(file.name, dtype="<f4", mode="w+", shape=(max(1, ref.rows), ref.dim))
        for part in read_parts(store, ref, part_bytes=part_bytes):
            moved[place[part.start : part.start + len(part.ids)]] = part.vectors

        def blocks() -> Iterator[tuple[int, list[str], bytes]]:
            yield CENTROIDS, [], index.centroids.tobytes()
            for number, (start, end) in enumerate(pairwise(starts)):
                yield from pieces(number, [ids[row] for row in order[start:end].tolist()], moved[start:end])

        append_blocks(store.path, index.hash, blocks())


def pieces(number: int, ids: list[str], vectors: Floats) -> Iterator[tuple[int, list[str], bytes]]:
    """A list's rows as blocks."""
    dim = vectors.shape[1] if vectors.ndim == 2 else 1
    step = max(1, _BLOCK_BYTES // max(1, 4 * dim), -(-len(ids) // _PIECES))
    for piece, start in enumerate(range(0, len(ids), step)):
        block = vectors[start : start + step]
        yield number * _PIECES + piece, ids[start : start + step], np.ascontiguousarray(block).tobytes()


@dataclass(frozen=True)
class ListParts:
    """Inverted lists by number, as parts."""

    store: MatrixStore
    index: IVFIndex
    spread: int = 1

    def __call__(self, number: int) -> Part:
        return self.several([number // self.spread])[number // self.spread]

    def several(self, numbers: Sequence[int]) -> dict[int, Part]:
        """Some lists, read at once."""
        wanted = " OR ".join(
            f"(block >= {number * _PIECES} AND block < {(number + 1) * _PIECES})" for number in numbers
        )
        found = {row["block"]: row for row in stored_blocks(self.store, self.index.hash, wanted)}
        rows: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
        for block in sorted(found):
            rows[block // _PIECES].append(found[block])
        return {
            number: Part(
                tuple(member for row in own for member in row["ids"]), vectors_in(own, self.index.ref.dim)
            )
            for number, own in rows.items()
        }

    def __len__(self) -> int:
        return len(self.index.centroids) * self.spread


def search_index(
    store: MatrixStore, index: IVFIndex, queries: Any, k: int, *, nprobe: int, metric: Metric = "ip"
) -> Lists:
    """The k best for each of `queries` [q, d] among the rows of its `nprobe` nearest lists, a few lists in memory at a
    time."""
    asked = np.ascontiguousarray(queries, dtype=np.float32)
    best = Lists.empty(len(asked), k)
    if not len(asked) or not len(index.centroids):
        return best
    if nprobe < 1:
        raise UsageError(f"nprobe must be at least 1, found {nprobe!r}")
    probed = index.probed(asked, nprobe)
    load, numbers = ListParts(store, index), np.unique(probed).tolist()
    for start in range(0, len(numbers), _READ):
        for number, part in load.several(numbers[start : start + _READ]).items():
            own = np.flatnonzero((probed == number).any(axis=1))
            if part.ids:
                found = search_part(part, asked[own], k, metric=metric, floor=best.scores[own, -1])
                merged = merge_lists([best[own], found], k)
                best.scores[own], best.ids[own] = merged.scores, merged.ids
    return best
