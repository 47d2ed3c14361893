"""Paid keys that failed for good are not asked again by workers, whichever way their keys travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import BuildError, ServiceError
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import CountingLLM
from tests.shop import ProductIds
from tests.spark.test_accounting import ABT, TITLES, Asking, Reply

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("collect_mb", [256, 0], ids=["chunks", "tables"])
def test_what_failed_for_good_is_asked_once(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    failures = {"chair": BuildError("the model refused"), "desk": ServiceError("down")}

    def run(name: str, failing: tuple[str, ...], retry: Any = None, budget: Budget | None = None) -> Any:
        llm = CountingLLM(
            log=tmp_path / name, failures={title: failures[title] for title in failing}, usd_per_call=0.25
        )
        session = Session(
            Asking(llm),
            cache,
            spark=spark,
            limits=Limits(in_process_keys=0, batch_rows=2, partitions=2, collect_mb=collect_mb),
        )
        result = session.run(Reply.over(ProductIds), retry_errors=retry, budget=budget, **ABT)
        made = result.builders["Asked"]
        told = (made.error, made.retryable, made.terminal, made.remembered, made.calls)
        result.execution.close()
        return sorted(llm.calls), told, made.usd

    assert run("first", ("chair", "desk")) == (sorted(TITLES), (2, 1, 1, 0, 6), 1.0)
    assert run("second", ("desk",)) == (["desk"], (2, 1, 1, 1, 1), 0.0)
    replies = cache.history("Reply").num_rows
    assert run("third", ("desk",)) == (["desk"], (2, 1, 1, 1, 1), 0.0)
    assert cache.history("Reply").num_rows == replies + 1  # of the desk, and none of the chair
    if collect_mb:  # what is remembered needs no call, also where nothing may be paid
        assert run("fourth", (), budget=Budget(max_calls=1)) == (["desk"], (1, 0, 1, 1, 1), 0.25)
        assert run("fifth", (), budget=Budget(max_calls=0))[:2] == ([], (1, 0, 1, 1, 0))
    else:
        assert run("fourth", ()) == (["desk"], (1, 0, 1, 1, 1), 0.25)
    assert run("sixth", (), "terminal") == (["chair"], (0, 0, 0, 0, 1), 0.25)
