"""Opens a Delta table in-process and selects from it by SQL, with no JVM.

Owns the in-process reader and how its errors become ours. Knows nothing of products or interactions.
Credentials for object stores come from the environment, as `deltalake` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featurekit_spark.errors import ConfigError
from featurekit_spark.sources.arrowtypes import plain_type

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

__all__ = ["column_names", "equal_to", "identifier", "literal", "open_table", "select", "size", "table_uri"]


def table_uri(path: str | Path) -> str:
    """`path` as both readers take it: absolute if it is a mounted path, unchanged if it is a URI."""
    text = str(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        return text
    return str(Path(text).expanduser().resolve())


def open_table(path: str | Path, *, what: str, version: int | None = None) -> DeltaTable:
    """The table at `version` (None: the newest); ConfigError, naming section `what`, if there is none."""
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    try:
        return DeltaTable(table_uri(path), version=version)
    except TableNotFoundError:
        raise ConfigError(f"{what}.path {str(path)!r}: there is no Delta table.") from None


def column_names(table: DeltaTable) -> tuple[str, ...]:
    return tuple(field.name for field in table.schema().fields)


def select(
    table: DeltaTable,
    columns: Mapping[str, str],
    *,
    where: str = "",
    distinct: bool = False,
    limit: int | None = None,
) -> pa.Table:
    """The columns (new name to column of the table), of the types that the table declares."""
    import pyarrow as pa
    from deltalake import QueryBuilder

    declared = pa.schema(table.schema().to_arrow())
    schema = pa.schema([(new, plain_type(declared.field(old).type)) for new, old in columns.items()])
    chosen = ", ".join(f"{identifier(old)} AS {identifier(new)}" for new, old in columns.items())
    query = f"SELECT {'DISTINCT ' if distinct else ''}{chosen} FROM t" + (f" WHERE {where}" if where else "")
    if limit is not None:
        query += f" LIMIT {limit}"
    # to_pyarrow_table has aborted at the interpreter's exit; the query engine has not.
    return pa.table(QueryBuilder().register("t", table).execute(query)).cast(schema)


def size(table: DeltaTable, partitions: Mapping[str, str]) -> int:
    """Bytes of the table's files; of those with the given values only, where it is partitioned by them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    files = pa.table(table.get_add_actions(flatten=True))
    for column, value in partitions.items():
        name = f"partition.{column}"
        if name in files.column_names:
            files = files.filter(pc.equal(files[name].cast(pa.string()), value))
    return int(pc.sum(files["size_bytes"]).as_py() or 0)


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def equal_to(values: Mapping[str, str]) -> str:
    """The condition that each column has its value; empty without columns."""
    return " AND ".join(f"{identifier(name)} = {literal(value)}" for name, value in values.items())
