"""The search of a stored matrix that is not mapped into memory: part by part or through inverted lists, here or by jobs
of a Spark session.

Decides by the store's options alone, so that every process of a run decides alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.errors import ContextError
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.blocks import read_parts
from featurekit_spark.search.ivf import IVFIndex, IVFParams, build_index, search_index
from featurekit_spark.search.matrix import MatrixRef, MatrixStore
from featurekit_spark.search.partitioned import Lists, search_blocks, search_parts

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["prepare_search", "search_stored"]


def prepare_search(store: MatrixStore, ref: MatrixRef | dict[str, Any]) -> None:
    """Make what `search_stored` looks for in the store, where it is not there yet: inverted lists."""
    if store.options.mode == "ivf":
        _index(store, _ref(ref))


def search_stored(store: MatrixStore, ref: MatrixRef | dict[str, Any], queries: Floats, k: int) -> Lists:
    """The k best rows of a stored matrix for each of `queries` [q, d], by the store's options; by jobs where the store
    has a session (`MatrixStore.on_spark`)."""
    ref, options = _ref(ref), store.options
    index = _index(store, ref) if options.mode == "ivf" else None
    part_bytes = options.part_mb << 20
    if store.session is None:
        if index is None:
            return search_parts(read_parts(store, ref, part_bytes=part_bytes), queries, k)
        return search_index(store, index, queries, k, nprobe=options.nprobe)
    from featurekit_spark.search.ivf_spark import search_index_on

    asked, travelling = _frame(store.session, queries), _without_session(store)
    with _whole_run():
        if index is None:
            found = search_blocks(asked, travelling, ref, k, part_bytes=part_bytes)
        else:
            found = search_index_on(asked, travelling, index, k, nprobe=options.nprobe)
        return _collected(found, len(queries), k)


def _index(store: MatrixStore, ref: MatrixRef) -> IVFIndex:
    params, part_bytes = IVFParams(store.options.lists), store.options.part_mb << 20
    if store.session is None:
        return build_index(store, ref, params, part_bytes=part_bytes)
    from featurekit_spark.search.ivf_spark import build_index_on

    with _whole_run():
        return build_index_on(store.session, _without_session(store), ref, params, part_bytes=part_bytes)


@contextmanager
def _whole_run() -> Iterator[None]:
    """What a job fails at is the run's error: nobody is to look for the key at fault by running it again and again."""
    from featurekit_spark.engines.table_sql import translated

    try:
        with translated():
            yield
    except Exception as error:
        raise ContextError(f"the search on Spark failed: {error}") from error


def _ref(ref: MatrixRef | dict[str, Any]) -> MatrixRef:
    return ref if isinstance(ref, MatrixRef) else MatrixRef(**ref)


def _without_session(store: MatrixStore) -> MatrixStore:
    """As it travels to workers."""
    return MatrixStore(store.path, options=store.options, copies=store.copies)


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
