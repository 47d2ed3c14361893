"""Which execution carries a plan out: through the driver while the catalog is small, table by table beyond."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from featurekit_spark.deferred import deferring
from featurekit_spark.engines.spark import SparkEngine
from featurekit_spark.engines.tables import TableExecution
from featurekit_spark.errors import UsageError
from featurekit_spark.execute import Engine, Execution
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import Plan, ReadKeys, ReadSource
from featurekit_spark.readings import Readings, scan_of

__all__ = ["execution_for", "passes_through_driver"]

Key = tuple[Any, ...]


def execution_for(
    plan: Plan, graph: Graph, job: Job, engine: Engine, *, group: Key, readings: Readings | None = None
) -> Execution:
    """The execution of one run: on the Spark engine, catalogs of more than its `collect_mb` stay in tables."""
    if isinstance(engine, SparkEngine) and not passes_through_driver(plan, job, engine, group=group):
        if job.purse is not None:
            raise UsageError(
                "this catalog is larger than engine.collect_mb, and a budget (max_calls, max_usd) is kept only where "
                "keys pass through this process; raise engine.collect_mb, or run without a budget"
            )
        if deferring(graph, job.context):
            raise UsageError(
                "this catalog is larger than engine.collect_mb, and calls by batch (llm.mode: batch) are made where "
                "keys pass through this process; raise it, choose engine 'local', or use llm.mode: online"
            )
        return TableExecution(plan, graph, job, engine, group=group)
    return Execution(plan, graph, job, engine, group=group, readings=readings)


def passes_through_driver(plan: Plan, job: Job, engine: Engine, *, group: Key) -> bool:
    """Whether keys and results of a run fit the driver: always on an engine without another place for them."""
    return not isinstance(engine, SparkEngine) or all(
        size <= engine.collect_mb * 2**20 for size in _scan_sizes(plan, job, group)
    )


def _scan_sizes(plan: Plan, job: Job, group: Key) -> Iterator[int]:
    """Bytes of every scan that the plan begins with."""
    for stage in plan.stages:
        if isinstance(stage, ReadKeys | ReadSource):
            source = stage.keyset if isinstance(stage, ReadKeys) else stage.source
            scan = scan_of(source, job, plan.group_fields, group)
            if scan is not None:
                yield scan.bytes
