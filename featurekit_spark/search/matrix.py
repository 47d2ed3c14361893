"""Where embedding matrices live: block rows of a Delta table, and a memory-mapped copy of each on every host.

Owns the table's format and the local copies. A matrix is named by the hash of its ids and vectors, so that
equal content is stored once and a copy never goes stale.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from featurekit_spark.errors import CacheError, DataError
from featurekit_spark.locks import table_lock
from featurekit_spark.search.incremental import Change, change_between
from featurekit_spark.search.kernel import FlatIndex, Floats

__all__ = ["Matrix", "MatrixRef", "MatrixStore", "host_folder"]

_BLOCK_BYTES = 8 << 20  # vectors in one row of the table
_KEPT_OPEN = 4  # matrices a process keeps mapped
_KEPT_ON_DISK = 32  # local copies a host keeps


@dataclass(frozen=True)
class MatrixRef:
    """Names a matrix: hash of its content, size, and the folder below the store in which its blocks are."""

    hash: str
    rows: int
    dim: int
    path: str


@dataclass(frozen=True)
class Matrix:
    """ids and vectors (float32 [rows, dim]), aligned. `index` is checked once and can be searched many
    times."""

    ids: tuple[str, ...]
    vectors: Floats

    @cached_property
    def index(self) -> FlatIndex:
        return FlatIndex(self.vectors, ids=self.ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row number by id."""
        return {member: row for row, member in enumerate(self.ids)}


class MatrixStore:
    """Matrices in the Delta table at `path` (any storage that deltalake can write).

    `put` is one blind append, left out where the content is there already; `open` reads from the table once
    per host, then from a memory-mapped file that all processes of the host share.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @classmethod
    def temporary(cls) -> MatrixStore:
        """This process's own store, removed when the process ends; copies of it that travel to workers of the
        same host share it."""
        return cls(_temporary_folder())

    def __repr__(self) -> str:
        return f"MatrixStore({self.path!r})"

    def put(self, ids: Sequence[str], vectors: Any) -> MatrixRef:
        """Store a matrix: distinct ids, float32 [len(ids), dim]. Raises DataError for what could not be
        searched."""
        array = np.ascontiguousarray(vectors, dtype="<f4")
        if array.ndim != 2 or len(array) != len(ids):
            raise DataError(f"{len(ids)} ids do not fit vectors of shape {array.shape}; give one row per id")
        if len(set(ids)) < len(ids):
            twice = next(member for i, member in enumerate(ids) if member in ids[:i])
            raise DataError(f"id {twice!r} is in the matrix twice; ids must be distinct")
        FlatIndex(array, ids=ids)
        name = _content_hash(ids, array)
        ref = MatrixRef(name, len(ids), array.shape[1], f"hash={name}")
        if not self._has(ref):
            self._append(ref, list(ids), array)
        return ref

    def open(self, ref: MatrixRef | dict[str, Any]) -> Matrix:
        """The matrix that `put` named; a dict with MatrixRef's fields will do. CacheError where it is
        gone."""
        if not isinstance(ref, MatrixRef):
            ref = MatrixRef(**ref)
        with _lock:
            matrix = _opened.get(ref.hash)
            if matrix is None:
                matrix = _opened[ref.hash] = self._local(ref)
            _opened.move_to_end(ref.hash)
            while len(_opened) > _KEPT_OPEN:
                _opened.popitem(last=False)
        return matrix

    def change(self, former: MatrixRef | dict[str, Any], ref: MatrixRef | dict[str, Any]) -> Change:
        """What makes the matrix `ref` of the matrix `former`; remembered. CacheError where one of them is gone."""
        old, new = self.open(former), self.open(ref)
        with _lock:
            found = next((change for a, b, change in _changes if a is old and b is new), None)
            if found is None:
                found = change_between(old.vectors, old.row_of, new.vectors, new.ids)
                _changes.append((old, new, found))
        return found

    def _has(self, ref: MatrixRef) -> bool:
        from deltalake import DeltaTable

        if not DeltaTable.is_deltatable(self.path):
            return False
        return bool(DeltaTable(self.path).file_uris(file_pruning_predicate=[("hash", "=", ref.hash)]))

    def _append(self, ref: MatrixRef, ids: list[str], vectors: Floats) -> None:
        import pyarrow as pa
        from deltalake import ColumnProperties, CommitProperties, WriterProperties, write_deltalake

        step = max(1, _BLOCK_BYTES // max(1, 4 * ref.dim))
        starts = range(0, max(len(ids), 1), step)  # an empty matrix is one empty block
        table = pa.table(
            {
                "hash": pa.array([ref.hash] * len(starts), pa.string()),
                "block": pa.array(range(len(starts)), pa.int32()),
                "ids": pa.array([ids[s : s + step] for s in starts], pa.list_(pa.string())),
                "vectors": pa.array([vectors[s : s + step].tobytes() for s in starts], pa.binary()),
            }
        )
        with table_lock(self.path):
            write_deltalake(
                self.path,
                table,
                mode="append",
                partition_by=["hash"],
                # Random bits: nothing to compress, to code or to bound.
                writer_properties=WriterProperties(
                    compression="UNCOMPRESSED",
                    default_column_properties=ColumnProperties(
                        dictionary_enabled=False, statistics_enabled="NONE"
                    ),
                ),
                configuration={"delta.minReaderVersion": "1", "delta.minWriterVersion": "2"},
                commit_properties=CommitProperties(custom_metadata={"featurekit": "matrix"}),
            )

    def _local(self, ref: MatrixRef) -> Matrix:
        """Map this host's copy, made first where there is none or its size is wrong."""
        folder = host_folder()
        vectors, ids = folder / f"{ref.hash}.f4", folder / f"{ref.hash}.json"
        if not (ids.exists() and vectors.exists() and vectors.stat().st_size == 4 * ref.rows * ref.dim):
            found_ids, found = self._read(ref)
            _write_whole(vectors, found.tobytes())
            _write_whole(ids, json.dumps(found_ids).encode())  # last: its presence says that both are whole
            _forget_old(folder)
        names = tuple(json.loads(ids.read_bytes()))
        if len(names) != ref.rows:
            ids.unlink()
            raise CacheError(f"the local copy of matrix {ref.hash} was damaged and is removed; try again")
        if not ref.rows * ref.dim:
            return Matrix(names, np.empty((ref.rows, ref.dim), dtype=np.float32))
        mapped = np.memmap(vectors, dtype="<f4", mode="r", shape=(ref.rows, ref.dim))
        return Matrix(names, np.asarray(mapped))

    def _read(self, ref: MatrixRef) -> tuple[list[str], Floats]:
        from deltalake import DeltaTable, QueryBuilder

        if not DeltaTable.is_deltatable(self.path):
            raise CacheError(self._gone(ref))
        # Not to_pyarrow_table: it can abort the interpreter's exit on large tables.
        query = QueryBuilder().register("matrices", DeltaTable(self.path))
        sql = f"SELECT block, ids, vectors FROM matrices WHERE hash = '{ref.hash}'"
        blocks: dict[int, tuple[list[str], bytes]] = {}  # two writers at once leave a block twice
        for batch in _batches(query.execute(sql)):
            for row in batch.to_pylist():
                blocks[row["block"]] = (row["ids"], row["vectors"])
        ids = [member for block in sorted(blocks) for member in blocks[block][0]]
        data = b"".join(blocks[block][1] for block in sorted(blocks))
        if not blocks or len(data) != 4 * ref.rows * ref.dim:
            raise CacheError(self._gone(ref))
        vectors = np.frombuffer(data, dtype="<f4").reshape(ref.rows, ref.dim)
        if _content_hash(ids, vectors) != ref.hash:
            raise CacheError(f"matrix {ref.hash} in {self.path} is damaged: its content has another hash")
        return ids, vectors

    def _gone(self, ref: MatrixRef) -> str:
        return (
            f"matrix {ref.hash} ({ref.rows} x {ref.dim}) is not in {self.path}. Was the folder moved or "
            "cleared? Compute the embedding DB again, or point the context's matrices to where it is."
        )


_lock = threading.Lock()
_opened: OrderedDict[str, Matrix] = OrderedDict()
_changes: deque[tuple[Matrix, Matrix, Change]] = deque(maxlen=2)


def _fresh_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock)


def _content_hash(ids: Sequence[str], vectors: Floats) -> str:
    image = sha256(f"matrix\n{len(ids)}\n{vectors.shape[1]}\n".encode())
    image.update(json.dumps(list(ids)).encode())
    image.update(np.ascontiguousarray(vectors, dtype="<f4").data)
    return image.hexdigest()[:32]


def _batches(answer: Any) -> Any:
    """QueryBuilder's answer as pyarrow record batches; it speaks the Arrow C stream interface."""
    import pyarrow as pa

    return pa.RecordBatchReader.from_stream(answer) if hasattr(answer, "__arrow_c_stream__") else answer


def host_folder() -> Path:
    """This user's folder for copies; nobody else may write there, as what is in it is trusted by name."""
    folder = Path(tempfile.gettempdir()) / f"featurekit-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise CacheError(
            f"{folder} belongs to somebody else or others may write to it; remove it or set TMPDIR"
        )
    return folder


def _write_whole(path: Path, data: bytes) -> None:
    """Write by renaming, so that another process sees all of the file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _forget_old(folder: Path) -> None:
    """Remove the oldest copies; a process that has one mapped keeps it."""
    copies = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for ids in copies[_KEPT_ON_DISK:]:
        with suppress(OSError):
            ids.unlink()
            ids.with_suffix(".f4").unlink()


@lru_cache(maxsize=1)
def _temporary_folder() -> str:
    path = str(Path(tempfile.gettempdir()) / f"featurekit-matrices-{uuid.uuid4().hex}")
    atexit.register(_remove_as, os.getpid(), path)
    return path


def _remove_as(owner: int, path: str) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).with_name(f".{Path(path).name}.lock").unlink(missing_ok=True)
