"""Stages in this process: for notebooks, tests and small merchants. Never starts a JVM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import keys_of
from featurekit_spark.cache.base import Found
from featurekit_spark.controller import commit
from featurekit_spark.engines.batch_size import with_batches_for
from featurekit_spark.engines.lookup import Candidates, former_entries, stage_candidates
from featurekit_spark.engines.programs import program_rows
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage, Plan

__all__ = ["LocalEngine"]

Key = tuple[Any, ...]


class LocalEngine:
    """The evaluator itself, batch by batch."""

    name = "local"

    def check(self, plan: Plan, job: Job) -> None:
        """Nothing has to travel."""

    def prepare(self, keys: int, plan: Plan, job: Job) -> None:
        """Nothing has to be started."""

    def settle(self) -> None:
        """Nothing runs in the background."""

    def run_stage(
        self,
        stage: KeyedStage,
        keys: Sequence[Key],
        evaluator: Evaluator,
        job: Job,
        found: Sequence[Found] | None = None,
    ) -> None:
        """`found`: the stage's candidates, where they were looked up before."""
        store, batch_rows = evaluator.store, evaluator.batch_rows
        job = with_batches_for(stage, len(keys), job)
        if keys and (rows := program_rows(stage, partial(keys_of, stage.space.key, keys[0]), evaluator, job)):
            job = replace(job, batch_rows=rows)
        evaluator.batch_rows = job.batch_rows
        if len(keys) > job.batch_rows and not any(builder.is_dynamic() for builder in stage.builders):
            if found is None:
                found = stage_candidates(stage, keys, job)
            evaluator.store = Candidates([*found, *former_entries(stage, evaluator, job)])
        try:
            self._resolve(stage, keys, evaluator, job)
        finally:
            evaluator.store, evaluator.batch_rows = store, batch_rows
        commit(job.cache, evaluator, run_id=job.run_id)

    def _resolve(self, stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job) -> None:
        for start in range(0, len(keys), job.batch_rows):
            batch = keys[start : start + job.batch_rows]
            for builder in stage.builders:
                evaluator.resolve(builder, [keys_of(stage.space.key, key, builder.key) for key in batch])
            job.progress(stage.label, start + len(batch), len(keys))

    def scan(self, scan: Any) -> pa.Table:
        table: pa.Table = scan.to_arrow()
        return table
