"""Exact search of matrices that no host holds: part by part, the k best of each merged in the kernel's order.

Owns the merge, in-process and on Spark, and with it the promise that ids and scores are those of one `FlatIndex` over
all rows. Knows parts of a matrix; which way a search goes is `choice`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import UsageError
from featurekit_spark.search.arguments import Doubles, Floats, Mask, Rows, row_numbers
from featurekit_spark.search.blocks import Part, block_ranges, read_part
from featurekit_spark.search.kernel import FlatIndex, Metric
from featurekit_spark.search.matrix import MatrixRef, MatrixStore

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

__all__ = ["Lists", "PartTask", "merge_lists", "on_parts", "search_blocks", "search_part", "search_parts"]

PART_BYTES = 256 << 20


@dataclass(frozen=True)
class Lists:
    """Ranked lists of some queries, the best first: `scores` float64 [q, k] to 6 decimals and `ids` object [q, k]; -inf
    and None at empty places."""

    scores: Doubles
    ids: npt.NDArray[np.object_]

    @classmethod
    def empty(cls, queries: int, k: int) -> Lists:
        return cls(np.full((queries, k), -np.inf), np.full((queries, k), None, dtype=object))

    def __getitem__(self, rows: Any) -> Lists:
        return Lists(self.scores[rows], self.ids[rows])


def merge_lists(lists: Sequence[Lists], k: int) -> Lists:
    """The k best of several lists for the same queries: by score, then by id, as the kernel orders them."""
    scores = np.concatenate([found.scores for found in lists], axis=1)
    ids = np.concatenate([found.ids for found in lists], axis=1)
    there = scores > -np.inf
    ranks = np.zeros(scores.shape, dtype=np.int64)
    if there.any():
        ranks[there] = np.unique(ids[there], return_inverse=True)[1].reshape(-1)
    order = np.lexsort((ranks, -scores), axis=-1)[:, :k]
    return Lists(np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1))


def search_part(
    part: Part,
    queries: Floats,
    k: int,
    *,
    metric: Metric = "ip",
    exclude: Any = None,
    mask: Mask | None = None,
    groups: Rows | None = None,
    floor: Doubles | None = None,
    index: FlatIndex | None = None,
) -> Lists:
    """The part's k best for each of `queries` [q, d]. `exclude`, `mask` and `groups`: as for `FlatIndex.search` over
    the whole matrix. `index`: over the part's rows, where it is there already."""
    if mask is not None:
        mask = np.asarray(mask)[..., part.start : part.start + len(part.ids)]
    index = index if index is not None else FlatIndex(part.vectors, metric=metric, ids=part.ids)
    scores, rows = index.ranked(
        queries, k, exclude=_within(exclude, part), mask=mask, groups=groups, floor=floor
    )
    found = Lists(scores, np.full(rows.shape, None, dtype=object))
    if part.ids:
        there = rows >= 0
        found.ids[there] = np.array(part.ids, dtype=object)[rows[there]]
    return found


def search_parts(
    parts: Iterable[Part],
    queries: Any,
    k: int,
    *,
    metric: Metric = "ip",
    exclude: Any = None,
    mask: Mask | None = None,
    groups: Rows | None = None,
) -> Lists:
    """What `FlatIndex.search` finds over the rows of all parts, one of them in memory at a time."""
    if k < 1:
        raise UsageError(f"k must be at least 1, found {k!r}")
    asked = np.ascontiguousarray(queries, dtype=np.float32)
    best = Lists.empty(len(asked), k)
    for part in parts:
        found = search_part(
            part,
            asked,
            k,
            metric=metric,
            exclude=exclude,
            mask=mask,
            groups=groups,
            floor=best.scores[:, -1],
        )
        best = merge_lists([best, found], k)
    return best


def _within(exclude: Any, part: Part) -> Any:
    """Exclusions by row number of the matrix as row numbers of the part."""
    if exclude is None:
        return None
    start, end = part.start, part.start + len(part.ids)
    if isinstance(exclude, np.ndarray) and exclude.ndim == 1 and exclude.dtype != object:
        exclude = row_numbers(exclude)
        return np.where((exclude >= start) & (exclude < end), exclude - start, -1)
    return [own[(own >= start) & (own < end)] - start for own in map(row_numbers, exclude)]


# -- on Spark --------------------------------------------------------------------------------------------------


def search_blocks(
    queries: DataFrame,
    store: MatrixStore,
    ref: MatrixRef,
    k: int,
    *,
    metric: Metric = "ip",
    part_bytes: int = PART_BYTES,
    least_parts: int | None = None,
    mask: Mask | None = None,
) -> DataFrame:
    """(key, hits): for each query the k best rows of a stored matrix, as array<struct<product_id, score>>, best first.

    `queries`: `key`, distinct; `vector`, array<float> or the bytes of float32; and, where wanted, `exclude`, array of
    ids to leave out, and `group`, an int that names a row of `mask` (bool [n] or [g, n] over the matrix's rows).
    Every task holds one part of the matrix, of at most `part_bytes`, and sees all queries; there are at least
    `least_parts` (default: as many as the session has task slots). No vector is read before the frame is.
    """
    from pyspark.sql import functions as F

    from featurekit_spark.engines.cluster import parallelism

    if k < 1:
        raise UsageError(f"k must be at least 1, found {k!r}")
    least = parallelism(queries.sparkSession) if least_parts is None else least_parts
    ranges = block_ranges(store, ref, part_bytes=part_bytes, least=least)
    task = PartTask(BlockParts(store, ref, tuple(ranges)), k, metric, mask)
    every = F.explode(F.sequence(F.lit(0), F.lit(len(ranges) - 1))).alias("part")
    wanted = [name for name in ("key", "vector", "exclude", "group") if name in queries.columns]
    return on_parts(queries.select(*wanted, every), task, len(ranges))


def on_parts(queries: DataFrame, task: PartTask, partitions: int) -> DataFrame:
    """(key, hits) of `queries` with the column `part`, the part that each row is to be searched in: every part is
    opened by one task."""
    from pyspark.sql import functions as F

    kind = queries.schema["key"].dataType.simpleString()
    if hasattr(queries, "repartitionById"):  # by hash, some tasks would have several parts and others none
        placed = queries.repartitionById(partitions, F.col("part") % partitions)
    else:
        placed = queries.repartition(partitions, "part")
    placed = placed.sortWithinPartitions("part") if task.several(partitions) else placed
    found = placed.mapInArrow(task, f"key {kind}, hits array<struct<cost: double, product_id: string>>")
    # Ascending structs: the better score first, then the id; Spark compares text as Python does, by code points.
    best = F.slice(F.array_sort(F.flatten(F.collect_list("hits"))), 1, task.k)
    ranked = found.groupBy("key").agg(best.alias("hits"))
    shown = "transform(hits, hit -> struct(hit.product_id AS product_id, 0D - hit.cost AS score)) AS hits"
    return ranked.selectExpr("key", shown)


@dataclass(frozen=True)
class BlockParts:
    """Parts of a stored matrix by number."""

    store: MatrixStore
    ref: MatrixRef
    ranges: tuple[tuple[int, int], ...]

    def __call__(self, number: int) -> Part:
        return read_part(self.store, self.ref, *self.ranges[number], of=self.ranges[-1][1])

    def __len__(self) -> int:
        return len(self.ranges)


@dataclass(frozen=True)
class PartTask:
    """Rows (key, vector, part) to their part's k best: hits with what they cost, minus the score. A task that is run
    again finds the same."""

    load: Callable[[int], Part]
    k: int
    metric: Metric = "ip"
    mask: Mask | None = None

    def several(self, partitions: int) -> bool:
        """Whether a task may have several parts."""
        return len(self.load) > partitions  # type: ignore[arg-type]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        opened: _Opened | None = None
        for batch in batches:
            parts = batch["part"].to_numpy(zero_copy_only=False)
            for number in np.unique(parts).tolist():
                if opened is None or opened.number != number:
                    opened = None  # the last one goes before the next one comes
                    opened = _Opened(number, self.load(number), self.metric)
                own = batch.filter(pa.array(parts == number)) if (parts != number).any() else batch
                yield pa.RecordBatch.from_arrays(
                    [own["key"], _hits(self._search(own, opened))], names=["key", "hits"]
                )

    def _search(self, batch: pa.RecordBatch, opened: _Opened) -> Lists:
        names, part = batch.schema.names, opened.part
        exclude = groups = None
        if "exclude" in names:
            left_out = batch["exclude"].to_pylist()
            exclude = [
                [opened.row_of[member] for member in ids or () if member in opened.row_of] for ids in left_out
            ]
        if self.mask is not None and "group" in names:
            groups = batch["group"].to_numpy(zero_copy_only=False)
        vectors = vectors_of(batch["vector"], part.vectors.shape[1])
        return search_part(
            part, vectors, self.k, exclude=exclude, mask=self.mask, groups=groups, index=opened.index
        )


class _Opened:
    """A part that a task holds."""

    def __init__(self, number: int, part: Part, metric: Metric) -> None:
        self.number, self.part = number, part
        self.index = FlatIndex(part.vectors, metric=metric, ids=part.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row numbers of the whole matrix, by id."""
        return {member: row for row, member in enumerate(self.part.ids, start=self.part.start)}


def vectors_of(column: Any, dim: int) -> Floats:
    """A column of vectors, lists or bytes of float32, as an array [rows, dim]."""
    import pyarrow as pa

    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return np.frombuffer(b"".join(column.to_pylist()), dtype="<f4").reshape(len(column), -1)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if column.null_count or len(flat) % max(1, len(column)):
        raise UsageError("queries need a vector each, all of one length; leave out those without one")
    return np.ascontiguousarray(flat, dtype=np.float32).reshape(len(column), -1 if len(column) else dim)


def _hits(found: Lists) -> Any:
    """Lists as array<struct<cost, product_id>>."""
    import pyarrow as pa

    there = found.scores > -np.inf
    ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    # Subtracted: minus 0.0 would not equal 0.0 everywhere.
    costs = pa.array(0.0 - found.scores[there], pa.float64())
    hits = pa.StructArray.from_arrays(
        [costs, pa.array(found.ids[there], pa.string())], names=["cost", "product_id"]
    )
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), hits)
