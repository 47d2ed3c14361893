"""SQL that the table mode shares: Arrow types in Spark's words, rows as structs, errors of workers translated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from featurekit_spark import errors
from featurekit_spark.engines.tasks import GIVEN_SCHEMA, ReadsTask
from featurekit_spark.errors import FeaturekitError
from featurekit_spark.results import ROW_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = [
    "FRESH",
    "GIVEN_DDL",
    "ROW_DDL",
    "SPARK_TYPES",
    "as_rows",
    "bare_struct",
    "bucket_hashes",
    "ddl_of",
    "entry_struct",
    "literal",
    "row_struct",
    "short_hash",
    "text_reads",
    "translated",
    "union_all",
]


FRESH = ("computed", "updated", "error", "upstream")
"""Origins of results that a cache does not have yet."""


def as_rows(rows: pa.Table) -> pa.Table:
    """ROW_SCHEMA with the types that Spark gave its columns."""
    return rows.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def row_struct(**constants: str | None) -> str:
    """SQL for a row as one struct of GIVEN_SCHEMA; `constants` in place of columns, None for null."""
    constants = {"cached": "false", "last_reads": None, **constants}
    parts = []
    for field in GIVEN_SCHEMA:
        sql = constants.get(field.name, f"`{field.name}`") or "NULL"
        parts.append(f"CAST({sql} AS {SPARK_TYPES[field.name]}) AS `{field.name}`")
    return f"struct({', '.join(parts)}) AS row"


def entry_struct() -> str:
    """`row_struct` of a cache entry beside `now`, the id and the reads of its key's current entry."""
    return row_struct(
        cached="true",
        current="entry_id <=> now.entry_id",
        last_reads="IF(entry_id = now.entry_id, now.reads, NULL)",
        origin=None,
        until=None,
        reads=None,
        failure=None,
    )


def bare_struct(builder: str) -> str:
    """`row_struct` of a key alone; `builder` says what it stands for."""
    nothing = {field.name: None for field in GIVEN_SCHEMA if field.name not in ("key", "cached")}
    return row_struct(**{**nothing, "builder": literal(builder), "origin": "'hit'"})


def literal(text: str) -> str:
    """Text as SQL, whatever quotes it has."""
    return "unhex('" + text.encode().hex() + "')"


def text_reads(frame: DataFrame, *, empty: str | None) -> DataFrame:
    """The column `reads` as JSON text, as the driver writes it; `empty` where there are none."""
    kinds = {field.name: field.dataType.simpleString() for field in frame.schema} | {"reads": "string"}
    ddl = ", ".join(f"`{name}` {kind}" for name, kind in kinds.items())
    return frame.mapInArrow(ReadsTask(empty), ddl)


def short_hash(image: Column) -> Column:
    """The first 16 bytes of sha256 as hex: what `fingerprint` makes of the same text."""
    from pyspark.sql import functions as F

    return F.substring(F.sha2(image, 256), 1, 32)


def bucket_hashes(members: DataFrame, columns: Sequence[str]) -> list[list[tuple[str, str]]]:
    """For each column of hashes beside `key` the (bucket, digest) pairs of `fingerprint.group_hash`, in one job."""
    from pyspark.sql import functions as F

    def digest(column: str) -> Column:
        pairs = F.collect_list(F.concat("key", F.lit("="), column))
        return short_hash(F.concat_ws(",", F.sort_array(pairs))).alias(column)

    bucket = F.substring(F.sha2("key", 256), 1, 2).alias("bucket")
    rows = members.groupBy(bucket).agg(*map(digest, columns)).collect()
    return [[(row["bucket"], row[column]) for row in rows] for column in columns]


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
        found = re.findall(r"^featurekit_spark\.errors\.(\w+): (.*)", str(error), re.MULTILINE)
        if not found:
            raise
        name, message = found[-1]  # the outermost: others are what it was raised from
        raise getattr(errors, name)(message.strip()) from error
