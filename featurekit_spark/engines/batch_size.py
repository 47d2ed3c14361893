"""How many keys a stage takes at a time. Knows stages and clients; builds nothing."""

from __future__ import annotations

from dataclasses import replace

from featurekit_spark.deferred import deferring
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage

__all__ = ["with_batches_for"]

_PAID = 4  # times as many: a batch of calls ends with its slowest, and fewer and fewer are in flight


def with_batches_for(stage: KeyedStage, keys: int, job: Job) -> Job:
    """The job, its `batch_rows` as they suit the stage; answers of paid builders are durable before a batch ends."""
    rows = job.batch_rows
    if deferring(stage.builders, job.context):
        return replace(
            job, batch_rows=max(keys, rows)
        )  # what is handed in together is one batch of the provider's
    return replace(job, batch_rows=rows * _PAID) if stage.paid and job.journal is not None else job
