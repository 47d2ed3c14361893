"""A run whose keys and results stay in Spark and Delta: for catalogs too large to pass through the driver.

The same plan, the same evaluator inside the same UDFs; between stages everything is a table. Owns what is proven, what
is answered and which traces are written; only counts and the digests of a group's buckets reach the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any

from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.base import TraceRow
from featurekit_spark.check import Check, group_trace, plan_hash
from featurekit_spark.controller import commit
from featurekit_spark.engines.spark import SparkEngine
from featurekit_spark.engines.table_sql import bucket_hashes, ddl_of, short_hash, text_reads, translated
from featurekit_spark.engines.table_stages import TableStages, members_of
from featurekit_spark.engines.tasks import DecodeTask
from featurekit_spark.errors import UsageError
from featurekit_spark.fingerprint import bucket_digests, digest, group_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import Plan, ReadKeys, TargetTrace
from featurekit_spark.results import Counts, Result

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

__all__ = ["TableExecution"]

Key = tuple[Any, ...]
Builder = type[FeatureBuilder[Any]]
# What makes a stored trace another one.
_TARGET_COLUMNS = ("plan_hash", "keyed_trace", "reads", "valid_until", "status", "entry_id", "value_hash")
_GROUP_COLUMNS = ("plan_hash", "group_trace", "reads", "valid_until", "status")


class TableExecution(TableStages):
    """One run of one group, table by table; the same face as `Execution`, with DataFrames for tables."""

    def __init__(self, plan: Plan, graph: Graph, job: Job, engine: SparkEngine, *, group: Key) -> None:
        super().__init__(plan, graph, job, engine, group=group)
        self._checked: dict[str, DataFrame] = {}
        self._proven: dict[str, int] = {}
        self._trees: dict[tuple[str, str], str] = {}
        self._kept_frames: dict[str, DataFrame] = {}

    def run(self) -> None:
        """Carry out every stage, then write the traces."""
        try:
            with translated():
                super().run()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what the run kept between its stages. Answers can be read until then."""
        self.store.close()

    def counts(self) -> dict[str, Counts]:
        """Per builder, in build order; a target's proven keys are its hits."""
        counts = {b.name: Counts(**vars(self.evaluator.done.get(b.name, Counts()))) for b in self.graph}
        for name, proven in self._proven.items():
            counts[name].hit += proven
        return counts

    @property
    def keys(self) -> int:
        """How many keys the first target has."""
        return self.sizes[next(iter(self.checks.values())).trace.keyset.name]

    @property
    def unchanged(self) -> bool:
        """Whether every key of every target was proven unchanged."""
        return not self._wanted() and all(check.same_group for check in self.checks.values())

    def errors(self, targets: Sequence[str], *, every: bool = False) -> dict[str, str]:
        """The first failures of the targets' keys, or `every` one, by key as JSON."""
        found: dict[str, str] = {}
        for name in targets:
            if self._failures(name):
                failed = self._target_rows(name).where("error IS NOT NULL").select("key", "error")
                shown = failed if every else failed.limit(100)
                found |= {row["key"]: row["error"] for row in shown.collect()}
        return found

    def fingerprint(self, targets: Sequence[str]) -> str:
        """Hash over every key's answer, as `Execution.fingerprint` computes it."""
        if tuple(targets) in self._fingerprints:
            return self._fingerprints[tuple(targets)]
        parts = []
        for name in targets:
            answers = self._answers(name).selectExpr("key", "coalesce(value_hash, '') AS hash")
            parts += [name, bucket_digests(bucket_hashes(answers, ["hash"])[0])]
        found = self._fingerprints[tuple(targets)] = digest("published", *parts)
        return found

    def target_keys(self) -> dict[str, int]:
        """How many keys each target has."""
        return {name: self.sizes[check.trace.keyset.name] for name, check in self.checks.items()}

    def valid_until(self) -> datetime | None:
        """Now, where anything can expire at all: the rows that know when are not looked through."""
        below = {b for check in self.checks.values() for b in self.graph.needs_of(check.trace.target)}
        return self.job.now if any(builder.freshness.ttl is not None for builder in below) else None

    def kept(self, targets: Sequence[str]) -> int:
        """How many failed keys keep the answer that they had before."""
        return sum(self._kept_rows(name).count() for name in targets if self._failures(name))

    def results_of(self, target: str) -> dict[Key, Result]:
        """Refused: results stay in Spark."""
        raise UsageError("these results are too large for the driver; read them with table(), a DataFrame")

    def table(self, target: str) -> Any:
        """`answers`, with the earlier answer of a failed key."""
        return self.answers(target)

    def answers(self, target: str) -> Any:
        """As `Execution.answers`, but a DataFrame in no particular order."""
        from pyspark.sql import functions as F

        bound, answers = self.job.bindings[self.graph[target]], self._answers(target)
        if self._proven[target]:
            entries = self.store.by_id(target).withColumnsRenamed({"value": "proven", "ts": "since"})
            answers = answers.join(entries, "entry_id", "left").select(
                "key",
                F.coalesce("value", "proven").alias("value"),
                F.coalesce("since", "ts").alias("ts"),
                "value_hash",
            )
        ddl = ", ".join(f"`{name}` string" for name in bound.key)
        ddl += f", value {ddl_of(bound.type.arrow)}, ts timestamp, value_hash string"
        return answers.mapInArrow(DecodeTask(bound.key, bound.type), ddl)

    def stored(self, rows: Any, label: str) -> Any:
        """A frame written down and read back, so that it is computed once however often it is looked at."""
        return self.store.save(rows, label)

    def _answers(self, target: str) -> DataFrame:
        """(key, entry_id, value, ts, value_hash) of every member; value is left out of what was proven."""
        from pyspark.sql import functions as F

        columns = ["key", "entry_id", "value", "ts", "value_hash"]
        proof = self._proof(target)
        checked = self._checked[self.checks[target].trace.keyset.name].select("key", proof)
        proven = checked.where("proof IS NOT NULL").select(
            "key", "proof.entry_id", "proof.ts", "proof.value_hash"
        )
        answers = proven.withColumn("value", F.lit(None).cast("binary")).select(*columns)
        if not self._walked(target):
            return answers
        walked = checked.where("proof IS NULL").select("key").join(self._target_rows(target), "key")
        if self._failures(target):
            kept = self._kept_rows(target)
            walked = walked.join(kept.select("key"), "key", "left_anti")
            answers = answers.unionByName(kept.select(*columns))
        # What was walked has its value here: no entry is to be looked up for it.
        return answers.unionByName(walked.select(*columns).withColumn("entry_id", F.lit(None).cast("string")))

    def _kept_rows(self, target: str) -> DataFrame:
        """(key, value, ts, value_hash) of the current entries of keys that failed in this run."""
        from pyspark.sql import functions as F

        if target not in self._kept_frames:
            failed = self._target_rows(target).where("error IS NOT NULL").select("key")
            found = self.store.candidates(self.job.bindings[self.graph[target]], failed).where("row.current")
            kept = found.select("key", "row.value", "row.ts", "row.value_hash")
            kept = kept.withColumn("entry_id", F.lit(None).cast("string"))
            self._kept_frames[target] = self.store.save(kept, "kept")
        return self._kept_frames[target]

    def _target_rows(self, target: str) -> DataFrame:
        return self.inputs.rows[target, members_of(self.checks[target].trace.keyset)]

    def _walked(self, target: str) -> bool:
        return self._proven[target] < self.sizes[self.checks[target].trace.keyset.name]

    def _failures(self, target: str) -> bool:
        return self._walked(target) and self.evaluator.done.get(target, Counts()).error > 0

    def _proof(self, target: str) -> Column:
        from pyspark.sql import functions as F

        return F.col(f"proof{list(self.checks).index(target)}").alias("proof")

    # -- the check -------------------------------------------------------------------------------------------

    def _check(self, traces: Iterable[TargetTrace]) -> None:
        from pyspark.sql import functions as F

        traces = tuple(traces)
        for stage in self.plan.stages:
            if isinstance(stage, ReadKeys):
                gathered = [sources for trace in traces for k, sources in trace.gathered if k is stage.keyset]
                self._hash_trees(stage.keyset, [source for sources in gathered for source in sources])
                self._count_members(stage.keyset)
        for trace in traces:
            check = Check(trace, plan_hash(trace, self.graph, self.job.bindings))
            check.group = group_trace(trace, self._tree, self._group_source)
            stored = self.store.cache.group_row(trace.target.name, self._group_text())
            check.stored_group = asdict(stored) if stored is not None else None
            check.same_group = self._same_group(check)
            self.checks[trace.target.name] = check
        for keyset in dict.fromkeys(trace.keyset for trace in traces):
            own = [check for check in self.checks.values() if check.trace.keyset is keyset]
            frame = self.frames[keyset.name].select("key")
            for check in own:
                frame = self._with_proof(frame, check)
            checked = self._checked[keyset.name] = self.store.save(frame, "checked")
            names = [check.trace.target.name for check in own]
            is_left = reduce(or_, (self._proof(name).isNull() for name in names))
            counts = checked.agg(
                F.count_if(is_left), *(F.count(self._proof(name)) for name in names)
            ).collect()[0]
            self.todo_frames[keyset.name] = checked.where(is_left).select("key")
            self.todo_sizes[keyset.name] = counts[0]
            self._proven |= dict(zip(names, counts[1:], strict=True))
        commit(self.job.cache, self.evaluator, run_id=self.job.run_id)
        self.regather = self._wanted() and any(not check.same_group for check in self.checks.values())
        if self._wanted() and not self.regather:
            for check in self.checks.values():
                for builder, key, result in check.gathered:
                    self.evaluator.give(builder, {key: result})

    def _with_proof(self, frame: DataFrame, check: Check) -> DataFrame:
        """`frame` with what each key reads now, `keyed<i>`, and the stored trace that still holds, `proof<i>`."""
        from pyspark.sql import functions as F

        trace, at = check.trace, list(self.checks).index(check.trace.target.name)
        sources = [f"source{i}" for i in range(len(trace.keyed))]
        for source, column in zip(trace.keyed, sources, strict=True):
            frame = self.with_hash(frame, source, trace.keyset, column)
        image = F.concat(F.lit("inputs\n"), F.concat_ws(",", *sources), F.lit("\n"))
        frame = frame.withColumn(f"keyed{at}", short_hash(image)).drop(*sources)
        proof = F.struct("row.keyed_trace", "row.entry_id", "row.value_hash", "row.ts").alias(f"proof{at}")
        if not (trace.provable and check.same_group):
            kind = "struct<keyed_trace: string, entry_id: string, value_hash: string, ts: timestamp>"
            return frame.withColumn(f"proof{at}", F.lit(None).cast(kind))
        # A trace with reads reached by a value is not proven here: those sources would have to be asked first.
        until = F.col("row.valid_until")
        holds = (
            (F.col("row.plan_hash") == check.plan_hash)
            & F.col("row.reads").isNull()
            & (until.isNull() | (until > F.lit(self.job.now)))
        )
        stored = self.store.proofs(trace.target.name, self._group_text()).where(holds).select("key", proof)
        frame = frame.join(stored, "key", "left")
        same = F.col(f"proof{at}.keyed_trace") == F.col(f"keyed{at}")
        return frame.withColumn(f"proof{at}", F.when(same, F.col(f"proof{at}")))

    def _hash_trees(self, keyset: type[KeySet], sources: Sequence[Builder]) -> None:
        """`fingerprint.group_hash` over the members and over each source's values, in one job."""
        from pyspark.sql import functions as F

        frame, columns = self.frames[keyset.name].select("key", F.lit("").alias("hash0")), ["hash0"]
        sources = list(dict.fromkeys(sources))
        for source in sources:
            columns.append(f"hash{len(columns)}")
            frame = self.with_hash(frame, source, keyset, columns[-1])
        names = ["", *(source.name for source in sources)]
        for name, pairs in zip(names, bucket_hashes(frame, columns), strict=True):
            self._trees[keyset.name, name] = bucket_digests(pairs)

    def _tree(self, keyset: type[KeySet], source: Any) -> str:
        return self._trees[keyset.name, "" if source is None else source.name]

    def _count_members(self, keyset: type[KeySet]) -> None:
        """A key set's long list of members is no entry here: a trace row says which lists were read before."""
        if keyset.name in self.members:
            return  # read on the driver, like any other feature
        self._hash_trees(keyset, ())
        tree, config_hash = self._tree(keyset, None), self.job.bindings[keyset].config_hash
        known = self.store.cache.traces(keyset.name, self._group_text()).to_pylist()
        if any((row["key"], row["config_hash"]) == (tree, config_hash) for row in known) or self._is_entry(
            keyset
        ):
            counts = Counts(hit=1)
        else:
            counts, group = Counts(computed=1), self._group_text()
            now, run_id = self.job.now, self.job.run_id
            row = TraceRow(
                keyset.name, "group", tree, config_hash, now, run_id, group=group, group_trace=tree
            )
            self.job.cache.append(None, [row])
        self.evaluator.done.setdefault(keyset.name, Counts()).add(counts)

    def _is_entry(self, keyset: type[KeySet]) -> bool:
        """Whether a run through the driver, when the catalog was small, left these very members as an entry."""
        bound, group = self.job.bindings[keyset], self._group_key(keyset.key)
        for found in self.job.cache.candidates(keyset.name, bound.config_hash, [key_json(group)]):
            members = bound.type.decode(found.entry.value) if found.entry.value is not None else []
            if group_hash((key_json((*group, member)), "") for member in members) == self._tree(keyset, None):
                return True
        return False

    # -- traces ----------------------------------------------------------------------------------------------

    def _write_traces(self) -> None:
        for name, check in self.checks.items():
            if check.trace.provable:
                if self._walked(name):
                    self._write_targets(name, check)
                if not check.same_group:
                    self._write_group(name, check)

    def _write_targets(self, name: str, check: Check) -> None:
        """For every walked key what it read, where that differs from what is stored."""
        from pyspark.sql import functions as F

        keyed = F.col(f"keyed{list(self.checks).index(name)}").alias("keyed_trace")
        checked = self._checked[check.trace.keyset.name]
        walked = checked.where(self._proof(name).isNull()).select("key", keyed)
        failed = F.col("error").isNotNull()
        rows = walked.join(self._target_rows(name), "key").select(
            "key",
            "keyed_trace",
            "value_hash",
            "config_hash",
            "reads",
            F.col("until").alias("valid_until"),
            F.when(failed, "error").otherwise("ok").alias("status"),
            F.when(~failed, F.col("entry_id")).alias("entry_id"),
        )
        below = self.graph.needs_of(check.trace.target)
        if self.job.bindings.value_sources or any(builder.is_dynamic() for builder in below):
            rows = text_reads(rows, empty=None)
        else:
            rows = rows.withColumn("reads", F.lit(None).cast("string"))
        constants = {
            "builder": name,
            "kind": "target",
            "group": self._group_text(),
            "plan_hash": check.plan_hash,
        }
        rows = rows.withColumns({column: F.lit(text) for column, text in constants.items()})
        rows = rows.join(self.store.traces(name, self._group_text()), "key", "left")
        same = reduce(and_, (F.col(c).eqNullSafe(F.col(f"row.{c}")) for c in _TARGET_COLUMNS))
        self.store.append("traces", rows.where(F.col("row").isNull() | ~same).drop("row"))

    def _write_group(self, name: str, check: Check) -> None:
        group, stored = self._group_text(), check.stored_group
        row = TraceRow(
            name,
            "group",
            group,
            self.job.bindings[check.trace.target].config_hash,
            self.job.now,
            self.job.run_id,
            group=group,
            plan_hash=check.plan_hash,
            group_trace=check.group,
            **self._gathered(check),
        )
        if stored is None or any(getattr(row, column) != stored[column] for column in _GROUP_COLUMNS):
            self.job.cache.append(None, [row])
