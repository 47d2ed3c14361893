"""SQL that the table mode shares: Arrow types in Spark's words, rows as structs, errors of workers translated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from featurekit_spark import errors
from featurekit_spark.engines.tasks import GIVEN_SCHEMA
from featurekit_spark.errors import FeaturekitError
from featurekit_spark.results import ROW_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = [
    "GIVEN_DDL",
    "ROW_DDL",
    "as_rows",
    "column_or",
    "ddl_of",
    "read_as_array",
    "row_struct",
    "translated",
    "union_all",
]


def as_rows(rows: pa.Table) -> pa.Table:
    """ROW_SCHEMA with the types that Spark or a candidate's table gave their columns."""
    columns = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.nulls(len(rows), field.type)
        for field in ROW_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=ROW_SCHEMA)


def read_as_array(read: Column) -> Column:
    from pyspark.sql import functions as F

    return F.array(read["source"], read["key"], read["hash"])


def column_or(name: str, defaults: dict[str, Any], *, absent: bool = False) -> Column:
    """A column, or its default where a row has none; `absent`: the frame has no such column."""
    from pyspark.sql import functions as F

    kind = SPARK_TYPES[name]
    default = F.lit(defaults.get(name)).cast(kind)
    return (default if absent else F.coalesce(F.col(name), default)).alias(name)


def row_struct(*, cached: bool = False) -> str:
    """SQL for a row as one struct of GIVEN_SCHEMA, from result rows or from cache entries."""
    parts = []
    for field in GIVEN_SCHEMA:
        kind = SPARK_TYPES[field.name]
        if field.name == "cached":
            parts.append(f"{str(cached).lower()} AS cached")
        elif field.name == "last_reads" or (cached and field.name in ("origin", "until", "reads")):
            parts.append(f"CAST(NULL AS {kind}) AS `{field.name}`")
        elif cached and field.name == "current":
            parts.append("true AS `current`")
        else:
            parts.append(f"`{field.name}`")
    return f"struct({', '.join(parts)})"


def union_all(frames: Sequence[DataFrame]) -> DataFrame:
    whole = frames[0]
    for frame in frames[1:]:
        whole = whole.unionByName(frame)
    return whole


def ddl_of(kind: pa.DataType) -> str:
    """An Arrow type in Spark's words."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"array<{ddl_of(kind.value_type)}>"
    if pa.types.is_struct(kind):
        fields = (kind.field(i) for i in range(kind.num_fields))
        return f"struct<{', '.join(f'`{field.name}`: {ddl_of(field.type)}' for field in fields)}>"
    if pa.types.is_map(kind):
        return f"map<{ddl_of(kind.key_type)}, {ddl_of(kind.item_type)}>"
    if pa.types.is_decimal(kind):
        return f"decimal({kind.precision}, {kind.scale})"
    if pa.types.is_timestamp(kind):
        return "timestamp" if kind.tz else "timestamp_ntz"
    names = {"int8": "tinyint", "int16": "smallint", "int32": "int", "int64": "bigint", "bool": "boolean"}
    names |= {"date32[day]": "date", "large_string": "string", "large_binary": "binary"}
    return names.get(str(kind), str(kind))


SPARK_TYPES = {field.name: ddl_of(field.type) for field in GIVEN_SCHEMA}
ROW_DDL = ", ".join(f"`{field.name}` {SPARK_TYPES[field.name]}" for field in ROW_SCHEMA)
GIVEN_DDL = ", ".join(f"`{field.name}`: {SPARK_TYPES[field.name]}" for field in GIVEN_SCHEMA)


@contextmanager
def translated() -> Iterator[None]:
    """An error that the library raised in a worker, as that error."""
    try:
        yield
    except FeaturekitError:
        raise
    except Exception as error:
        found = re.search(r"featurekit_spark\.errors\.(\w+): (.*)", str(error))
        kind = getattr(errors, found[1], None) if found else None
        if found is None or kind is None:
            raise
        raise kind(found[2].strip()) from error
