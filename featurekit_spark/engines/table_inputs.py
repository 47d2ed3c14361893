"""What keys of the table mode are given: results of earlier stages, and entries that they may find in the cache.

Owns where each builder's results lie and how keys of one space lead to another. Every frame here is (reader, row):
the key that is given something, and a struct of GIVEN_SCHEMA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from featurekit_spark.builder import Dep, Each, FeatureBuilder, KeySet, Source
from featurekit_spark.engines.cluster import shares
from featurekit_spark.engines.lookup import local_builders
from featurekit_spark.engines.spark import stage_work
from featurekit_spark.engines.table_sql import GIVEN_DDL, row_struct, union_all
from featurekit_spark.engines.table_store import TableStore
from featurekit_spark.engines.tasks import LinkTask, StageWork
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.fingerprint import key_json
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage, Space
from featurekit_spark.results import to_given

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["TableInputs", "with_given"]

Builder = type[FeatureBuilder[Any]]


class TableInputs:
    """Results so far. `rows`: of a builder in a space; `links`: (reader, key) from a space's origin into it."""

    def __init__(self, job: Job, store: TableStore, evaluator: Evaluator) -> None:
        self.job, self.store, self.evaluator = job, store, evaluator
        self.rows: dict[tuple[str, Space], DataFrame] = {}
        self.links: dict[Space, DataFrame] = {}

    def keep(self, stage: KeyedStage, rows: DataFrame, before: Mapping[str, DataFrame]) -> None:
        """Remember a stage's results, and those of its keys that other stages had resolved `before`."""
        from pyspark.sql import functions as F

        for builder in stage.builders:
            own = rows.where(F.col("builder") == builder.name)
            if builder.name in before:
                own = own.unionByName(before[builder.name])
            self.rows[builder.name, stage.space] = own

    def resolved_before(self, stage: KeyedStage, keys: DataFrame) -> dict[str, DataFrame]:
        """Rows, by builder, of those `keys` for which other stages resolved all of this stage's builders."""
        before: dict[str, DataFrame] = {}
        for builder in stage.builders:
            frames = [rows for (name, _), rows in self.rows.items() if name == builder.name]
            if not frames:
                return {}
            before[builder.name] = union_all(frames).dropDuplicates(["key"])
        for rows in before.values():
            keys = keys.join(rows.select("key"), "key", "left_semi")
        return {name: rows.join(keys, "key", "left_semi") for name, rows in before.items()}

    def work(self, stage: KeyedStage, *, here: bool = False) -> StageWork:
        """What the stage's builders need in a worker, or `here`, in this process: sources of the whole group are read
        once, here."""
        shared = []
        for builder, bound in self.job.bindings.items():
            results = self.evaluator.results.get(builder.name)
            is_source = issubclass(builder, Source) and not issubclass(builder, KeySet)
            if results and is_source and set(bound.key) <= self.job.bindings.group_fields:
                rows = ((key_json(key), result) for key, result in results.items())
                shared.append((builder, to_given(builder.name, rows)))
        work = stage_work(stage, self.evaluator, self.job)
        work = replace(work, shared=(*work.shared, *shared))
        return work if here else shares(work, self.store.spark)

    def link(self, space: Space, keys: DataFrame) -> DataFrame:
        """(reader, key): where `keys` of a reached space's origin lead."""
        if space not in self.links:
            origin, dep = space.origin, space.dep
            assert origin is not None  # the planner sets both on a reached space
            assert dep is not None
            sources = [source.dep if isinstance(source, Each) else source for _, source in dep.on_fields]
            given = [frame for source in sources for frame in self.given_by(source, origin)]
            stage = KeyedStage(origin, tuple(s.builder for s in sources), (), False, frozenset())
            task = LinkTask(self.work(stage), dep)
            frame = with_given(keys, given).mapInArrow(task, "reader string, key string")
            self.links[space] = self.store.save(frame, "links")
        return self.links[space]

    def given(self, stage: KeyedStage) -> list[DataFrame]:
        """All results of earlier stages that the stage's keys read, but for what they gather."""
        deps = [dep for builder in stage.builders for dep in self.job.bindings[builder].deps]
        return [frame for dep in deps if dep.keyset is None for frame in self.given_by(dep, stage.space)]

    def given_by(self, dep: Dep, space: Space) -> list[DataFrame]:
        """What keys of `space` read through `dep`."""
        frames = []
        for builder, where in self.read_by(dep, space):
            rows = self.rows[builder.name, where].selectExpr("key", row_struct())
            if where == space:
                frames.append(rows.withColumnRenamed("key", "reader"))
            else:
                frames.append(self.links[where].join(rows, "key").select("reader", "row"))
        return frames

    def read_by(self, dep: Dep, space: Space) -> Iterator[tuple[Builder, Space]]:
        """The builders whose results keys of `space` read through `dep`, and where these lie."""
        dep = replace(dep, label=None, keyset=None)
        for _, source in dep.on_fields:
            yield from self.read_by(source.dep if isinstance(source, Each) else source, space)
        reached = next((s for s in self.links if s.origin == space and s.dep == dep), None)
        where = space if (dep.builder.name, space) in self.rows and not dep.on_fields else reached
        if where is not None and (dep.builder.name, where) in self.rows:
            yield dep.builder, where

    def cached(self, stage: KeyedStage, keys: DataFrame) -> list[DataFrame]:
        """Entries that the stage may find."""
        frames = []
        for builder in local_builders(stage, self.job):
            if builder.inline or builder.is_dynamic() or not self.store.cache.has(builder.name):
                continue
            bound = self.job.bindings[builder]
            if builder.key == stage.space.key:
                rows = self.store.candidates(bound, keys)
                frames.append(rows.withColumnRenamed("key", "reader"))
            elif not set(builder.key) <= self.job.bindings.group_fields:
                task = LinkTask(self.work(replace(stage, builders=())), Dep(builder))
                frame = with_given(keys, []).mapInArrow(task, "reader string, key string")
                links = self.store.save(frame, "links")
                rows = self.store.candidates(bound, links.select("key").distinct())
                frames.append(links.join(rows, "key").select("reader", "row"))
        return frames


def with_given(keys: DataFrame, given: Sequence[DataFrame]) -> DataFrame:
    """`keys` with what each is given as a list column."""
    from pyspark.sql import functions as F

    if not given:
        return keys.withColumn("given", F.expr(f"CAST(array() AS array<struct<{GIVEN_DDL}>>)"))
    rows = union_all(given).groupBy(F.col("reader").alias("key")).agg(F.collect_list("row").alias("given"))
    return keys.join(rows, "key", "left")
