"""Session: plans and runs features for all keys of a group. Takes what bootstrap built; owns no client.

The whole path is `run`: graph, bindings, plan, engine, record.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import pyarrow as pa

from featurekit_spark.bindings import Bindings
from featurekit_spark.budget import Budget
from featurekit_spark.builder import Dep, FeatureBuilder, as_dep
from featurekit_spark.cache.base import FeatureCache, RunRecord
from featurekit_spark.cache.journal import Observer
from featurekit_spark.controller import Controller, Feature, run_clock
from featurekit_spark.costs import unpriced
from featurekit_spark.deferred import handing_in, take_in_answers, until_answered
from featurekit_spark.double_payments import DoublePayments, PaidTwice
from featurekit_spark.engines.choice import execution_for, passes_through_driver
from featurekit_spark.engines.local import LocalEngine
from featurekit_spark.engines.spark import SparkEngine
from featurekit_spark.errors import UsageError
from featurekit_spark.estimate import PlanEstimate, estimate_run, key_jumps
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.execute import Engine, Execution
from featurekit_spark.failures import FailedKeys, Failures, RetryErrors, failed_keys, retrying
from featurekit_spark.fingerprint import key_json
from featurekit_spark.flight import Leases
from featurekit_spark.graph import Graph
from featurekit_spark.group_state import GroupState
from featurekit_spark.job import Job, Progress
from featurekit_spark.paying import journaled, purse_for, refuse_new_calls
from featurekit_spark.plan import Plan, PlanState, build_plan
from featurekit_spark.readings import Readings
from featurekit_spark.reasons import Why
from featurekit_spark.records import EarlyEnd, ended_early, facts_of, with_earlier_goes
from featurekit_spark.results import Counts
from featurekit_spark.unchanged import Unchanged
from featurekit_spark.why import why

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Limits", "RunResult", "Session"]

Target: TypeAlias = "type[FeatureBuilder[Any]] | Dep"


@dataclass(frozen=True)
class Limits:
    """What is small. `in_process_keys`: a stage of at most so many keys runs in the driver's process; `batch_rows`:
    keys per call of `build`; `partitions`: of a Spark stage (None: the session's default parallelism);
    `collect_mb`: a catalog or a stage's results of more stay in Spark and Delta and do not pass through the driver;
    `micro_batch`: so many paid answers are made durable at once (None: as many as a client makes calls);
    `executor`: who makes paid calls on Spark, its workers or the driver."""

    in_process_keys: int = 2_000
    batch_rows: int = 2_048
    partitions: int | None = None
    collect_mb: int = 256
    micro_batch: int | None = None
    executor: Literal["workers", "driver"] = "workers"


@dataclass(frozen=True)
class RunResult:
    """What a run did. `status`: ok, or partial where any builder failed for any key. `paid_twice`: calls whose answers
    another run had paid for meanwhile."""

    run_id: str
    status: Literal["ok", "partial"]
    group: dict[str, Any]
    ts: datetime
    builders: Mapping[str, Counts]
    keys: int
    unchanged: bool
    errors: Mapping[str, str]
    execution: Execution = field(repr=False)
    warnings: tuple[str, ...] = ()
    paid_twice: PaidTwice = field(default_factory=PaidTwice)

    def table(self, target: type[FeatureBuilder[Any]] | str) -> Any:
        """A target's answers, one row per key: its key fields, value (typed), ts, value_hash, status, error.

        A pyarrow Table; a DataFrame (without status and error) where the catalog was too large for the driver.
        """
        return self.execution.table(target if isinstance(target, str) else target.name)

    def values(self, target: type[FeatureBuilder[Any]] | str) -> dict[tuple[Any, ...], Any]:
        """A target's values by key, None where there is none."""
        table = self.table(target)
        if not isinstance(table, pa.Table):
            raise UsageError(
                "these results are too large for the driver; read them with table(), a DataFrame"
            )
        fields = table.column_names[: table.column_names.index("value")]
        keys = zip(*(table[name].to_pylist() for name in fields), strict=True)
        return dict(
            zip(keys, self.execution.values(target if isinstance(target, str) else target.name), strict=True)
        )


class Session:
    """`Session(context, cache).run(LLMLogic.over(ProductIds), merchant="abt", market="US")`

    `engine`: "spark", "local" (never a JVM), or an Engine. `spark`: a SparkSession, or a function that starts one,
    called when the first stage needs it; without it the active session, else a new one by the usual builder.
    `observer`: is told of the paid calls of each run when it is over. `leases`: shared with other runs over this cache,
    so that what two need at the same time is asked by one.
    """

    def __init__(
        self,
        context: Any,
        cache: FeatureCache,
        *,
        engine: Literal["spark", "local"] | Engine = "spark",
        spark: SparkSession | Callable[[], SparkSession] | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
        leases: Leases | None = None,
    ) -> None:
        self.context = context
        self.leases = leases
        self.observer = observer
        self.cache = cache
        self.limits = limits or Limits()
        self.progress = progress or (lambda what, done, total: None)
        self.controller = Controller(context, cache)
        self.engine: Engine = _engine(engine, spark, self.limits) if isinstance(engine, str) else engine
        self.execution: Execution | None = None  # under way, or the last one: tells how far a failed run came
        self.ended_early: EarlyEnd | None = None  # of the last run, where an error ended it
        self._goes = 0  # of the last run: it is carried out anew when answers of a batch came

    def get(
        self,
        feature_builder: type[FeatureBuilder[Any]],
        key: Any,
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> Feature[Any]:
        """One feature, in-process; see `Controller.get`."""
        return self.controller.get(feature_builder, key, configs, gather=gather)

    def plan(self, *targets: Target, configs: Mapping[Any, Any] | None = None, **group: Any) -> Plan:
        """The stages that `run` with the same arguments would carry out."""
        return self._prepare(targets, configs, group)[0]

    def explain(self, *targets: Target, configs: Mapping[Any, Any] | None = None, **group: Any) -> str:
        """The plan as text."""
        return self.plan(*targets, configs=configs, **group).explain()

    def estimate(
        self, *targets: Target, configs: Mapping[Any, Any] | None = None, **group: Any
    ) -> PlanEstimate:
        """What `run` with the same arguments would find, build and pay, per builder. Reads sources and the cache, in
        this process; builds nothing but light builders, writes nothing.

        Raises UsageError for a catalog that does not pass through the driver.
        """
        plan, graph, bindings, key = self._prepare(targets, configs, group)
        job = Job(
            bindings,
            self.context,
            self.cache,
            run_clock(self.context),
            "estimate",
            self.limits.batch_rows,
            self.progress,
            failures=Failures(self.cache),
        )
        if not passes_through_driver(plan, job, self.engine, group=key):
            raise self._too_large("keys are counted in this process")
        return estimate_run(plan, graph, job, group=key, named=group)

    def why(self, target: Target, key: Any, configs: Mapping[Any, Any] | None = None, **group: Any) -> Why:
        """Why a feature at a key would be computed again, or that it would not; `print` it. Builds nothing dear.

        `target` as in `run`, `Builder.over(KeySet)`; a bare builder has no traces, and `group` then says whose run
        records tell what its code and config were before.
        """
        dep = as_dep(target)
        return why(
            dep.builder,
            key,
            context=self.context,
            cache=self.cache,
            keyset=dep.keyset,
            configs=configs,
            group=tuple(group.values()) or None,
        )

    def run(
        self,
        *targets: Target,
        configs: Mapping[Any, Any] | None = None,
        run_id: str | None = None,
        budget: Budget | None = None,
        retry_errors: RetryErrors | None = None,
        retry_builders: Sequence[type[FeatureBuilder[Any]] | str] | None = None,
        **group: Any,
    ) -> RunResult:
        """Compute the targets, each `Builder.over(KeySet)`, for one group given by its key fields.

        Keys that are proven unchanged are not computed; failed keys are errors of their own and make the status
        partial. Raises DefinitionError, UsageError and ContextError before anything ran, BudgetReachedError where
        `budget` does not suffice. Whatever ends a run that has begun: what was paid for is kept, a record says that the
        run stopped or failed and what it paid, and the same call goes on from there. Paid keys that failed for good
        before are not asked again, unless `retry_errors` is "terminal" or "all" (for `retry_builders` only, if given);
        every run asks again for the others.
        """
        plan, graph, bindings, key = self._prepare(targets, configs, group)
        run_id, self.ended_early, self._goes = run_id or uuid.uuid4().hex, None, 0
        job = Job(
            bindings,
            self.context,
            self.cache,
            run_clock(self.context),
            run_id,
            self.limits.batch_rows,
            self.progress,
            failures=retrying(self.cache, retry_errors, retry_builders, graph=graph),
        )
        double = DoublePayments(run_id, take_in_answers(graph, job))
        job = replace(job, double=double)
        job = replace(job, purse=purse_for(budget, graph, job))
        names = [target.builder.name for target in plan.targets]
        readings = Readings(job, plan.group_fields, key, self.engine.scan)
        fits = cache(partial(passes_through_driver, plan, job, self.engine, group=key))
        state = GroupState(plan, graph, job, key, names, readings, fits)
        mark = state.unchanged()
        if mark is not None:
            return self._unchanged(plan, graph, job, key, group, mark, read_nothing=not readings.hashes)
        self.engine.check(plan, job)
        if budget is not None and budget.no_new_calls:
            if not fits():
                raise self._too_large("no_new_calls needs the keys in this process")
            refuse_new_calls(plan, graph, job, key)
        back = state.begin()
        try:
            execution = self._executed(plan, graph, job, key, readings)
        except BaseException as error:
            self.ended_early = ended_early(self.cache, graph, job, key, self._execution_of(run_id), error)
            raise
        counts = execution.counts()
        if self._goes > 1:
            counts = with_earlier_goes(counts, self.cache, graph, run_id)
        errors = execution.errors(names)
        status: Literal["ok", "partial"] = "partial" if any(c.error for c in counts.values()) else "ok"
        result = RunResult(
            run_id,
            status,
            group,
            job.now,
            counts,
            execution.keys,
            execution.unchanged and not back,
            errors,
            execution,
            (
                *key_jumps(plan, {name: c.keys for name, c in counts.items()}, self._last_counts(key)),
                *unpriced(counts),
                *double.found.told(),
            ),
            double.found,
        )
        self.cache.record_run(
            RunRecord(
                run_id,
                key_json(key),
                job.now,
                status,
                facts_of(counts, graph, job, keys=result.keys, unchanged=result.unchanged),
            )
        )
        state.end(execution, unchanged=result.unchanged)
        return result

    def failed(
        self, *targets: Target, configs: Mapping[Any, Any] | None = None, **group: Any
    ) -> list[FailedKeys]:
        """What the paid builders below the targets failed at and were not answered since, by kind. Of all groups that
        share the cache and these configs; `estimate(...).failed` counts those of one group."""
        _, graph, bindings, _ = self._prepare(targets, configs, group)
        return failed_keys(self.cache, [bindings[builder] for builder in graph if builder.paid])

    def _too_large(self, why: str) -> UsageError:
        return UsageError(
            f"{why}, and this catalog is larger than engine.collect_mb ({self.limits.collect_mb}); raise it, or choose "
            "engine 'local'"
        )

    def _last_counts(self, key: tuple[Any, ...]) -> Mapping[str, Mapping[str, Any]]:
        last = self.cache.last_run(key_json(key))
        return {} if last is None else last.record.get("builders", {})

    def _executed(
        self, plan: Plan, graph: Graph, job: Job, key: tuple[Any, ...], readings: Readings | None = None
    ) -> Execution:
        paying = journaled(
            graph,
            job,
            micro_batch=self.limits.micro_batch,
            observer=self.observer,
            leases=self.leases,
            evaluator=lambda: self._evaluator_of(job.run_id),
        )
        with paying as job:  # for as long as the run may wait: a journal that is closed is a dead run's

            def once() -> Execution:
                self._goes += 1
                again = self._goes > 1 and job.failures is not None
                own = replace(job, failures=job.failures.anew(job.now)) if again else job  # type: ignore[union-attr]
                with handing_in(graph, own):
                    execution = self.execution = execution_for(
                        plan, graph, own, self.engine, group=key, readings=readings
                    )
                    execution.run()
                return execution

            return until_answered(graph, job, once)

    def _execution_of(self, run_id: str) -> Execution | None:
        execution = self.execution
        return execution if execution is not None and execution.job.run_id == run_id else None

    def _evaluator_of(self, run_id: str) -> Evaluator | None:
        execution = self._execution_of(run_id)
        return None if execution is None else execution.evaluator

    def _unchanged(
        self,
        plan: Plan,
        graph: Graph,
        job: Job,
        key: tuple[Any, ...],
        group: dict[str, Any],
        mark: Mapping[str, Any],
        *,
        read_nothing: bool,
    ) -> RunResult:
        def checked() -> Execution:
            self.engine.check(plan, job)
            return self._executed(plan, graph, job, key)

        execution = Unchanged(mark, plan, graph, job, checked, read_nothing=read_nothing)
        counts = execution.counts()
        return RunResult(
            job.run_id, "ok", group, job.now, counts, execution.keys, True, {}, cast(Execution, execution)
        )

    def _prepare(
        self, targets: Sequence[Target], configs: Mapping[Any, Any] | None, group: Mapping[str, Any]
    ) -> tuple[Plan, Graph, Bindings, tuple[Any, ...]]:
        deps = [as_dep(target) for target in targets]
        if not deps:
            raise UsageError("nothing to run: pass at least one target, such as LLMLogic.over(ProductIds)")
        graph = Graph([*(d.builder for d in deps), *(d.keyset for d in deps if d.keyset is not None)])
        plan = build_plan(
            graph,
            deps,
            PlanState("local" if self.engine.name == "local" else "spark", self.limits.in_process_keys),
        )
        bindings = Bindings(self.context, configs).bind_all(graph)
        fields: tuple[str, ...] = ()
        for dep in deps:
            assert dep.keyset is not None  # build_plan refuses a target without one
            bindings.group_fields |= set(dep.keyset.key)
            if fields and set(fields) != set(dep.keyset.key):
                raise UsageError(
                    f"the targets' key sets have different groups: {fields!r} and {dep.keyset.key!r}"
                )
            fields = fields or dep.keyset.key
        if set(group) != set(fields):
            raise UsageError(f"this run needs the group fields {fields!r}, found {tuple(group)!r}")
        return plan, graph, bindings, tuple(group[name] for name in fields)


def _engine(name: str, spark: Any, limits: Limits) -> Engine:
    match name:
        case "local":
            return LocalEngine()
        case "spark":
            return SparkEngine(
                spark,
                in_process_keys=limits.in_process_keys,
                partitions=limits.partitions,
                collect_mb=limits.collect_mb,
                executor=limits.executor,
            )
        case _:
            raise UsageError(f"engine {name!r} is unknown; choose 'spark' or 'local'")
