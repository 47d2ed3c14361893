"""The table of matrices: a row per block, a row group each, so that blocks are written and read one at a time.

Owns the table's format, that of earlier versions too, and how a matrix is committed: its file first, then one commit
that names it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.cache.storage import storage_of
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import local_path, table_lock
from featurekit_spark.search.rounded import Block, pack

if TYPE_CHECKING:
    from deltalake import DeltaTable

__all__ = ["append_blocks", "append_files", "append_matrix", "streamed"]


def append_matrix(
    path: str, name: str, ids: Sequence[str], stored: Block, storage: str, *, block_bytes: int
) -> None:
    """Add a matrix to the table at `path`, which is made where it is missing. Raises CacheError where that fails."""
    values, factors = stored
    width = values.shape[1] * values.itemsize + (0 if factors is None else factors.itemsize)
    step = max(1, block_bytes // max(1, width))

    def blocks() -> Iterator[tuple[int, Sequence[str], Any]]:
        for block, start in enumerate(range(0, max(len(ids), 1), step)):  # an empty one is one empty block
            part = slice(start, start + step)
            yield block, ids[part], pack(values[part], None if factors is None else factors[part])

    append_blocks(path, name, blocks(), storage)


def append_blocks(
    path: str, name: str, blocks: Iterable[tuple[int, Sequence[str], Any]], storage: str = "float32"
) -> None:
    """Add (block, ids, vectors) under a name, in one file and one commit; one block in memory at a time. Raises
    CacheError where that fails."""
    import pyarrow.parquet as pq
    from deltalake.exceptions import DeltaError

    file, rows = f"hash={name}/{uuid.uuid4().hex}.parquet", 0
    folder = storage_of(path, {})
    try:
        table = _table(path)
        if local_path(path) is not None:
            folder.create_dir(f"hash={name}", recursive=True)
        with folder.open_output_stream(file) as out:
            # Random bits: nothing to compress, to code or to bound. By its bounds a block's number finds its row group.
            writer = pq.ParquetWriter(
                out, _schema(), compression="NONE", use_dictionary=False, write_statistics=["block"]
            )
            with writer:
                for block, ids, data in blocks:
                    writer.write_batch(_row(block, storage, ids, data))
                    rows += 1
            size = out.tell()
        _commit(path, table, name, {file: (size, rows)})
    except (DeltaError, OSError) as error:
        with suppress(Exception):  # without a commit that names it, it is waste and nothing worse
            folder.delete_file(file)
        raise CacheError(f"matrix {name} could not be written to {path}: {error}") from error


def append_files(path: str, name: str, folder: str) -> None:
    """Add the Parquet files of a folder below the table's own, rows (block, ids, vectors) of what is called `name`, in
    one commit. Raises CacheError where that fails."""
    import pyarrow.parquet as pq
    from deltalake.exceptions import DeltaError
    from pyarrow.fs import FileSelector, FileType

    where = storage_of(path, {})
    try:
        files = {}
        for found in where.get_file_info(FileSelector(folder, recursive=True)):
            file = found.path.lstrip("/")
            if found.type == FileType.File and file.endswith(".parquet"):
                with where.open_input_file(file) as data:
                    files[file] = found.size, pq.read_metadata(data).num_rows
        _commit(path, _table(path), name, files)
    except (DeltaError, OSError) as error:
        with suppress(Exception):  # without a commit that names them, they are waste and nothing worse
            where.delete_dir(folder)
        raise CacheError(f"{name} could not be written to {path}: {error}") from error


def _commit(path: str, table: DeltaTable, name: str, files: Mapping[str, tuple[int, int]]) -> None:
    """Name files, each with its size and number of rows, in one commit."""
    from deltalake import CommitProperties
    from deltalake.transaction import AddAction, RemoveAction

    now = time.time_ns() // 10**6
    added: list[AddAction | RemoveAction] = [
        AddAction(file, size, {"hash": name}, now, True, json.dumps({"numRecords": rows}))
        for file, (size, rows) in files.items()
    ]
    with table_lock(path):
        table.update_incremental()
        table.create_write_transaction(
            added,
            "append",
            table.schema(),
            ["hash"],
            commit_properties=CommitProperties(custom_metadata={"featurekit": "matrix"}),
        )


def streamed(path: str, name: str, blocks: Sequence[int]) -> Iterator[Any]:
    """The `vectors` of some of a matrix's blocks, in the order in which they are named: one at a time in memory, or all
    where a file has one row group, as earlier versions wrote it. A file that has them in that order, as every one has,
    is read once. CacheError where they cannot be read."""
    import pyarrow as pa

    wanted, at = list(blocks), 0
    try:
        while at < len(wanted):
            before = at
            for parquet in _files(path, name):
                for batch in parquet.iter_batches(1, columns=["block", "vectors"], use_threads=False):
                    if batch.column(0)[0].as_py() == wanted[at]:
                        yield batch.column(1)[0].as_buffer()
                        at += 1
                        if at == len(wanted):
                            return
            if at == before:
                raise CacheError(
                    f"block {wanted[at]} of matrix {name} is not in {path}; compute the embedding DB again"
                )
    except (OSError, pa.ArrowInvalid) as error:
        raise CacheError(f"matrix {name} in {path} cannot be read: {error}") from error


def _files(path: str, name: str) -> Iterator[Any]:
    """A matrix's data files, opened one after the other."""
    import pyarrow.parquet as pq
    from deltalake import DeltaTable

    folder = storage_of(path, {})
    for uri in DeltaTable(path).file_uris(file_pruning_predicate=[("hash", "=", name)]):
        own = f"hash={name}/"
        with folder.open_input_file(own + uri.rpartition(own)[2]) as file:
            yield pq.ParquetFile(file, pre_buffer=False)


def _table(path: str) -> DeltaTable:
    """The table, with the columns that it lacks where it is from before there were types."""
    import pyarrow as pa
    from deltalake import DeltaTable, Field, Schema
    from deltalake.schema import PrimitiveType

    with table_lock(path):
        if not DeltaTable.is_deltatable(path):
            return DeltaTable.create(
                path,
                Schema.from_arrow(pa.schema([("hash", pa.string()), *_schema()])),
                mode="ignore",
                partition_by=["hash"],
                configuration={"delta.minReaderVersion": "1", "delta.minWriterVersion": "2"},
            )
        table = DeltaTable(path)
        if "storage" not in {field.name for field in table.schema().fields}:
            table.alter.add_columns([Field("storage", PrimitiveType("string"))])
        return table


def _schema() -> Any:
    """Of a data file: the partition's column is in its folder's name."""
    import pyarrow as pa

    return pa.schema(
        [
            ("block", pa.int32()),
            ("storage", pa.string()),
            ("ids", pa.list_(pa.string())),
            ("vectors", pa.binary()),
        ]
    )


def _row(block: int, storage: str, ids: Sequence[str], data: Any) -> Any:
    import pyarrow as pa

    ends = np.array([0, len(data)], dtype="<i4")
    return pa.record_batch(
        [
            pa.array([block], pa.int32()),
            pa.array([storage], pa.string()),
            pa.array([list(ids)], pa.list_(pa.string())),
            pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(data)]),
        ],
        schema=_schema(),
    )
