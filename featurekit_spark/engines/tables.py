"""A run whose keys and results stay in Spark and Delta: for catalogs too large to pass through the driver.

The same plan, the same evaluator inside the same UDFs; between stages everything is a table. A stage's rows are
written once (one action, so nothing with a price is evaluated twice), its entries appended from there, and the next
stage reads them. Only counts, group-level results and the digests of a group's buckets reach the driver.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import Dep, Each, FeatureBuilder, KeySet, as_dep, keys_of
from featurekit_spark.cache.base import TraceRow
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.engines.lookup import as_table, local_builders
from featurekit_spark.engines.spark import SparkEngine, counted, travelling
from featurekit_spark.engines.table_sql import (
    GIVEN_DDL,
    ROW_DDL,
    as_rows,
    column_or,
    ddl_of,
    read_as_array,
    row_struct,
    translated,
    union_all,
)
from featurekit_spark.engines.tasks import (
    ColumnTask,
    DecodeTask,
    GatherTask,
    LinkTask,
    SourceTask,
    StageWork,
    made_rows,
)
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.execute import Job, group_trace, plan_hash, scan_of
from featurekit_spark.fingerprint import GROUP_BUCKETS, bucket_digests, digest, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.locks import table_lock
from featurekit_spark.plan import (
    CheckTraces,
    GatherStage,
    KeyedStage,
    Plan,
    ReadKeys,
    ReadSource,
    Space,
    TargetTrace,
)
from featurekit_spark.results import ROW_SCHEMA, Counts, from_entry, new_entries, results_by_key, to_given
from featurekit_spark.values import NULL_HASH

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["TableExecution"]

Key = tuple[Any, ...]
Builder = type[FeatureBuilder[Any]]
_FRESH = ("computed", "error", "upstream")


class TableExecution:
    """One run of one group, table by table; the same face as `execute.Execution`."""

    def __init__(self, plan: Plan, graph: Graph, job: Job, engine: SparkEngine, *, group: Key) -> None:
        if not isinstance(job.cache, DeltaCache):
            raise UsageError(
                "this catalog is too large to pass through the driver (engine.collect_mb), and only a DeltaCache can "
                f"keep its results; found a {type(job.cache).__name__}"
            )
        self.plan, self.graph, self.job, self.engine, self.group = plan, graph, job, engine, group
        self.cache: DeltaCache = job.cache
        self.spark = engine.session
        self.staging = f"{self.cache.path}/staging/{job.run_id}"
        self.seconds: dict[str, float] = {}
        self.done: dict[str, Counts] = {}
        self.unchanged = False
        self.keys = 0
        self.regather = True
        self._members: dict[str, DataFrame] = {}
        self._todo: dict[str, DataFrame] = {}
        self._rows: dict[tuple[str, Space], DataFrame] = {}
        self._links: dict[Space, DataFrame] = {}
        self._shared: dict[str, pa.Table] = {}
        self._proven: dict[str, DataFrame] = {}
        self._checks: dict[str, tuple[TargetTrace, str, DataFrame, str, bool]] = {}
        self._proven_count: dict[str, int] = {}
        self._incomplete: set[str] = set()
        self._number = 0
        self.evaluator = Evaluator(
            job.bindings, job.context, job.cache, now=job.now, batch_rows=job.batch_rows
        )

    def run(self) -> None:
        """Carry out every stage, then write the traces."""
        with translated():
            for stage in self.plan.stages:
                start = time.perf_counter()
                self._run(stage)
                self.seconds[stage.label] = self.seconds.get(stage.label, 0.0) + time.perf_counter() - start
            self._write_traces()

    def close(self) -> None:
        """Remove what the run kept between its stages. Answers can be read until then."""
        if "://" not in self.staging:
            shutil.rmtree(self.staging, ignore_errors=True)
        else:
            from pyarrow import fs

            filesystem, path = fs.FileSystem.from_uri(self.staging)
            filesystem.delete_dir(path)

    def counts(self) -> dict[str, Counts]:
        """Per builder, in build order; a target's proven keys are its hits."""
        counts = {
            builder.name: Counts(**vars(self.done.get(builder.name, Counts()))) for builder in self.graph
        }
        for name, proven in self._proven_count.items():
            counts[name].hit += proven
        return counts

    def errors(self, targets: Sequence[str]) -> dict[str, str]:
        """The first failures of the targets' keys, by key as JSON."""
        found: dict[str, str] = {}
        for name in targets:
            rows = self._target_rows(name)
            if rows is not None:
                failed = rows.where("error IS NOT NULL").select("key", "error").limit(100).collect()
                found |= {row["key"]: row["error"] for row in failed}
        return found

    def fingerprint(self, targets: Sequence[str]) -> str:
        """Hash over every key's answer, as `Execution.fingerprint` computes it."""
        parts = []
        for name in targets:
            answers = self._answers(name).selectExpr("key", "coalesce(value_hash, '') AS hash")
            parts += [name, self._tree(answers)]
        return digest("published", *parts)

    def kept(self, targets: Sequence[str]) -> int:
        """How many failed keys keep the answer that they had before."""
        return sum(self._kept(name).count() for name in targets)

    def table(self, target: str) -> DataFrame:
        """`answers`, with the earlier answer of a failed key."""
        return self.answers(target)

    def answers(self, target: str) -> DataFrame:
        """A target's answers, typed: its key fields, value, ts, value_hash. A failed key has its earlier answer."""
        bound = self.job.bindings[self.graph[target]]
        ddl = ", ".join(f"`{name}` string" for name in bound.key)
        ddl += f", value {ddl_of(bound.type.arrow)}, ts timestamp, value_hash string"
        return self._answers(target).mapInArrow(DecodeTask(bound.key, bound.type), ddl)

    def stored(self, frame: DataFrame, label: str) -> DataFrame:
        """A frame written down and read back, so that it is computed once however often it is looked at."""
        return self._save(frame, label)

    def _run(self, stage: Any) -> None:
        match stage:
            case ReadKeys(keyset):
                self._read_keys(keyset)
            case ReadSource(source, space):
                self._read_source(source, space)
            case CheckTraces(traces):
                self._check(traces)
            case KeyedStage(feeds=feeds) if feeds == {"gather"} and not self.regather:
                pass
            case KeyedStage() if not self.unchanged:
                self._run_keyed(stage)
            case GatherStage() if not self.unchanged:
                self._run_gather(stage)

    def _read_keys(self, keyset: type[KeySet]) -> None:
        frame = self._scan(keyset)
        if frame is None:
            raise UsageError(f"{keyset.name} offers no scan, so its members cannot be read by Spark")
        members = self._save(self._key_frame(frame), "members")
        count, distinct = members.count(), members.distinct().count()
        if count != distinct:
            raise DataError(
                f"{keyset.name} lists {count - distinct} members twice; a key set yields each key once"
            )
        self._members[keyset.name] = members
        self.keys = max(self.keys, count)

    def _read_source(self, source: Builder, space: Space) -> None:
        from pyspark.sql import functions as F

        members = self._members[space.label.removeprefix("of ")]
        frame = self._scan(source)
        if frame is None:
            self._todo.setdefault(space.label.removeprefix("of "), members)
            self._run_keyed(KeyedStage(space, (source,), (), False, frozenset({"gather"})))
            return
        work = self._work((source,), source.key)
        read = frame.mapInArrow(SourceTask(work, self.group), ROW_DDL)
        missing = {
            "builder": source.name,
            "config_hash": self.job.bindings[source].config_hash,
            "value_hash": NULL_HASH,
            "status": "ok",
            "origin": "empty",
            "current": True,
        }
        rows = members.join(read, "key", "left")
        if self.cache.has(source.name):  # what was read before and is read again is a hit
            have = self._entries(source).where("status = 'ok'").select("entry_id", F.lit(True).alias("there"))
            rows = rows.join(have.dropDuplicates(["entry_id"]), "entry_id", "left")
            rows = rows.withColumn("origin", F.when(F.col("there"), "hit").otherwise(F.col("origin")))
        rows = rows.select(*(column_or(name, missing) for name in ROW_SCHEMA.names))
        self._keep(source, space, self._commit(self._save(rows, source.name)))

    def _scan(self, source: Builder) -> DataFrame | None:
        scan = scan_of(source, self.job, self.plan.group_fields, self.group)
        return None if scan is None else scan.to_spark(self.spark)

    def _key_frame(self, members: DataFrame) -> DataFrame:
        group = self.group

        def keys(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                texts = [key_json((*group, member)) for member in batch.column(0).to_pylist()]
                yield pa.record_batch({"key": pa.array(texts, pa.string())})

        return members.mapInArrow(keys, "key string")

    def _check(self, traces: Sequence[TargetTrace]) -> None:
        from pyspark.sql import functions as F

        todo: dict[str, DataFrame] = {}
        for trace in traces:
            members, name = self._members[trace.keyset.name], trace.target.name
            hashed = self._with_hashes(trace.keyset, trace.keyed, "keyed")
            joined = F.concat_ws(",", *(F.col(f"keyed{i}") for i in range(len(trace.keyed))))
            image = F.concat(F.lit("inputs\n"), joined, F.lit("\n"))
            keyed = self._save(
                hashed.select("key", F.substring(F.sha2(image, 256), 1, 32).alias("keyed_trace")), name
            )
            found = group_trace(trace, self._tree_of, self._group_source)
            plan = plan_hash(trace, self.graph, self.job.bindings)
            same = self._same_group(trace, plan, found)
            self._checks[name] = (trace, plan, keyed, found, same)
            # A key set's long list of members is no entry here; the group's trace tells whether it was read before.
            self.done[trace.keyset.name] = Counts(hit=1) if same else Counts(computed=1)
            proven = self._prove(trace, plan, keyed) if trace.provable and same else keyed.limit(0)
            self._proven[name] = self._save(proven.select("key"), f"{name}-proven")
            self._proven_count[name] = self._proven[name].count()
            left = members.join(self._proven[name], "key", "left_anti")
            before = todo.get(trace.keyset.name)
            todo[trace.keyset.name] = left if before is None else before.union(left).distinct()
        self._todo = {name: self._save(frame, "todo") for name, frame in todo.items()}
        self.regather = any(not same for *_, same in self._checks.values())
        self.unchanged = not self.regather and not any(frame.count() for frame in self._todo.values())

    def _prove(self, trace: TargetTrace, plan: str, keyed: DataFrame) -> DataFrame:
        from pyspark.sql import functions as F

        now = F.lit(self.job.now)
        alive = self._entries(trace.target).where("status = 'ok'").select("entry_id").distinct()
        rows = (
            self._stored(trace.target.name)
            .where(F.col("plan_hash") == plan)
            .where("status = 'ok' AND reads IS NULL")
        )
        rows = rows.where(F.col("valid_until").isNull() | (F.col("valid_until") > now))
        matching = keyed.join(rows, ["key", "keyed_trace"], "inner")
        null_value = matching.where("entry_id IS NULL").select("key")
        return null_value.union(matching.join(alive, "entry_id", "left_semi").select("key"))

    def _stored(self, target: str) -> DataFrame:
        """The newest target row per key."""
        from pyspark.sql import functions as F

        columns = ["plan_hash", "keyed_trace", "reads", "valid_until", "status", "entry_id", "value_hash"]
        rows = self._table("traces").where((F.col("builder") == target) & (F.col("kind") == "target"))
        rows = rows.where(F.col("group") == key_json(self.group))
        newest = rows.groupBy("key").agg(F.max_by(F.struct(*columns), "recorded").alias("row"))
        return newest.select("key", "row.*")

    def _tree_of(self, keyset: type[KeySet], source: Builder | None) -> str:
        members = self._members[keyset.name]
        if source is None:
            return self._tree(members.selectExpr("key", "'' AS hash"))
        return self._tree(self._with_hashes(keyset, (source,), "h").selectExpr("key", "h0 AS hash"))

    def _group_source(self, source: Builder) -> str:
        return self.evaluator.resolve(source, [self._group_key(source)])[0].value_hash or "error"

    def _group_key(self, builder: Builder) -> Key:
        return keys_of(self.plan.group_fields, self.group, builder.key)

    def _same_group(self, trace: TargetTrace, plan: str, found: str) -> bool:
        """Whether what was gathered last time still stands; if so, its results are shared with the stages."""
        row = self.cache.group_row(trace.target.name, key_json(self.group))
        if row is None or row.status != "ok" or (row.group_trace, row.plan_hash) != (found, plan):
            return False
        if row.valid_until is not None and self.job.now >= row.valid_until:
            return False
        for name, text, identity in json.loads(row.reads or "[]"):
            entry = self.cache.by_id(name, [identity]).get(identity)
            if entry is None:
                return False
            kind = self.job.bindings[self.graph[name]].type
            self._shared[name] = to_given(name, [(text, from_entry(entry, kind, until=row.valid_until))])
        return True

    def _with_hashes(self, keyset: type[KeySet], sources: Sequence[Builder], prefix: str) -> DataFrame:
        from pyspark.sql import functions as F

        frame = self._members[keyset.name]
        for i, source in enumerate(sources):
            if source.key == keyset.member_key():
                space = Space("members", keyset.member_key(), f"of {keyset.name}")
                rows = self._rows[source.name, space]
                column = rows.selectExpr("key", f"coalesce(value_hash, 'error') AS {prefix}{i}")
                frame = frame.join(column, "key", "left")
            elif set(source.key) <= set(keyset.key):
                frame = frame.withColumn(f"{prefix}{i}", F.lit(self._group_source(source)))
            else:
                raise UsageError(
                    f"{source.name} has the key {source.key!r}, a part of {keyset.member_key()!r}; for a catalog of "
                    "this size give it the whole key, or the group's"
                )
        return frame

    def _tree(self, pairs: DataFrame) -> str:
        """`fingerprint.group_hash` over (key, hash), its buckets computed by Spark."""
        from pyspark.sql import functions as F

        bucket = F.substring(F.sha2("key", 256), 1, 2).alias("bucket")
        members = pairs.select(bucket, F.concat("key", F.lit("="), "hash").alias("member"))
        image = F.concat_ws(",", F.sort_array(F.collect_list("member")))
        digests = members.groupBy("bucket").agg(F.substring(F.sha2(image, 256), 1, 32).alias("digest"))
        return bucket_digests(
            (row["bucket"], row["digest"]) for row in digests.limit(GROUP_BUCKETS).collect()
        )

    def _run_keyed(self, stage: KeyedStage) -> None:
        everyone = self.regather and "gather" in stage.feeds
        keys = self._keys(stage.space, everyone=everyone)
        work = self._work(stage.builders, stage.space.key, stage)
        parts = [self._given(builder, stage) for builder in stage.builders]
        given = [frame for found in parts for frame in found] + self._cached(stage)
        rows = self._with_given(keys, given).mapInArrow(ColumnTask(work), ROW_DDL)
        saved = self._commit(self._save(rows, stage.label))
        for builder in stage.builders:
            self._keep(builder, stage.space, saved)
        self.job.progress(stage.label, 1, 1)

    def _run_gather(self, stage: GatherStage) -> None:
        builder, bound = stage.builder, self.job.bindings[stage.builder]
        gathers = [dep for dep in bound.deps if dep.keyset is not None]
        if gathers and not self.regather:
            return  # shared by the check
        if gathers:
            rows = self._gathered(builder, gathers)
        else:
            for name, known in self._shared.items():
                self.evaluator.give(
                    self.graph[name], results_by_key(known, self.job.bindings[self.graph[name]].type)
                )
            self.evaluator.resolve(builder, [self._group_key(builder)])
            rows = made_rows(self.evaluator, self.job.bindings)
        entries = new_entries(rows, self.job.run_id)
        if len(entries):
            self.cache.append(entries)
        for name in rows["builder"].unique().to_pylist():
            own = rows.filter(pc.equal(rows["builder"], name))
            self.done.setdefault(name, Counts()).add(counted(own, paid=self.graph[name].paid))
        self._share(builder, rows)

    def _gathered(self, builder: Builder, gathers: Sequence[Dep]) -> pa.Table:
        """The group-level builder's row, made by one task that sees all members."""
        # Two gathers may read the same rows, and do over one key set: each once.
        read_at: dict[tuple[str, Space], DataFrame] = {}
        members: dict[str, DataFrame] = {}
        for dep in gathers:
            keyset = dep.keyset
            assert keyset is not None  # chosen by the caller
            space = Space("members", keyset.member_key(), f"of {keyset.name}")
            for read, at in self._read_by(replace(dep, keyset=None), space):
                read_at[read.name, at] = self._rows[read.name, at]
            constant = {"builder": keyset.name, "origin": "hit"}
            columns = [column_or(name, constant, absent=name != "key") for name in ROW_SCHEMA.names]
            members[keyset.name] = self._members[keyset.name].select(*columns)
        given = union_all([*read_at.values(), *members.values()])
        if not given.where("error IS NOT NULL").isEmpty():
            self._incomplete.add(
                builder.name
            )  # built without the members that failed; the next run gathers again
        text = key_json(self._group_key(builder))
        task = GatherTask(
            self._work((builder,), self.plan.group_fields),
            tuple({dep.keyset: None for dep in gathers if dep.keyset is not None}),
            self.group,
            as_table(self.cache.candidates(builder.name, self.job.bindings[builder].config_hash, [text])),
        )
        return as_rows(given.repartition(1).mapInArrow(task, ROW_DDL).toArrow())

    def _share(self, builder: Builder, rows: pa.Table) -> None:
        self._shared[builder.name] = rows.filter(pc.equal(rows["builder"], builder.name))

    def _work(
        self, builders: Sequence[Builder], fields: tuple[str, ...], stage: KeyedStage | None = None
    ) -> StageWork:
        stage = stage or KeyedStage(Space("group", fields, ""), tuple(builders), (), False, frozenset())
        shared = tuple(
            (builder, self._shared[builder.name]) for builder in stage.given if builder.name in self._shared
        )
        dynamic = any(builder.is_dynamic() for builder in builders)
        return StageWork(
            fields,
            tuple(builders),
            self.job.bindings,
            travelling(stage, self.job),
            shared,
            self.job.now,
            self.job.batch_rows,
            self.cache if dynamic else None,
        )

    def _keys(self, space: Space, *, everyone: bool) -> DataFrame:
        if space.kind == "members":
            name = space.label.removeprefix("of ")
            return self._members[name] if everyone else self._todo[name]
        return self._link_frame(space, everyone=everyone).select("key").distinct()

    def _link_frame(self, space: Space, *, everyone: bool) -> DataFrame:
        """(reader, key): where the keys of a reached space come from."""
        if space not in self._links:
            origin, dep = space.origin, space.dep
            assert origin is not None  # the planner sets both on a reached space
            assert dep is not None
            keys = self._keys(origin, everyone=everyone)
            given = []
            for _, source in dep.on_fields:
                given += self._given_by(source.dep if isinstance(source, Each) else source, origin)
            work = self._work((), origin.key)
            frame = self._with_given(keys, given).mapInArrow(LinkTask(work, dep), "reader string, key string")
            self._links[space] = self._save(frame, "links")
        return self._links[space]

    def _given(self, builder: Builder, stage: KeyedStage) -> list[DataFrame]:
        frames = []
        for dep in self.job.bindings[builder].deps:
            if dep.keyset is None:
                frames += self._given_by(dep, stage.space)
        return frames

    def _given_by(self, dep: Dep, space: Space) -> list[DataFrame]:
        """(reader, row) for everything that keys of `space` read through `dep` and that an earlier stage made."""
        frames = []
        for builder, where in self._read_by(dep, space):
            rows = self._rows[builder.name, where].selectExpr("key", f"{row_struct()} AS row")
            if where == space:
                frames.append(rows.withColumnRenamed("key", "reader"))
            else:
                frames.append(self._links[where].join(rows, "key").select("reader", "row"))
        return frames

    def _read_by(self, dep: Dep, space: Space) -> Iterator[tuple[Builder, Space]]:
        dep = replace(dep, label=None)
        for _, source in dep.on_fields:
            yield from self._read_by(source.dep if isinstance(source, Each) else source, space)
        reached = next((s for s in self._links if s.origin == space and s.dep == dep), None)
        where = space if (dep.builder.name, space) in self._rows and not dep.on_fields else reached
        if where is not None and (dep.builder.name, where) in self._rows:
            yield dep.builder, where

    def _cached(self, stage: KeyedStage) -> list[DataFrame]:
        """(reader, row) of entries that the stage may find."""
        frames = []
        for builder in local_builders(stage, self.job):
            bound = self.job.bindings[builder]
            if builder.inline or builder.is_dynamic() or not self.cache.has(builder.name):
                continue
            entries = self._entries(builder).where(f"config_hash = '{bound.config_hash}' AND status = 'ok'")
            entries = entries.dropDuplicates(["entry_id"])
            rows = entries.selectExpr("key", f"{row_struct(cached=True)} AS row")
            if builder.key == stage.space.key:
                frames.append(rows.withColumnRenamed("key", "reader"))
            else:
                space = Space("reached", builder.key, "for look-up", stage.space, Dep(builder))
                frames.append(
                    self._link_frame(space, everyone=True).join(rows, "key").select("reader", "row")
                )
        return frames

    def _with_given(self, keys: DataFrame, given: Sequence[DataFrame]) -> DataFrame:
        from pyspark.sql import functions as F

        if not given:
            return keys.select("key", F.expr(f"CAST(array() AS array<struct<{GIVEN_DDL}>>) AS given"))
        rows = (
            union_all(given).groupBy(F.col("reader").alias("key")).agg(F.collect_list("row").alias("given"))
        )
        return keys.join(rows, "key", "left")

    def _save(self, frame: DataFrame, label: str) -> DataFrame:
        """Write a table once and read it back: the one action on it."""
        self._number += 1
        name = re.sub(r"[^A-Za-z0-9]+", "-", label)
        path = f"{self.staging}/{self._number:03d}-{name}"
        schema = frame.schema
        frame.write.parquet(path)
        return self.spark.read.schema(schema).parquet(path)

    def _commit(self, rows: DataFrame) -> DataFrame:
        """Append a stage's new entries in one commit, and count what it did."""
        from pyspark.sql import functions as F

        inline = [b.name for b, _ in self.job.bindings.items() if b.inline]
        fresh = rows.where(
            F.col("origin").isin(*_FRESH) & ~F.col("builder").isin(*inline) & F.col("entry_id").isNotNull()
        )
        names = [name for name in self.cache.entry_columns() if name not in ("run_id", "recorded")]
        fresh = fresh.select(*names, F.lit(self.job.run_id).alias("run_id"))
        self._append("entries", fresh)
        again = rows.where("origin = 'hit' AND NOT current AND entry_id IS NOT NULL")
        self._append(
            "traces",
            again.selectExpr(
                "builder",
                "'pointer' AS kind",
                "'' AS `group`",
                "key",
                "config_hash",
                "'ok' AS status",
                "entry_id",
            ),
            optional=True,
        )
        stats = rows.groupBy("builder", "origin").agg(
            F.count("*"), F.sum("seconds"), F.sum("tokens"), F.sum("usd"), F.count("usd")
        )
        paid = {b.name: b.paid for b, _ in self.job.bindings.items()}
        for name, origin, number, seconds, tokens, usd, priced in stats.collect():
            built = origin in ("computed", "error")
            calls = number if built and paid.get(name) else 0  # a hand-written get reads what the graph lacks
            self.done.setdefault(name, Counts()).add(
                Counts(
                    hit=number if origin == "hit" else 0,
                    computed=number if origin == "computed" else 0,
                    empty=number if origin == "empty" else 0,
                    error=number if origin in ("error", "upstream") else 0,
                    calls=calls,
                    tokens=int(tokens or 0) if built else 0,
                    usd=0.0 if not calls else float(usd or 0.0) if priced == number else None,
                    seconds=float(seconds or 0.0) if built else 0.0,
                )
            )
        return rows

    def _append(self, name: str, frame: DataFrame, *, optional: bool = False) -> None:
        from pyspark.sql import functions as F

        if optional and frame.isEmpty():
            return
        self.cache.ensure(name)
        target = self._table(name)
        have = set(frame.columns)
        stamps: dict[str, Column] = {
            "recorded": F.lit(time.time_ns()),
            "run_id": F.lit(self.job.run_id),
            "ts": F.lit(self.job.now),
            "epoch": F.lit(0).cast("bigint"),
        }
        columns = [
            frame[f"`{field.name}`"]
            if field.name in have
            else stamps.get(field.name, F.lit(None)).cast(field.dataType).alias(field.name)
            for field in target.schema
        ]
        with table_lock(self.cache.table_path(name)):
            frame.select(*columns).write.format("delta").mode("append").save(self.cache.table_path(name))

    def _keep(self, builder: Builder, space: Space, rows: DataFrame) -> None:
        self._rows[builder.name, space] = rows.where(f"builder = '{builder.name}'")

    def _target_rows(self, target: str) -> DataFrame | None:
        trace = self._checks[target][0]
        space = Space("members", trace.keyset.member_key(), f"of {trace.keyset.name}")
        return self._rows.get((target, space))

    def _kept(self, target: str) -> DataFrame:
        """The current entries of keys that failed in this run."""
        from pyspark.sql import functions as F

        rows = self._target_rows(target)
        entries = self._entries(self.graph[target]).where("status = 'ok'")
        config = self.job.bindings[self.graph[target]].config_hash
        entries = entries.where(F.col("config_hash") == config)
        newest = entries.groupBy("key").agg(
            F.max_by(F.struct("value", "ts", "value_hash"), "recorded").alias("row")
        )
        if rows is None:
            return newest.select("key", "row.*").limit(0)
        failed = rows.where("error IS NOT NULL").select("key")
        return failed.join(newest, "key").select("key", "row.*")

    def _answers(self, target: str) -> DataFrame:
        """(key, value, ts, value_hash) of every member."""
        trace, *_ = self._checks[target]
        rows, columns = self._target_rows(target), ["key", "value", "ts", "value_hash"]
        kept = self._kept(target)
        answers = kept.select(*columns)
        if rows is not None:
            answers = answers.union(rows.join(kept.select("key"), "key", "left_anti").select(*columns))
        stored = self._stored(target).join(self._proven[target], "key", "left_semi").select("key", "entry_id")
        entries = self._entries(trace.target).dropDuplicates(["entry_id"]).select("entry_id", *columns[1:])
        proven = stored.join(entries, "entry_id", "left").selectExpr(
            "key", "value", "ts", f"coalesce(value_hash, '{NULL_HASH}') AS value_hash"
        )
        walked = answers.join(self._proven[target], "key", "left_anti")
        return walked.union(proven)

    def _write_traces(self) -> None:
        from pyspark.sql import functions as F

        for name, (trace, plan, keyed, found, same) in self._checks.items():
            rows = self._target_rows(name)
            if not trace.provable:
                continue
            bound = self.job.bindings[trace.target]
            if rows is not None:
                walked = (
                    rows.join(self._proven[name], "key", "left_anti")
                    .join(keyed, "key")
                    .select(
                        "key",
                        "keyed_trace",
                        F.lit(plan).alias("plan_hash"),
                        F.col("until").alias("valid_until"),
                        F.when(F.col("error").isNull(), "ok").otherwise("error").alias("status"),
                        F.when(F.col("error").isNull(), F.col("entry_id")).alias("entry_id"),
                        "value_hash",
                        F.when(F.size("reads") > 0, F.to_json(F.transform("reads", read_as_array))).alias(
                            "reads"
                        ),
                    )
                )
                stored = self._stored(name).select("key", F.struct("*").alias("old"))
                same_names = [
                    "plan_hash",
                    "keyed_trace",
                    "reads",
                    "valid_until",
                    "status",
                    "entry_id",
                    "value_hash",
                ]
                agrees = F.lit(True)
                for column in same_names:
                    agrees = agrees & F.col(column).eqNullSafe(F.col(f"old.{column}"))
                changed = (
                    walked.join(stored, "key", "left").where(F.col("old").isNull() | ~agrees).drop("old")
                )
                self._append(
                    "traces",
                    changed.select(
                        "*",
                        F.lit(name).alias("builder"),
                        F.lit("target").alias("kind"),
                        F.lit(key_json(self.group)).alias("group"),
                        F.lit(bound.config_hash).alias("config_hash"),
                    ),
                )
            if not same:
                self.cache.append(None, [self._group_row(trace, plan, found)])

    def _group_row(self, trace: TargetTrace, plan: str, found: str) -> TraceRow:
        """What is gathered below a target; status error where a member or a gather failed."""
        entries, until, whole = [], [], True
        for builder in self.graph.needs_of(trace.target):
            whole = whole and builder.name not in self._incomplete
            if any(as_dep(dep).keyset is not None for dep in builder.deps) and builder.name in self._shared:
                for row in self._shared[builder.name].to_pylist():
                    whole = whole and row["error"] is None and row["entry_id"] is not None
                    entries.append([builder.name, row["key"], row["entry_id"]])
                    until += [row["until"]] if row["until"] is not None else []
        group = key_json(self.group)
        return TraceRow(
            trace.target.name,
            "group",
            group,
            self.job.bindings[trace.target].config_hash,
            self.job.now,
            self.job.run_id,
            group=group,
            plan_hash=plan,
            group_trace=found,
            reads=json.dumps(entries) if entries else None,
            status="ok" if whole else "error",
            valid_until=min(until, default=None),
        )

    def _entries(self, builder: Builder) -> DataFrame:
        return self._table("entries").where(f"builder = '{builder.name}'")

    def _table(self, name: str) -> DataFrame:
        self.cache.ensure(name)
        return self.spark.read.format("delta").load(self.cache.table_path(name))
