"""The data files of a cache's tables: reading their rows, and taking rows out.

Rows are taken out by writing the files that hold them anew and swapping them in one commit: exact, whatever the number
of rows, and without a predicate that would leave keys in the table's log. Knows files, not why a row must go.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, RUN_SCHEMA, TRACE_SCHEMA, fitted
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.staged import stats_bound
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import table_lock

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction, RemoveAction

__all__ = [
    "SCHEMAS",
    "TABLES",
    "DataFile",
    "Removed",
    "data_files",
    "file_rows",
    "remove_rows",
    "rows_of",
]

SCHEMAS = {"entries": ENTRY_SCHEMA, "traces": TRACE_SCHEMA, "runs": RUN_SCHEMA}
TABLES = tuple(SCHEMAS)
_TRIES = 5


@dataclass(frozen=True)
class DataFile:
    """A file that a table's current version names. `path`: below the table's folder; `builder` "" for runs.

    `replaceable`: `deltalake` can take it out of the table. Spark writes letters beyond ASCII into a path as they are,
    `deltalake` percent-encodes them, and then does not find the file that it takes out.
    """

    path: str
    builder: str
    size: int
    rows: int
    replaceable: bool = True


@dataclass(frozen=True)
class Removed:
    """What was taken out of one table: rows, data files written anew or dropped, bytes that this frees."""

    rows: int = 0
    files: int = 0
    bytes: int = 0


def data_files(table: DeltaTable) -> list[DataFile]:
    """The data files of the table's current version, in order of path."""
    actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    files = [
        DataFile(
            unquote(row["path"]),
            row.get("partition.builder") or "",
            row["size_bytes"] or 0,
            row["num_records"] or 0,
            row["path"].isascii(),
        )
        for row in actions
    ]
    return sorted(files, key=lambda file: file.path)


def file_rows(
    cache: DeltaCache, name: str, file: DataFile, columns: Collection[str] | None = None
) -> Iterator[pa.Table]:
    """A file's rows in the table's schema, a row group at a time. Raises CacheError where the file is damaged."""
    import pyarrow.parquet as pq

    fields = [f for f in SCHEMAS[name] if columns is None or f.name in columns]
    stored = [f.name for f in fields if name == "runs" or f.name != "builder"]
    try:
        with pq.ParquetFile(file.path, filesystem=cache.storage(name)) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=stored)
                if len(stored) < len(fields):
                    rows = rows.append_column("builder", pa.array([file.builder] * len(rows), pa.string()))
                yield fitted(rows, pa.schema(fields))
    except (OSError, KeyError, pa.ArrowException) as error:
        where = f"{cache.table_path(name)}/{file.path}"
        raise CacheError(
            f"the data file {where} cannot be read: {error}. `featurekit cache verify` lists what is damaged; "
            "restore the file, or move it away and remove it from the table."
        ) from error


def rows_of(
    cache: DeltaCache, name: str, columns: Collection[str], builders: Collection[str] | None = None
) -> pa.Table:
    """Some columns of all rows of a table, and `bytes`: the share of its file that a row takes."""
    fields = [f for f in SCHEMAS[name] if f.name in columns]
    schema = pa.schema([*fields, ("bytes", pa.float64())])
    table = cache.table(name)
    parts = [schema.empty_table()]
    for file in data_files(table) if table is not None else ():
        if builders is None or file.builder in builders:
            for rows in file_rows(cache, name, file, columns):
                share = pa.array(np.full(len(rows), file.size / max(file.rows, 1)))
                parts.append(pa.Table.from_arrays([*rows.columns, share], schema=schema))
    return pa.concat_tables(parts)


def remove_rows(
    cache: DeltaCache,
    name: str,
    doomed: Callable[[pa.Table], Any],
    *,
    columns: Collection[str],
    builders: Collection[str] | None = None,
    edit: Callable[[pa.Table], pa.Table] | None = None,
) -> Removed:
    """Take out the rows for which `doomed` (a table of `columns` in, a mask out) is true: all of them, or none.

    With `edit` they stay, as it gives them back. Appends go on meanwhile; rows that they add are not asked about.
    Raises CacheError.
    """
    for _ in range(_TRIES):
        table = cache.table(name)
        if table is None:
            return Removed()
        removed, actions, written = _planned(cache, table, name, doomed, columns, builders, edit)
        if not removed.rows:
            return removed
        if _swapped(cache, name, actions):
            return removed
        for path in written:  # another writer compacted the files meanwhile
            cache.storage(name).delete_file(path)
    raise CacheError(
        f"{cache.table_path(name)} is rewritten by somebody else all the time: {_TRIES} commits were lost. "
        "Nothing was removed from it; try again when they are done."
    )


def _planned(
    cache: DeltaCache,
    table: DeltaTable,
    name: str,
    doomed: Callable[[pa.Table], Any],
    columns: Collection[str],
    builders: Collection[str] | None,
    edit: Callable[[pa.Table], pa.Table] | None,
) -> tuple[Removed, list[AddAction | RemoveAction], list[str]]:
    """(what would be removed, the actions that do it, the files written for it)."""
    from deltalake.transaction import RemoveAction

    rows = files = freed = 0
    actions: list[AddAction | RemoveAction] = []
    written = []
    counted = table.metadata().configuration.get("delta.dataSkippingStatsColumns", "").split(",")
    for file in data_files(table):
        if builders is not None and file.builder not in builders:
            continue
        masks = [_mask(doomed(part)) for part in file_rows(cache, name, file, columns)]
        hit = int(sum(mask.sum() for mask in masks))
        if not hit:
            continue
        if not file.replaceable:
            raise CacheError(
                f"{hit} rows of {file.builder!r} are in {file.path!r}, which Spark wrote below a folder that deltalake "
                f"cannot take a file out of. Nothing was removed from {table.table_uri}. Delete them with Spark: "
                "DELETE FROM delta.`PATH` WHERE builder = ..., or call the builder by an ASCII name."
            )
        partition: dict[str, str | None] = {} if name == "runs" else {"builder": file.builder}
        rows, files, freed = rows + hit, files + 1, freed + file.size
        actions.append(
            RemoveAction(file.path, True, time.time_ns() // 1_000_000, file.size, partition or None)
        )
        if edit is not None or hit < sum(map(len, masks)):
            add = _rewritten(cache, name, file, masks, counted, partition, edit)
            actions.append(add)
            written.append(unquote(add.path))
            freed -= add.size
    return Removed(rows, files, max(freed, 0)), actions, written


def _rewritten(
    cache: DeltaCache,
    name: str,
    file: DataFile,
    masks: list[Any],
    counted: list[str],
    partition: dict[str, str | None],
    edit: Callable[[pa.Table], pa.Table] | None,
) -> AddAction:
    import pyarrow.parquet as pq
    from deltalake.transaction import AddAction

    schema = pa.schema([f for f in SCHEMAS[name] if f.name not in partition])
    folder = file.path.rpartition("/")[0]
    path = f"{folder}/" * bool(folder) + f"part-{uuid.uuid4().hex}.zstd.parquet"
    storage = cache.storage(name)
    kept = 0
    bounds: dict[str, list[Any]] = {}
    nulls: dict[str, int] = {}
    with pq.ParquetWriter(
        path, schema, filesystem=storage, compression="zstd", compression_level=1
    ) as writer:
        for mask, rows in zip(masks, file_rows(cache, name, file), strict=True):
            left = rows.filter(pa.array(~mask))
            if edit is not None and mask.any():
                left = pa.concat_tables([left, edit(rows.filter(pa.array(mask)))])
            left = left.select(schema.names)
            if not len(left):
                continue
            kept += len(left)
            for column in counted:
                if column in schema.names:
                    found = pc.min_max(left[column]).as_py()
                    bounds.setdefault(column, []).extend(x for x in found.values() if x is not None)
                    nulls[column] = nulls.get(column, 0) + left[column].null_count
            writer.write_table(left)
    stats = {
        "numRecords": kept,
        "minValues": {column: stats_bound(min(found)) for column, found in bounds.items() if found},
        "maxValues": {
            column: stats_bound(max(found), highest=True) for column, found in bounds.items() if found
        },
        "nullCount": nulls,
    }
    size = storage.get_file_info(path).size
    told = json.dumps(stats, ensure_ascii=False)
    return AddAction(path, size, partition, time.time_ns() // 1_000_000, True, told)


def _swapped(cache: DeltaCache, name: str, actions: list[AddAction | RemoveAction]) -> bool:
    """Commit; False where a file that was to be replaced is no longer the table's."""
    from deltalake.exceptions import CommitFailedError, DeltaError
    from deltalake.transaction import RemoveAction

    path = cache.table_path(name)
    gone = {action.path for action in actions if isinstance(action, RemoveAction)}
    try:
        with table_lock(path, owner="cache care"):
            table = cache.table(name)
            if table is None or not gone <= {file.path for file in data_files(table)}:
                return False
            table.create_write_transaction(
                actions, "append", table.schema(), [] if name == "runs" else ["builder"]
            )
    except CommitFailedError:
        return False
    except (DeltaError, OSError) as error:
        raise CacheError(f"rows could not be removed from {path}: {error}. Nothing was changed.") from error
    return True


def _mask(found: Any) -> Any:
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    if isinstance(found, pa.Array):
        found = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return np.asarray(found, dtype=bool)
