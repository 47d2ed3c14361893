"""Where embedding matrices live: block rows of a Delta table, of which every host maps a copy.

Owns a matrix's name and what is open. A matrix is named by the hash of its ids and vectors, so that equal content
is stored once and a copy never goes stale.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from featurekit_spark.errors import CacheError, DataError
from featurekit_spark.search.copies import Content, Copies, Copy
from featurekit_spark.search.ids import Ids
from featurekit_spark.search.incremental import Change, change_between
from featurekit_spark.search.kernel import FlatIndex, Floats
from featurekit_spark.search.options import SearchOptions
from featurekit_spark.search.rounded import RoundedRows, as_rows, encode, unpack
from featurekit_spark.search.table import append_matrix, streamed

__all__ = ["Matrix", "MatrixRef", "MatrixStore"]

_BLOCK_BYTES = 8 << 20  # vectors in one row of the table
_KEPT_OPEN = 4  # matrices a process keeps mapped
# Share of a matrix's rows. Where a fifth changed, to merge takes two thirds of a full search's time, and every process
# copies that fifth.
_MOST_CHANGED = 0.2
_IDS_HASHED = 65_536  # at a time


@dataclass(frozen=True)
class MatrixRef:
    """Names a matrix: hash of its content, size, and the folder below the store in which its blocks are."""

    hash: str
    rows: int
    dim: int
    path: str


@dataclass(frozen=True, eq=False)
class Matrix:
    """ids and vectors (float32 [rows, dim], or what reads as that), aligned. `index` can be searched many times."""

    copy: Copy

    @property
    def ids(self) -> Ids:
        return self.copy.ids

    @cached_property
    def vectors(self) -> Floats | RoundedRows:
        return self.copy.vectors

    @cached_property
    def index(self) -> FlatIndex:
        return FlatIndex(self.vectors, ids=self.ids, norms=self.copy.norms, order=self.copy.ranks)


class MatrixStore:
    """Matrices in the Delta table at `path` (any storage that deltalake can write).

    `put` is one blind append, left out where the content is there already; `open` reads from the table once per host,
    into one of `copies`, which all processes of the host map.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        options: SearchOptions | None = None,
        session: Any = None,
        copies: Copies | None = None,
    ) -> None:
        self.path, self.session = str(path), session
        self.options = options or SearchOptions()
        self.copies = copies or Copies()

    @classmethod
    def temporary(cls) -> MatrixStore:
        """This process's own store, removed when the process ends; copies of it that travel to workers of the
        same host share it."""
        return cls(_temporary_folder())

    def __repr__(self) -> str:
        return f"MatrixStore({self.path!r})"

    def put(self, ids: Sequence[str], vectors: Any, *, storage: str = "float32") -> MatrixRef:
        """Store a matrix: distinct ids, float32 [len(ids), dim], rounded to `storage`. Raises DataError for what could
        not be searched."""
        array = np.ascontiguousarray(vectors, dtype="<f4")
        if array.ndim != 2 or len(array) != len(ids):
            raise DataError(f"{len(ids)} ids do not fit vectors of shape {array.shape}; give one row per id")
        if len(set(ids)) < len(ids):
            twice = next(member for member, times in Counter(ids).items() if times > 1)
            raise DataError(f"id {twice!r} is in the matrix twice; ids must be distinct")
        FlatIndex(array, ids=ids)
        values, factors = encode(array, storage)
        if values is not array:  # what was finite and not zero may be so no more
            FlatIndex(as_rows(values, factors), ids=ids)
        name = _content_hash(ids, values, factors, storage)
        ref = MatrixRef(name, len(ids), array.shape[1], f"hash={name}")
        if not self._has(ref):
            append_matrix(self.path, name, ids, (values, factors), storage, block_bytes=_BLOCK_BYTES)
        return ref

    def open(self, ref: MatrixRef | dict[str, Any]) -> Matrix:
        """The matrix that `put` named; a dict with MatrixRef's fields will do. CacheError where it is gone,
        ContextError where this host has no place for a copy."""
        if not isinstance(ref, MatrixRef):
            ref = MatrixRef(**ref)
        with _lock:
            matrix = _opened.get(ref.hash)
            if matrix is None:
                copy = self.copies.open(ref.hash, ref.rows, ref.dim)
                matrix = _opened[ref.hash] = Matrix(self._copied(ref) if copy is None else copy)
            _opened.move_to_end(ref.hash)
            while len(_opened) > _KEPT_OPEN:
                _opened.popitem(last=False)
        return matrix

    def change(self, former: MatrixRef | dict[str, Any], ref: MatrixRef | dict[str, Any]) -> Change:
        """What makes the matrix `ref` of the matrix `former`, or that it is too large; remembered. CacheError where one
        of them is gone."""
        old, new = self.open(former), self.open(ref)
        with _lock:
            found = next((change for a, b, change in _changes if a is old and b is new), None)
            if found is None:
                found = change_between(old.vectors, old.ids, new.vectors, new.ids, most=_MOST_CHANGED)
                _changes.append((old, new, found))
        return found

    def on_spark(self, session: Any) -> MatrixStore:
        """The same matrices for a driver: those that are not mapped are searched by jobs of `session`."""
        return MatrixStore(self.path, options=self.options, session=session, copies=self.copies)

    def _has(self, ref: MatrixRef) -> bool:
        from deltalake import DeltaTable

        if not DeltaTable.is_deltatable(self.path):
            return False
        return bool(DeltaTable(self.path).file_uris(file_pruning_predicate=[("hash", "=", ref.hash)]))

    def _copied(self, ref: MatrixRef) -> Copy:
        """A copy of what the table has; its blocks are never all in memory."""

        def check(copy: Copy) -> None:
            if _content_hash(copy.ids, copy.values, copy.factors, copy.storage) != ref.hash:
                raise CacheError(f"matrix {ref.hash} in {self.path} is damaged: its content has another hash")

        return self.copies.make(ref.hash, ref.rows, ref.dim, lambda: self._read(ref), check)

    def _read(self, ref: MatrixRef) -> Content:
        from deltalake import DeltaTable, QueryBuilder

        if not DeltaTable.is_deltatable(self.path):
            raise CacheError(self._gone(ref))
        query = QueryBuilder().register("matrices", table := DeltaTable(self.path))
        # What was written before there were other types does not name any.
        typed = "storage" in {field.name for field in table.schema().fields}
        columns = f"block, ids, {'storage' if typed else 'NULL AS storage'}"
        where = f"FROM matrices WHERE hash = '{ref.hash}'"
        # By its number: two writers at once leave a block twice.
        heads = {head["block"]: head for head in _rows(query.execute(f"SELECT {columns} {where}"))}
        ids = Ids.of(member for block in sorted(heads) for member in heads[block]["ids"])
        if not heads or len(ids) != ref.rows:
            raise CacheError(self._gone(ref))
        storage = heads[min(heads)]["storage"] or "float32"
        blocks = (unpack(data, storage, ref.dim) for data in streamed(self.path, ref.hash, sorted(heads)))
        return Content(storage, ids, blocks)

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


def _content_hash(ids: Sequence[str], values: Any, factors: Floats | None, storage: str) -> str:
    kind = "" if storage == "float32" else f"{storage}\n"
    image = sha256(f"matrix\n{kind}{len(ids)}\n{values.shape[1]}\n".encode())
    image.update(b"[")
    for start in range(0, len(ids), _IDS_HASHED):  # as one text of them all would be
        part = json.dumps(list(ids[start : start + _IDS_HASHED]))[1:-1]
        image.update(f"{', ' if start else ''}{part}".encode())
    image.update(b"]")
    for array in (values, factors):
        if array is not None:
            image.update(np.ascontiguousarray(array).data)
    return image.hexdigest()[:32]


def _rows(answer: Any) -> Iterator[dict[str, Any]]:
    for batch in _batches(answer):
        yield from batch.to_pylist()


def _batches(answer: Any) -> Any:
    """QueryBuilder's answer as pyarrow record batches; it speaks the Arrow C stream interface."""
    import pyarrow as pa

    return pa.RecordBatchReader.from_stream(answer) if hasattr(answer, "__arrow_c_stream__") else answer


@lru_cache(maxsize=1)
def _temporary_folder() -> str:
    path = str(Path(tempfile.gettempdir()) / f"featurekit-matrices-{uuid.uuid4().hex}")
    atexit.register(_remove_as, os.getpid(), path)
    return path


def _remove_as(owner: int, path: str) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).with_name(f".{Path(path).name}.lock").unlink(missing_ok=True)
