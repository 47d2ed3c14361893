"""How stages run on tables: members and sources read, keyed stages, gathers.

A stage's rows are written once (one action, so nothing with a price is evaluated twice), its entries appended from
there, and the next stage reads them. Only counts and group-level results reach the driver. Knows nothing of traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from featurekit_spark.builder import Dep, FeatureBuilder, KeySet, as_dep
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.engines.programs import program_rows
from featurekit_spark.engines.spark import SparkEngine, travelling
from featurekit_spark.engines.table_here import rows_made_here
from featurekit_spark.engines.table_inputs import TableInputs, with_given
from featurekit_spark.engines.table_sql import ROW_DDL, as_rows, bare_struct, row_struct, union_all
from featurekit_spark.engines.table_store import TableStore
from featurekit_spark.engines.tasks import ColumnTask, GatherTask, MemberTask, SourceTask
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.execute import Execution
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import GatherStage, KeyedStage, Plan, Space
from featurekit_spark.readings import scan_of
from featurekit_spark.results import ROW_SCHEMA, Counts

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["TableStages", "members_of"]

Key = tuple[Any, ...]
Builder = type[FeatureBuilder[Any]]


class TableStages(Execution):
    """The stages of an `Execution`, with DataFrames where that has lists and dictionaries.

    `frames`: (key, member) of each key set; `todo_frames`: the keys of each target's that are not proven. Group-level
    results and counts are in the evaluator, as ever.
    """

    def __init__(self, plan: Plan, graph: Graph, job: Job, engine: SparkEngine, *, group: Key) -> None:
        if not isinstance(job.cache, DeltaCache):
            raise UsageError(
                "this catalog is too large to pass through the driver (engine.collect_mb), and only a DeltaCache can "
                f"keep its results; found a {type(job.cache).__name__}"
            )
        gathers = [stage for stage in plan.stages if isinstance(stage, GatherStage)]
        away = (KeyedStage(g.space, _with_gathered(g.builder), (), False, g.feeds) for g in gathers)
        engine.check(replace(plan, stages=tuple(away)), job)  # here what they need has to travel, too
        super().__init__(plan, graph, job, engine, group=group)
        self.job = job  # not in the background: what the driver appends, Spark's next read has to see
        self.spark_engine, self.spark = engine, engine.session
        self.store = TableStore(self.spark, job.cache, job)
        self.inputs = TableInputs(job, self.store, self.evaluator)
        self.frames: dict[str, DataFrame] = {}
        self.sizes: dict[str, int] = {}
        self.todo_frames: dict[str, DataFrame] = {}
        self.todo_sizes: dict[str, int] = {}

    def _run(self, stage: Any) -> None:
        match stage:
            case GatherStage(builder) if self._wanted() and self._gathers(builder):
                if self.regather:
                    self._run_gather(stage)
            case _:
                super()._run(stage)

    def _wanted(self) -> bool:
        return any(self.todo_sizes.values())

    def _read_keys(self, keyset: type[KeySet]) -> None:
        from pyspark.sql import functions as F

        scan = scan_of(keyset, self.job, self.plan.group_fields, self.group)
        if scan is None:
            super()._read_keys(keyset)
            keys = self.members[keyset.name]
            columns = {"key": [key_json(key) for key in keys], "member": [key[-1] for key in keys]}
            kind = None if keys else pa.string()
            members = self.spark.createDataFrame(
                pa.table({name: pa.array(values, kind) for name, values in columns.items()})
            )
        else:
            scanned = scan.to_spark(self.spark)
            kind = scanned.schema[0].dataType.simpleString()
            task = MemberTask(self._group_key(keyset.key))
            members = scanned.mapInArrow(task, f"key string, member {kind}")
        members = self.store.save(members, "members")
        count, distinct = members.agg(F.count("*"), F.count_distinct("key")).collect()[0]
        if count != distinct:
            raise DataError(
                f"{keyset.name} lists {count - distinct} members twice; a key set yields each key once"
            )
        self.frames[keyset.name], self.sizes[keyset.name] = members, count

    def _read_source(self, source: Builder, space: Space) -> None:
        members = self.frames[space.label.removeprefix("of ")]
        stage = KeyedStage(space, (source,), (), False, frozenset({"target"}))
        scan = scan_of(source, self.job, self.plan.group_fields, self.group)
        if scan is None:
            self._run_stage(stage, members.select("key"))
            return
        values = scan.to_spark(self.spark).toDF("member", "value")
        keys = members.join(values, "member", "left").select("key", "value")
        given = with_given(keys, self.inputs.cached(stage, keys))
        rows = given.mapInArrow(SourceTask(self.inputs.work(stage)), ROW_DDL)
        if self._take(stage, rows, {}) > self.sizes[space.label.removeprefix("of ")]:
            raise DataError(f"{source.name} lists members twice; a scan yields each member once")

    def with_hash(self, frame: DataFrame, source: Any, keyset: type[KeySet], column: str) -> DataFrame:
        """`frame` with the value hash of a source at each member's key."""
        from pyspark.sql import functions as F

        space = members_of(keyset)
        if set(source.key) <= set(self.plan.group_fields):
            return frame.withColumn(column, F.lit(self._group_source(source)))
        if source.key == space.key:
            rows = self.inputs.rows[source.name, space]
        else:  # a part of the member's key: read at the keys that members lead to
            reached = Space("reached", source.key, f"by {source.name} from {space}", space, Dep(source))
            links = self.inputs.link(reached, self.frames[keyset.name].select("key"))
            if (source.name, reached) not in self.inputs.rows:
                stage = KeyedStage(reached, (source,), (), False, frozenset({"target"}))
                self._run_stage(stage, links.select("key").distinct())
            rows = links.join(self.inputs.rows[source.name, reached], "key").drop("key")
            rows = rows.withColumnRenamed("reader", "key")
        hashes = rows.select("key", F.coalesce("value_hash", F.lit("error")).alias(column))
        return frame.join(hashes, "key", "left")

    def _run_keyed(self, stage: KeyedStage) -> None:
        if self._wanted():
            self._run_stage(
                stage, self._key_frame(stage.space, everyone=self.regather and "gather" in stage.feeds)
            )

    def _run_stage(self, stage: KeyedStage, keys: DataFrame) -> None:
        before = self.inputs.resolved_before(stage, keys)
        for rows in before.values():
            keys = keys.join(rows.select("key"), "key", "left_anti")
        given = [*self.inputs.given(stage), *self.inputs.cached(stage, keys)]
        if any(self._gathers(builder) for builder in stage.builders):
            rows = self._gathered_rows(stage, keys, given)
        elif self.spark_engine.pays_here(stage):
            work = self.inputs.work(stage, here=True)
            rows = rows_made_here(with_given(keys, given), work, self.store, stage.label)
        else:
            work, frame = self.inputs.work(stage), with_given(keys, given)
            # Workers build its batches all the same, with what it prepares here: as few of them as Arrow makes, since
            # each reads all that it searches.
            at_once = program_rows(stage, self._group_key, self.evaluator, self.job, lambda: self.spark)
            work = replace(work, batch_rows=at_once) if at_once else work
            frame = frame if work.tasks is None else frame.coalesce(work.tasks)
            rows = frame.mapInArrow(ColumnTask(work), ROW_DDL)
        self._take(stage, rows, before)

    def _take(self, stage: KeyedStage, rows: DataFrame, before: Mapping[str, DataFrame]) -> int:
        """Save and commit a stage's rows, remember and count them; how many rows its last builder has."""
        saved = self.store.save(rows, stage.label)
        counts = self.store.commit(saved)
        self.inputs.keep(stage, saved, before)
        for name, done in counts.items():
            self.evaluator.done.setdefault(name, Counts()).add(done)
        last = counts.get(stage.builders[-1].name, Counts())
        self.job.progress(stage.label, last.keys, last.keys)
        return last.keys

    def _run_gather(self, gather: GatherStage) -> None:
        """A group-level builder's row, made by one task that sees all members."""
        builder, bound = gather.builder, self.job.bindings[gather.builder]
        given = tuple(dep.builder for dep in bound.deps if dep.keyset is None)
        stage = KeyedStage(gather.space, (builder,), given, False, gather.feeds)
        key = pa.table({"key": [key_json(self._group_key(builder.key))]})
        keys = self.spark.createDataFrame(key)
        rows = self._gathered_rows(stage, keys, self.inputs.cached(stage, keys))
        self.spark_engine.take(stage, as_rows(rows.toArrow()), self.evaluator, self.job)

    def _gathered_rows(self, stage: KeyedStage, keys: DataFrame, given: Sequence[DataFrame]) -> DataFrame:
        """Rows of builders that gather: one task reads the keys, what they are given, all members and their values."""
        gathers = [dep for b in stage.builders for dep in self.job.bindings[b].deps if dep.keyset is not None]
        keysets = {dep.keyset: self._group_key(dep.keyset.key) for dep in gathers if dep.keyset is not None}
        frames = [keys.selectExpr(bare_struct("")), *(frame.select("row") for frame in given)]
        for keyset in keysets:
            frames.append(self.frames[keyset.name].selectExpr(bare_struct(keyset.name)))
        read: dict[tuple[str, Space], None] = {}
        for builder in stage.builders:
            for dep in self.job.bindings[builder].deps:
                if dep.keyset is not None:
                    own = [(b.name, at) for b, at in self.inputs.read_by(dep, members_of(dep.keyset))]
                    read |= dict.fromkeys(own)
                    if any(self._has_failed(*where) for where in own):
                        self.evaluator.incomplete.add(builder.name)  # the next run gathers again
        frames += [self.inputs.rows[where].selectExpr(row_struct()) for where in read]
        # Members of builders without inputs are evaluated in the gather itself, and need their context there.
        wider = replace(stage, builders=tuple(b for own in stage.builders for b in _with_gathered(own)))
        here = self.spark_engine.pays_here(stage)
        work = self.inputs.work(stage, here=here)
        work = replace(work, context=travelling(wider, self.job), tasks=None)
        task, members = GatherTask(work, tuple(keysets.items())), union_all(frames).select("row.*")
        if here:
            made = task(members.toArrow().to_batches())
            return self.store.write([pa.Table.from_batches(made, ROW_SCHEMA)], ROW_DDL, stage.label)
        return members.repartition(1).mapInArrow(task, ROW_DDL)

    def _gathers(self, builder: Builder) -> bool:
        return any(dep.keyset is not None for dep in self.job.bindings[builder].deps)

    def _has_failed(self, builder: str, space: Space) -> bool:
        done = self.evaluator.done.get(builder, Counts())
        return bool(done.error) and not self.inputs.rows[builder, space].where("error IS NOT NULL").isEmpty()

    def _key_frame(self, space: Space, *, everyone: bool) -> DataFrame:
        if space.kind == "members":
            name = space.label.removeprefix("of ")
            if everyone:
                return self.frames[name].select("key")
            return (
                self.todo_frames[name]
                if name in self.todo_frames
                else self.frames[name].select("key").limit(0)
            )
        assert (
            space.origin is not None
        )  # a group's stages are no keyed ones, and the planner sets it on the rest
        origin = self._key_frame(space.origin, everyone=everyone)
        return self.inputs.link(space, origin).select("key").distinct()


def members_of(keyset: type[KeySet]) -> Space:
    """The space of a key set's members, as the planner names it."""
    return Space("members", keyset.member_key(), f"of {keyset.name}")


def _with_gathered(builder: Builder) -> tuple[Builder, ...]:
    return (builder, *(dep.builder for dep in map(as_dep, builder.deps) if dep.keyset is not None))
