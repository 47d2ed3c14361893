"""What every part of one run shares: bindings, context, cache, the run's clock and name. Holds, does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.budget import Purse
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.journal import Journal
from featurekit_spark.double_payments import DoublePayments
from featurekit_spark.failures import Failures
from featurekit_spark.flight import SingleFlight

__all__ = ["Job", "Progress"]

Progress = Callable[[str, int, int], None]
"""(what, done, of how many keys), called as a run advances."""


@dataclass(frozen=True)
class Job:
    """What every stage of one run shares."""

    bindings: Bindings
    context: Any
    cache: FeatureCache
    now: datetime
    run_id: str
    batch_rows: int
    progress: Progress = field(default=lambda what, done, total: None)
    purse: Purse | None = None
    journal: Journal | None = None
    failures: Failures | None = None
    double: DoublePayments | None = None
    flight: SingleFlight | None = None
