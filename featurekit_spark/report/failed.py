"""The keys that failed in a run, as a table of their own: for those who mend catalogs, not runs.

Reads a run's result before it is closed; must not know why keys fail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import ConfigError
from featurekit_spark.locks import local_path, table_lock
from featurekit_spark.masks import masked

if TYPE_CHECKING:
    import pyarrow as pa

    from featurekit_spark.session import RunResult

__all__ = ["failed_rows", "write_rows"]


def failed_rows(result: RunResult) -> pa.Table:
    """One row per target and failed key: run_id, builder, the key's fields as text, error, ts."""
    import pyarrow as pa

    execution = result.execution
    targets = [target.builder.name for target in execution.plan.targets]
    fields = list(dict.fromkeys(name for target in targets for name in execution.graph[target].key))
    names = ["run_id", "builder", *fields, "error"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for target in targets:
        for key, error in execution.errors([target], every=True).items():
            values = dict(zip(execution.graph[target].key, json.loads(key), strict=True))
            row: dict[str, str | None] = {
                "run_id": result.run_id,
                "builder": target,
                "error": masked(error),
            }
            row |= {name: None if value is None else str(value) for name, value in values.items()}
            for name in names:
                columns[name].append(row.get(name))
    stamp = pa.array([result.ts] * len(columns["builder"]), pa.timestamp("us", tz="UTC"))
    arrays = {name: pa.array(column, pa.string()) for name, column in columns.items()}
    return pa.table({**arrays, "ts": stamp})


def write_rows(rows: pa.Table, path: str) -> None:
    """To `path`: a file where it ends in .csv or .parquet, which is replaced; else a Delta table, which grows."""
    try:
        if path.endswith((".csv", ".parquet")):
            _write_file(rows, path)
        else:
            from deltalake import write_deltalake

            with table_lock(path):
                write_deltalake(path, rows, mode="append", schema_mode="merge")
    except Exception as error:  # the storage behind a path raises what it likes
        raise ConfigError(
            f"the failed keys could not be written to {path!r} ({type(error).__name__}: {error}). Nothing is published "
            "yet and what was computed is kept: run again with a path that can be written."
        ) from error


def _write_file(rows: pa.Table, path: str) -> None:
    from pyarrow import csv, fs, parquet

    local = local_path(path)
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f".{local.name}.part")
        storage, name = fs.LocalFileSystem(), str(part)
    else:
        part = None
        storage, name = fs.FileSystem.from_uri(path)
    with storage.open_output_stream(name) as stream:
        if path.endswith(".csv"):
            csv.write_csv(rows, stream)
        else:
            parquet.write_table(rows, stream)
    if part is not None and local is not None:
        part.replace(Path(local))
