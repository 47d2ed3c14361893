"""What the table mode keeps: its own tables between stages, and the cache's as Spark sees them.

Owns how a frame is staged, which entries and traces count, and what a stage's rows add to the cache. Knows builders
by name and binding only, no plan.
"""

from __future__ import annotations

import re
import shutil
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from featurekit_spark.builder import Bound
from featurekit_spark.cache.base import ENTRY_SCHEMA, TRACE_SCHEMA
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import HASHED_KEY_SQL
from featurekit_spark.engines.table_sql import FRESH, ddl_of, entry_struct, text_reads
from featurekit_spark.engines.tasks import raised
from featurekit_spark.job import Job
from featurekit_spark.locks import local_path, table_lock
from featurekit_spark.results import BUILT, FAILED, FAILURES, Counts

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

__all__ = ["TableStore"]

_SCHEMAS = {"entries": ENTRY_SCHEMA, "traces": TRACE_SCHEMA}


class TableStore:
    """Staged frames of one run, and the entries and traces of a DeltaCache as DataFrames."""

    def __init__(self, spark: SparkSession, cache: DeltaCache, job: Job) -> None:
        self.spark, self.cache, self.job = spark, cache, job
        self.staging = f"{cache.path}/staging/{re.sub(r'[^A-Za-z0-9_-]', '_', job.run_id)}"
        self._number = 0
        self.close()  # what a killed run of this id left behind
        # Frames are read for as long as the session can read them, whatever became of the run that made them.
        weakref.finalize(spark, _remove, self.staging)

    def save(self, frame: DataFrame, label: str) -> DataFrame:
        """Write a frame once and read it back: the one action on it."""
        path = self._place(label)
        frame.write.parquet(path)
        return self.spark.read.schema(frame.schema).parquet(path)

    def write(self, tables: Iterable[pa.Table], ddl: str, label: str) -> DataFrame:
        """Write tables as they come, and read them as one frame."""
        path = self._place(label)
        self.spark.createDataFrame([], ddl).write.parquet(path)
        for table in tables:
            self.spark.createDataFrame(table, ddl).write.mode("append").parquet(path)
        return self.spark.read.schema(ddl).parquet(path)

    def _place(self, label: str) -> str:
        self._number += 1
        return f"{self.staging}/{self._number:03d}-{re.sub(r'[^A-Za-z0-9]+', '-', label)}"

    def close(self) -> None:
        """Remove what was saved."""
        _remove(self.staging)

    def entries(self, builder: str) -> DataFrame:
        """All ok entries of a builder; an entry_id may be there more than once."""
        from pyspark.sql import functions as F

        return self._table("entries").where((F.col("builder") == builder) & (F.col("status") == "ok"))

    def by_id(self, builder: str) -> DataFrame:
        """(entry_id, value, ts) of a builder, the newest where an id is there more than once."""
        from pyspark.sql import functions as F

        newest = F.max_by(F.struct("value", "ts"), "recorded").alias("entry")
        return self.entries(builder).groupBy("entry_id").agg(newest).select("entry_id", "entry.*")

    def candidates(self, bound: Bound, keys: DataFrame) -> DataFrame:
        """(key, row): every entry that `keys` may find, as structs of GIVEN_SCHEMA."""
        from pyspark.sql import functions as F

        keys = keys.select("key")
        ours = (F.col("builder") == bound.name) & (F.col("config_hash") == bound.config_hash)
        entries = self._of(self._table("entries").where(ours & (F.col("status") == "ok")), bound.name, keys)
        pointing = ours & (F.col("kind") != "group") & (F.col("status") == "ok")
        pointers = self._of(self._table("traces").where(pointing), bound.name, keys)
        none = F.lit(None).cast("string").alias("reads")
        marks = entries.select("key", "entry_id", none, "recorded", F.lit(0).alias("rank")).union(
            pointers.select("key", "entry_id", "reads", "recorded", F.lit(1).alias("rank"))
        )
        now = F.max_by(F.struct("entry_id", "reads"), F.struct("recorded", "rank")).alias("now")
        newest = F.max_by(F.struct(*entries.columns), "recorded").alias("entry")
        found = entries.groupBy("entry_id").agg(newest).select("entry.*")
        return found.join(marks.groupBy("key").agg(now), "key").select("key", F.expr(entry_struct()))

    def _of(self, rows: DataFrame, builder: str, keys: DataFrame) -> DataFrame:
        """The rows of these keys, also of those that are stored as hashes."""
        from pyspark.sql import functions as F

        if builder not in self.cache.hashed_builders():
            return rows.join(keys, "key", "left_semi")
        stored = keys.distinct().select(
            "key", F.explode(F.array("key", F.expr(HASHED_KEY_SQL))).alias("stored")
        )
        return rows.withColumnRenamed("key", "stored").join(stored, "stored").select(*rows.columns)

    def traces(self, target: str, group: str) -> DataFrame:
        """The newest target row per key: (key, row), `row` the columns of TRACE_SCHEMA."""
        from pyspark.sql import functions as F

        rows = self._table("traces").where((F.col("builder") == target) & (F.col("kind") == "target"))
        rows = rows.where(F.col("group") == group)
        return rows.groupBy("key").agg(F.max_by(F.struct(*rows.columns), "recorded").alias("row"))

    def proofs(self, target: str, group: str) -> DataFrame:
        """Of `traces` those that are ok, name an entry that is there (or none), and are not superseded: no other entry
        became current after them."""
        from pyspark.sql import functions as F

        place = ["key", "config_hash"]
        entries = self.entries(target).select(*place, "entry_id", "recorded", F.lit(0).alias("rank"))
        pointers = self._table("traces").where((F.col("builder") == target) & (F.col("kind") == "pointer"))
        pointers = pointers.where("status = 'ok'").select(*place, "entry_id", "recorded", F.lit(1))
        known = (
            entries.union(pointers)
            .groupBy(*place)
            .agg(
                F.collect_set(F.when(F.col("rank") == 0, F.col("entry_id"))).alias("there"),
                F.max_by(F.struct("entry_id", "recorded"), F.struct("recorded", "rank")).alias("now"),
            )
        )
        rows = self.traces(target, group).where("row.status = 'ok'")
        rows = rows.withColumn("config_hash", F.col("row.config_hash")).join(known, place, "left")
        kept = "row.entry_id IS NULL OR coalesce(array_contains(there, row.entry_id), false)"
        newest = "now IS NULL OR now.recorded <= row.recorded OR now.entry_id <=> row.entry_id"
        return rows.where(f"({kept}) AND ({newest})").select("key", "row")

    def append(self, name: str, frame: DataFrame) -> None:
        """Add rows; columns that the frame lacks are stamped or null."""
        from pyspark.sql import functions as F

        stamps: dict[str, Column] = {
            "recorded": F.lit(time.time_ns()),
            "run_id": F.lit(self.job.run_id),
            "ts": F.lit(self.job.now),
            "epoch": F.lit(0),
        }
        columns = [
            (F.col(field.name) if field.name in frame.columns else stamps.get(field.name, F.lit(None)))
            .cast(ddl_of(field.type))
            .alias(field.name)
            for field in _SCHEMAS[name]
        ]
        self.cache.ensure(name)
        path = self.cache.table_path(name)
        with table_lock(path):
            frame.select(*columns).write.format("delta").mode("append").save(path)

    def commit(self, rows: DataFrame) -> Mapping[str, Counts]:
        """Append a stage's new entries in one commit, then its pointers. Counts per builder.

        A failure that a task told of is raised, after what the others made is kept.
        """
        from pyspark.sql import functions as F

        known = dict(self.job.bindings.items())
        inline = [builder.name for builder in known if builder.inline]
        by_hand = [builder.name for builder in known if builder.is_dynamic()]
        fresh = F.col("origin").isin(*FRESH) & ~F.col("builder").isin(*inline)
        hand = F.col("builder").isin(*by_hand) & (F.col("origin") == "computed")
        again = F.col("origin").isin("hit", "empty") & ~F.col("current") | hand
        attempts = F.coalesce("attempts", F.lit(1))
        stats = rows.groupBy("builder", "origin", "failure").agg(
            F.count("*").alias("number"),
            *(F.sum(name).alias(name) for name in ("seconds", "tokens", "usd", "estimated_tokens")),
            F.sum(attempts).alias("attempts"),
            F.sum(F.greatest(attempts - 1, F.lit(0))).alias("repeats"),
            F.count("usd").alias("priced"),
            F.count_if(fresh).alias("fresh"),
            F.count_if(again).alias("again"),
            F.max("error").alias("error"),
        )
        found = stats.collect()
        if any(row["fresh"] for row in found):
            self.append("entries", rows.where(fresh).drop("run_id"))
        if any(row["again"] for row in found):
            marked = rows.where(again).select(
                *("builder", "key", "config_hash", "entry_id", "value_hash"),
                F.when(hand, F.col("reads")).alias("reads"),
            )
            marked = text_reads(marked, empty="[]") if by_hand else marked.drop("reads")
            constants = {"kind": "pointer", "group": "", "status": "ok"}
            self.append("traces", marked.withColumns({name: F.lit(text) for name, text in constants.items()}))
        failure = next((row["error"] for row in found if row["origin"] is None), None)
        if failure is not None:
            raise raised(failure)
        paid = {builder.name for builder in known if builder.paid}
        counts: dict[str, Counts] = {}
        for row in found:
            counts.setdefault(row["builder"], Counts()).add(_counted(row, row["builder"] in paid))
        return counts

    def _table(self, name: str) -> DataFrame:
        self.cache.ensure(name)
        return self.spark.read.format("delta").load(self.cache.table_path(name))


def _counted(row: Any, paid: bool) -> Counts:
    origin, number = row["origin"], row["number"]
    built = origin in BUILT
    calls = number if built and paid else 0
    priced = origin == "error" or row["priced"] == number  # of failed calls what is known
    return Counts(
        hit=number if origin == "hit" else 0,
        computed=number if origin == "computed" else 0,
        updated=number if origin == "updated" else 0,
        empty=number if origin == "empty" else 0,
        error=number if origin in FAILED else 0,
        remembered=number if origin == "remembered" else 0,
        **{kind: number if row["failure"] == kind else 0 for kind in FAILURES},
        calls=calls,
        tokens=int(row["tokens"] or 0) if built else 0,
        estimated_tokens=int(row["estimated_tokens"] or 0) if built else 0,
        usd=0.0 if not calls else float(row["usd"] or 0.0) if priced else None,
        seconds=float(row["seconds"] or 0.0) if built else 0.0,
        attempts=int(row["attempts"]) if calls else 0,
        failed_attempts=int(row["attempts" if origin == "error" else "repeats"]) if calls else 0,
    )


def _remove(folder: str) -> None:
    path = local_path(folder)
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
        return
    from pyarrow import fs

    with suppress(OSError):  # left behind, it is in nobody's way
        filesystem, inside = fs.FileSystem.from_uri(folder)
        filesystem.delete_dir(inside)
