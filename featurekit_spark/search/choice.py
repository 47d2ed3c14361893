"""The search of a stored matrix that is not mapped into memory: part by part or through inverted lists, here or by jobs
of a Spark session.

Whether a search is exact is the caller's choice; by the store's options an exact one is of the whole matrix or of its
parts, with the same answers. Every process of a run decides alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.errors import ContextError, NotBuiltError
from featurekit_spark.locks import file_lock, local_path
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.blocks import PartedMatrix, read_parts, stored_type
from featurekit_spark.search.ivf import IVFIndex, IVFParams, build_index, open_index, search_index
from featurekit_spark.search.matrix import Matrix, MatrixRef, MatrixStore
from featurekit_spark.search.options import Probes
from featurekit_spark.search.partitioned import Lists, search_blocks, search_parts
from featurekit_spark.search.rounded import STORAGES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = [
    "NotIndexedError",
    "is_mapped",
    "is_prepared",
    "open_stored",
    "prepare_search",
    "queries_at_once",
    "query_table",
    "search_stored",
]

_QUERY_BYTES = 256 << 20  # they pass through the heap of Spark's driver
_BUILDING_S = 6 * 3600.0  # waited for another process's index


class NotIndexedError(NotBuiltError, ContextError):
    """A matrix has no inverted lists yet. No key's fault."""


def is_mapped(store: MatrixStore, ref: MatrixRef | Mapping[str, Any]) -> bool:
    """Whether the store's options have an exact search of this matrix be one of the whole, from memory."""
    ref = _ref(ref)
    fits = {storage: store.options.is_mapped(ref.rows, ref.dim, storage) for storage in STORAGES}
    # Only where it depends on the type is the table asked for it.
    return any(fits.values()) and (all(fits.values()) or fits[stored_type(store, ref)])


def open_stored(store: MatrixStore, ref: MatrixRef | Mapping[str, Any]) -> Matrix | PartedMatrix:
    """All ids and vectors of a matrix, for whoever reads them in their order: mapped where it is to be mapped."""
    ref = _ref(ref)
    if is_mapped(store, ref):
        return store.open(ref)
    return PartedMatrix(store, ref, part_bytes=store.options.part_mb << 20)


def queries_at_once(ref: MatrixRef | Mapping[str, Any]) -> int:
    """How many queries one call of `search_stored` is to be given at most."""
    return max(1, _QUERY_BYTES // max(1, 4 * _ref(ref).dim))


def is_prepared(store: MatrixStore, ref: MatrixRef | Mapping[str, Any], probes: Probes) -> bool:
    """Whether the inverted lists are there."""
    return open_index(store, _ref(ref), IVFParams(probes.lists)) is not None


def prepare_search(store: MatrixStore, ref: MatrixRef | Mapping[str, Any], probes: Probes) -> None:
    """Make the inverted lists that a search by `probes` looks for, if they are missing; by jobs where the store has a
    session. For runs: the matrix is read several times. One process at a time makes them."""
    ref, params, part_bytes = _ref(ref), IVFParams(probes.lists), store.options.part_mb << 20
    if open_index(store, ref, params) is not None:
        return
    with _building(store, params.hash(ref)):  # who waited finds them
        if store.session is None:
            build_index(store, ref, params, part_bytes=part_bytes)
            return
        from featurekit_spark.search.ivf_spark import build_index_on

        with _whole_run():
            build_index_on(store.session, _without_session(store), ref, params, part_bytes=part_bytes)


def search_stored(
    store: MatrixStore,
    ref: MatrixRef | Mapping[str, Any],
    queries: Floats,
    k: int,
    *,
    probes: Probes | None = None,
) -> Lists:
    """The k best rows of a stored matrix for each of `queries` [q, d], by jobs where the store has a session
    (`MatrixStore.on_spark`): of all rows, or with `probes` of inverted lists, which somebody has prepared
    (NotIndexedError)."""
    ref = _ref(ref)
    index = None if probes is None else _index(store, ref, probes)
    part_bytes = store.options.part_mb << 20
    if store.session is None:
        if index is None or probes is None:
            return search_parts(read_parts(store, ref, part_bytes=part_bytes), queries, k)
        return search_index(store, index, queries, k, nprobe=probes.nprobe)
    from featurekit_spark.search.ivf_spark import search_index_on

    asked, travelling = store.session.createDataFrame(query_table(queries)), _without_session(store)
    with _whole_run():
        if index is None or probes is None:
            found = search_blocks(asked, travelling, ref, k, part_bytes=part_bytes)
        else:
            found = search_index_on(asked, travelling, index, k, nprobe=probes.nprobe)
        return _collected(found, len(queries), k)


def _index(store: MatrixStore, ref: MatrixRef, probes: Probes) -> IVFIndex:
    found = open_index(store, ref, IVFParams(probes.lists))
    if found is None:
        raise NotIndexedError(
            f"the inverted lists of matrix {ref.hash} are not in {store.path}; a run makes them (session.run)"
        )
    return found


@contextmanager
def _building(store: MatrixStore, name: str) -> Iterator[None]:
    """Kept by who makes an index. Among processes that share no disk two may make it at once, which does no harm."""
    own = local_path(store.path)
    folder = Path(tempfile.gettempdir()) if own is None else own.resolve().parent
    path = folder / f".featurekit-index-{os.getuid()}-{name}.lock"
    with file_lock(path, timeout_s=_BUILDING_S, owner="inverted lists"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits for it finds the index


@contextmanager
def _whole_run() -> Iterator[None]:
    """What a job fails at is the run's error: nobody is to look for the key at fault by running it again and again."""
    from featurekit_spark.engines.table_sql import translated

    try:
        with translated():
            yield
    except Exception as error:
        raise ContextError(f"the search on Spark failed: {error}") from error


def _ref(ref: MatrixRef | Mapping[str, Any]) -> MatrixRef:
    return ref if isinstance(ref, MatrixRef) else MatrixRef(**ref)


def _without_session(store: MatrixStore) -> MatrixStore:
    """As it travels to workers."""
    return MatrixStore(store.path, options=store.options, copies=store.copies)


def query_table(queries: Floats, *, chunk_bytes: int = _QUERY_BYTES) -> Any:
    """(key, vector) of queries by number, in chunks: Arrow's binary holds 2 GiB at most."""
    import pyarrow as pa

    rows = np.ascontiguousarray(queries, dtype="<f4")
    width = 4 * rows.shape[1]
    step = max(1, chunk_bytes // max(1, width))
    chunks = []
    for start in range(0, max(1, len(rows)), step):
        part = rows[start : start + step]
        ends = np.arange(len(part) + 1, dtype=np.int32) * np.int32(width)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(part)]
        chunks.append(pa.Array.from_buffers(pa.binary(), len(part), buffers))
    return pa.table({"key": pa.array(np.arange(len(rows))), "vector": pa.chunked_array(chunks)})


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
