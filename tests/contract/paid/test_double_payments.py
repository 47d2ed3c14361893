"""Two runs that pay for the same prompts without knowing of each other: counted once, by the later one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.errors import BudgetReachedError
from featurekit_spark.freshness import Freshness
from featurekit_spark.session import RunResult, Session
from featurekit_spark.testing.fakes import MovingClock

PROMPTS = 12


@dataclass
class World:
    """`begun` is set by the first call; every call waits for `go`."""

    begun: threading.Event
    go: threading.Event
    clock: Callable[[], datetime]
    usd: float | None = 0.25

    def __reduce__(self) -> Any:
        raise TypeError("it stays here")


class Ids(KeySet):
    key, of, value, version = ("shop",), "id", pa.list_(pa.string()), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"p{i}" for i in range(PROMPTS)]


class Name(Source[str]):
    key, value, version = ("shop", "id"), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["id"])


class Ask(FeatureBuilder[str]):
    key, value, needs, paid = ("prompt",), pa.string(), ("begun", "go", "usd"), True
    version = "1"
    freshness = Freshness(ttl="1d")

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        context.begun.set()
        while not context.go.is_set():
            await asyncio.sleep(0.01)
        return Metered(inputs["prompt"].upper(), tokens=2, usd=context.usd)


class Use(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Ask.on(prompt=Name),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"])


def world(**options: Any) -> World:
    made = World(threading.Event(), threading.Event(), MovingClock(), **options)
    made.go.set()
    return made


def run(cache: FeatureCache, context: World, **options: Any) -> RunResult:
    return Session(context, cache, engine="local").run(Use.over(Ids), shop="a", **options)


def record(cache: FeatureCache, run_id: str) -> dict[str, Any]:
    (found,) = (run.record for run in cache.runs('["a"]') if run.run_id == run_id)
    return dict(found)


@pytest.fixture(params=["delta", "memory"])
def cache(request: Any, tmp_path: Path) -> FeatureCache:
    return DeltaCache(str(tmp_path / "cache")) if request.param == "delta" else MemoryCache()


def overlapping(cache: FeatureCache, first: World, **options: Any) -> tuple[RunResult, RunResult]:
    """A run that begins to pay, waits until another one is over, and ends; that other one."""
    first.go.clear()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(run, cache, first, run_id="slow", **options)
        try:
            assert first.begun.wait(30)
            quick = run(cache, world(usd=first.usd), run_id="quick")
        finally:
            first.go.set()
        return slow.result(60), quick


def test_the_later_one_counts(cache: FeatureCache) -> None:
    slow, quick = overlapping(cache, world())
    assert (slow.builders["Ask"].calls, quick.builders["Ask"].calls) == (PROMPTS, PROMPTS)
    assert quick.paid_twice == PaidTwice() and not quick.warnings
    assert slow.paid_twice == PaidTwice(PROMPTS, 2 * PROMPTS, 0.25 * PROMPTS)
    assert "12 calls were paid for twice (24 tokens, 3 usd)" in " ".join(slow.warnings)
    assert record(cache, "slow")["paid_twice"] == {"calls": 12, "tokens": 24, "usd": 3.0}
    assert record(cache, "quick")["paid_twice"] == {"calls": 0, "tokens": 0, "usd": 0.0}
    assert slow.values(Use) == quick.values(Use)


def test_without_a_price(cache: FeatureCache) -> None:
    slow, _ = overlapping(cache, world(usd=None))
    assert slow.paid_twice == PaidTwice(PROMPTS, 2 * PROMPTS, None)
    assert "a price that nobody knows" in " ".join(slow.warnings)


def test_a_run_that_stopped_at_its_budget_tells_too(cache: FeatureCache) -> None:
    with pytest.raises(BudgetReachedError):
        overlapping(cache, world(), budget=Budget(max_calls=5))
    assert record(cache, "slow")["paid_twice"] == {"calls": 5, "tokens": 10, "usd": 1.25}


def test_asked_again_after_its_ttl_is_no_double_payment(cache: FeatureCache) -> None:
    here = world()
    assert isinstance(here.clock, MovingClock)
    run(cache, here)
    here.clock.advance(days=2)
    again = run(cache, here)
    assert again.builders["Ask"].calls == PROMPTS
    assert again.paid_twice == PaidTwice()


def test_what_a_dead_run_had_paid_for(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    run(cache, world(), run_id="quick")
    rows = cache.history("Ask")
    names = [name for name in rows.column_names if name not in ("recorded", "run_id")]
    journal = cache.journal("dead", size=4)
    assert journal is not None
    journal.begin()
    left = rows.select(names).slice(0, 5).append_column("run_id", pa.array(["dead"] * 5))
    journal.add(left.append_column("recorded", pa.array([0] * 5, pa.int64())))
    # What the cache got of the run itself before it died is one payment.
    own = cache.journal("quick", size=4)
    assert own is not None
    own.begin()
    own.add(rows.slice(5))

    class Other(Use):
        """Another target, so that the next run has something to do."""

        name = "Other"

    result = Session(world(), cache, engine="local").run(Other.over(Ids), shop="a")
    assert result.builders["Ask"].calls == 0
    assert result.paid_twice == PaidTwice(5, 10, 1.25)
    assert len(cache.history("Ask")) == PROMPTS, "none of them is an entry twice"
    again = Session(world(), cache, engine="local").run(Other.over(Ids), shop="a")
    assert again.paid_twice == PaidTwice()


def test_sums() -> None:
    assert PaidTwice(1, 2, 0.5) + PaidTwice(2, 3, 0.25) == PaidTwice(3, 5, 0.75)
    assert (PaidTwice(1, 2, None) + PaidTwice(1, 1, 1.0)).usd is None
    assert PaidTwice().told() == []
