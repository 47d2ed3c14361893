"""What a Spark session says of its workers, and what each of them gets of things that they share.

The one place that asks a SparkContext.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from featurekit_spark.engines.tasks import StageWork
from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["parallelism", "shares"]


def parallelism(session: SparkSession) -> int:
    """Task slots of the session. Connect has no SparkContext to ask, and gets a guess."""
    try:
        return int(session.sparkContext.defaultParallelism)
    except Exception:
        return 8


def shares(work: StageWork, session: SparkSession, tasks: int | None = None) -> StageWork:
    """The work as each of `tasks` tasks is given it: what has a method `divided` (a model with its concurrency and rate
    limit) is divided by how many of them run at once, and so is what the journal may have unwritten. Of tasks that
    pay, no more run than such a client makes calls. UsageError where Spark might have calls made twice."""
    pays = any(builder.paid for builder in work.builders)
    if pays and session.conf.get("spark.speculation", "false") == "true":
        names = " -> ".join(builder.name for builder in work.builders)
        raise UsageError(
            f"{names} is paid for, and with spark.speculation=true its calls would be made twice. Start the session "
            "without speculation, or run with engine='local'."
        )
    parted = {name: value for name, value in work.context.items() if hasattr(type(value), "divided")}
    if not parted and work.journal is None:
        return work
    at_once = most = min(parallelism(session), tasks or sys.maxsize)
    if pays:
        most = min([at_once, *(getattr(value, "concurrency", at_once) for value in parted.values())])
    own = {name: value.divided(most, one_host=_on_one_host(session)) for name, value in parted.items()}
    journal = work.journal
    if journal is not None and journal.size is not None:
        journal = replace(journal, size=math.ceil(journal.size / most))
    context = {**work.context, **own}
    return replace(work, context=context, journal=journal, tasks=most if most < at_once else None)


def _on_one_host(session: SparkSession) -> bool:
    """Whether all workers are on this machine."""
    return str(session.conf.get("spark.master", "")).startswith("local")
