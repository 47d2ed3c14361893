"""Stages of the table mode that this process carries out, because workers make no paid calls (`llm.executor`).

Keys come here batch by batch with what they are given, and their rows go back to Spark; the whole is never here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from featurekit_spark.engines.table_sql import ROW_DDL
from featurekit_spark.engines.table_store import TableStore
from featurekit_spark.engines.tasks import ColumnTask, PackTask, StageWork, opened
from featurekit_spark.results import ROW_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["batches_of", "rows_made_here"]


def rows_made_here(frame: DataFrame, work: StageWork, store: TableStore, label: str) -> DataFrame:
    """What `ColumnTask` makes of a frame of keys, made in this process and written down batch by batch."""
    packed = store.save(frame.mapInArrow(PackTask(work.batch_rows), "chunk binary"), f"{label} keys")
    chunks = (opened(bytes(row["chunk"])) for row in packed.toLocalIterator())
    task = ColumnTask(work)
    made = (
        pa.Table.from_batches(rows, ROW_SCHEMA)
        for batch in batches_of(chunks, work.batch_rows)
        if (rows := list(task(batch.to_batches())))
    )
    return store.write(_until_failed(made), ROW_DDL, label)


def batches_of(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of `tables` in their order, as tables of `rows` each, the last of fewer: calls in flight are as many as
    their batch allows, however small the partitions are."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= rows:
            whole = pa.concat_tables(waiting)
            full = len(whole) - len(whole) % rows
            yield from (whole.slice(start, rows).combine_chunks() for start in range(0, full, rows))
            waiting = [whole.slice(full)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


def _until_failed(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables up to the first that tells of an error of the run, which no further call would survive."""
    for table in tables:
        yield table
        if "" in table["builder"].unique().to_pylist():
            return
