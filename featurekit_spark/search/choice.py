"""The search of a stored matrix that is not mapped into memory: part by part or through inverted lists, here or by jobs
of a Spark session.

Decides by the store's options alone, so that every process of a run decides alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.blocks import read_parts
from featurekit_spark.search.ivf import IVFParams, build_index, search_index
from featurekit_spark.search.matrix import MatrixRef, MatrixStore
from featurekit_spark.search.partitioned import Lists, search_blocks, search_parts

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["search_stored"]


def search_stored(store: MatrixStore, ref: MatrixRef | dict[str, Any], queries: Floats, k: int) -> Lists:
    """The k best rows of a stored matrix for each of `queries` [q, d], by the store's options; by jobs where the store
    has a session (`MatrixStore.on_spark`)."""
    if not isinstance(ref, MatrixRef):
        ref = MatrixRef(**ref)
    if store.session is not None:
        return _search_on(store.session, MatrixStore(store.path, options=store.options), ref, queries, k)
    part_bytes = store.options.part_mb << 20
    if store.options.mode != "ivf":
        return search_parts(read_parts(store, ref, part_bytes=part_bytes), queries, k)
    index = build_index(store, ref, IVFParams(store.options.lists), part_bytes=part_bytes)
    return search_index(store, index, queries, k, nprobe=store.options.nprobe)


def _search_on(session: SparkSession, store: MatrixStore, ref: MatrixRef, queries: Floats, k: int) -> Lists:
    from featurekit_spark.engines.table_sql import translated
    from featurekit_spark.search.ivf_spark import build_index_on, search_index_on

    asked, part_bytes = _frame(session, queries), store.options.part_mb << 20
    with translated():
        if store.options.mode == "ivf":
            index = build_index_on(session, store, ref, IVFParams(store.options.lists), part_bytes=part_bytes)
            found = search_index_on(asked, store, index, k, nprobe=store.options.nprobe)
        else:
            found = search_blocks(asked, store, ref, k, part_bytes=part_bytes)
        return _collected(found, len(queries), k)


def _frame(session: SparkSession, queries: Floats) -> DataFrame:
    import pyarrow as pa

    rows = np.ascontiguousarray(queries, dtype="<f4")
    ends = np.arange(len(rows) + 1, dtype=np.int64) * (4 * rows.shape[1])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(rows)]
    vectors = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers).cast(pa.binary())
    return session.createDataFrame(pa.table({"key": pa.array(np.arange(len(rows))), "vector": vectors}))


def _collected(frame: DataFrame, queries: int, k: int) -> Lists:
    lists = Lists.empty(queries, k)
    for batch in frame.toArrow().to_batches():
        hits = batch["hits"]
        lengths = hits.value_lengths().to_numpy()
        at = np.repeat(batch["key"].to_numpy(), lengths)
        place = np.arange(len(at)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        flat = hits.flatten()
        lists.scores[at, place] = flat.field("score").to_numpy()
        lists.ids[at, place] = flat.field("product_id").to_numpy(zero_copy_only=False)
    return lists
