"""Inverted lists made and searched by jobs of a Spark session: rows never pass through the driver.

The lists are those that `ivf` makes in one process, byte by byte.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.engines.cluster import parallelism
from featurekit_spark.search.arguments import Floats, Rows
from featurekit_spark.search.blocks import block_ranges
from featurekit_spark.search.ivf import (
    CENTROIDS,
    IVFIndex,
    IVFParams,
    ListParts,
    assigned,
    build_index,
    chosen_rows,
    gathered,
    in_part,
    open_index,
    pieces,
    train,
)
from featurekit_spark.search.kernel import Metric
from featurekit_spark.search.matrix import MatrixRef, MatrixStore
from featurekit_spark.search.partitioned import (
    PART_BYTES,
    BlockParts,
    PartTask,
    on_parts,
    vectors_of,
)
from featurekit_spark.search.table import append_files

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["build_index_on", "search_index_on"]

_TASKS_PER_SLOT = 4  # lists differ in length
_ROWS = 4096  # rows in one batch
_SAMPLED = 128 << 20


def build_index_on(
    session: SparkSession,
    store: MatrixStore,
    ref: MatrixRef,
    params: IVFParams,
    *,
    part_bytes: int = PART_BYTES,
) -> IVFIndex:
    """As `build_index`; the sample and the centroids are all that the driver holds."""
    found = open_index(store, ref, params)
    if found is not None or not ref.rows:
        return found or build_index(store, ref, params)
    ranges = block_ranges(store, ref, part_bytes=part_bytes, least=parallelism(session))
    load = BlockParts(store, ref, tuple(ranges))
    parts = session.range(0, len(ranges), 1, len(ranges))
    rows = chosen_rows(ref, params)
    sample = gathered(_samples(session, SampleTask(load, rows)), len(rows), ref.dim)
    lists = params.for_rows(ref.rows)
    centroids = train(sample, lists, iterations=params.iterations, seed=params.seed)
    index = IVFIndex(params.hash(ref), ref, centroids)
    assignment = parts.mapInArrow(AssignTask(load, index), "list int, product_id string, vector binary")
    ddl = "block int, ids array<string>, vectors binary"
    blocks = assignment.groupBy("list").applyInArrow(_blocks_of(index), ddl)
    first = session.createDataFrame([(CENTROIDS, [], bytearray(centroids.tobytes()))], ddl)
    folder = f"hash={index.hash}/{uuid.uuid4().hex}"
    # The table is locked for the commit that names the files, and not while the job writes them.
    blocks.unionByName(first).write.parquet(f"{store.path.rstrip('/')}/{folder}")
    append_files(store.path, index.hash, folder)
    return index


def _samples(session: SparkSession, task: SampleTask) -> Iterator[Floats]:
    """The chosen rows in their order, by a job for as many parts as hold `_SAMPLED` bytes of them: Spark bounds what a
    job may bring to the driver, and Arrow what one array holds."""
    dim, parts = task.load.ref.dim, len(task.load)
    step = max(1, parts * _SAMPLED // max(1, 4 * dim * len(task.rows)))
    for start in range(0, parts, step):
        numbers = session.range(start, min(parts, start + step), 1, min(step, parts - start))
        found = numbers.mapInArrow(task, "row bigint, vector binary").toArrow()
        vectors = vectors_of(found["vector"], dim) if len(found) else np.empty((0, dim), np.float32)
        yield vectors[np.argsort(found["row"].to_numpy())]


def search_index_on(
    queries: DataFrame,
    store: MatrixStore,
    index: IVFIndex,
    k: int,
    *,
    nprobe: int,
    partitions: int | None = None,
    metric: Metric = "ip",
    spread: int = 1,
) -> DataFrame:
    """As `partitioned.search_blocks`, but each query goes only to its `nprobe` nearest lists. A list's queries go to
    one of `partitions` tasks, or to `spread` of them where some lists are asked far more often than others."""
    from pyspark.sql import functions as F

    partitions = partitions or _TASKS_PER_SLOT * parallelism(queries.sparkSession)
    schema = ", ".join(f"`{field.name}` {field.dataType.simpleString()}" for field in queries.schema)
    probed = queries.mapInArrow(ProbeTask(index, nprobe), f"{schema}, probed array<int>")
    share = F.pmod(F.xxhash64("key"), F.lit(spread)).cast("int")
    part = F.explode("probed").alias("list")
    wanted = [name for name in ("key", "vector", "exclude") if name in queries.columns]
    placed = probed.select(*wanted, part).withColumn("part", F.col("list") * spread + share).drop("list")
    return on_parts(placed, PartTask(ListParts(store, index, spread), k, metric), partitions)


@dataclass(frozen=True)
class ProbeTask:
    """Rows with a `vector`, and the lists that each looks at as `probed`."""

    index: IVFIndex
    nprobe: int

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for batch in batches:
            vectors = vectors_of(batch["vector"], self.index.ref.dim)
            probed = self.index.probed(vectors, self.nprobe).astype(np.int32)
            ends = np.arange(len(probed) + 1, dtype=np.int32) * probed.shape[1]
            column = pa.ListArray.from_arrays(pa.array(ends), pa.array(probed.ravel()))
            yield pa.RecordBatch.from_arrays([*batch.columns, column], names=[*batch.schema.names, "probed"])


@dataclass(frozen=True)
class SampleTask:
    """Numbers of parts to those of the chosen rows that are in them."""

    load: BlockParts
    rows: Rows

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for number in _numbers(batches):
            part = self.load(number)
            own = in_part(self.rows, part)
            vectors = pa.array([row.tobytes() for row in part.vectors[own - part.start]], pa.binary())
            yield pa.RecordBatch.from_arrays([pa.array(own), vectors], names=["row", "vector"])


@dataclass(frozen=True)
class AssignTask:
    """Numbers of parts to their rows, each with its list."""

    load: BlockParts
    index: IVFIndex

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for number in _numbers(batches):
            part = self.load(number)
            for start in range(0, len(part.ids), _ROWS):
                vectors = part.vectors[start : start + _ROWS]
                lists = assigned(self.index.centroids, vectors).astype(np.int32)
                columns = [
                    pa.array(lists),
                    pa.array(part.ids[start : start + _ROWS], pa.string()),
                    pa.array([row.tobytes() for row in vectors], pa.binary()),
                ]
                yield pa.RecordBatch.from_arrays(columns, names=["list", "product_id", "vector"])


def _blocks_of(index: IVFIndex) -> Callable[[pa.Table], pa.Table]:
    """What makes blocks of the rows of one list. A function: Spark takes an object's `self` for the group's key."""

    def blocks(rows: pa.Table) -> pa.Table:
        import pyarrow as pa

        rows = rows.sort_by("product_id")  # by bytes of UTF-8: the order of code points
        vectors = vectors_of(rows["vector"].combine_chunks(), index.ref.dim)
        made = list(pieces(rows["list"][0].as_py(), rows["product_id"].to_pylist(), vectors))
        return pa.table(
            {
                "block": pa.array([block for block, _, _ in made], pa.int32()),
                "ids": pa.array([ids for _, ids, _ in made], pa.list_(pa.string())),
                "vectors": pa.array([data for _, _, data in made], pa.binary()),
            }
        )

    return blocks


def _numbers(batches: Iterable[Any]) -> Iterator[int]:
    for batch in batches:
        yield from batch.column(0).to_pylist()
