"""What one run is refused, no other that goes on at the same time pays to be told."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.elsewhere import Elsewhere
from featurekit_spark.errors import BuildError, ServiceError
from featurekit_spark.flight import Leases, Refusal, SingleFlight
from featurekit_spark.paid.leases import LocalLeases
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import MovingClock

PROMPTS, AT_ONCE = 120, 4


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
def shared(request: Any) -> Iterator[Any]:
    made = RedisLeases(request.getfixturevalue("redis_url")) if request.param == "redis" else LocalLeases()
    yield made
    if isinstance(made, RedisLeases):
        aio.run(made.aclose())


@dataclass
class World:
    """`asked` counts calls; each takes `delay_s`."""

    delay_s: float = 0.01
    clock: Callable[[], datetime] = field(default_factory=MovingClock)
    asked: Counter[str] = field(default_factory=Counter)


class Ids(KeySet):
    key, of, value, version = ("shop",), "id", pa.list_(pa.string()), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"p{i}" for i in range(3 * PROMPTS)]


class Name(Source[str]):
    key, value, version = ("shop", "id"), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"prompt {int(inputs['id'][1:]) % PROMPTS}"


class Refusing(FeatureBuilder[str]):
    """Every third prompt is refused, and every seventh fails for now."""

    key, value, needs, paid = ("prompt",), pa.string(), ("asked", "delay_s"), True
    version = "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        number = int(inputs["prompt"].split()[1])
        context.asked[inputs["prompt"]] += 1
        await asyncio.sleep(context.delay_s)
        if number % 3 == 0:
            raise BuildError("the model refused").with_cost(2, 0.25)
        if number % 7 == 0:
            raise ServiceError("busy")
        return Metered(inputs["prompt"].upper(), tokens=2, usd=0.25)


class UseRefusing(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Refusing.on(prompt=Name),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Refusing"])


REFUSED = {f"prompt {i}" for i in range(0, PROMPTS, 3)}
BUSY = {f"prompt {i}" for i in range(0, PROMPTS, 7)} - REFUSED


def run_refusing(
    cache: DeltaCache, world: World, shop: str, leases: Leases | None, run_id: str, **options: Any
) -> RunResult:
    session = Session(world, cache, engine="local", limits=Limits(micro_batch=AT_ONCE), leases=leases)
    return session.run(UseRefusing.over(Ids), run_id=run_id, shop=shop, **options)


def test_what_one_run_is_refused_no_other_asks(shared: Any, tmp_path: Path) -> None:
    cache, one, other = DeltaCache(str(tmp_path / "c")), World(), World()
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(run_refusing, cache, world, shop, shared, f"run-{shop}")
            for world, shop in ((one, "a"), (other, "b"))
        ]
        results = [done.result(120) for done in runs]
    asked = one.asked + other.asked
    assert {prompt: count for prompt, count in asked.items() if count > 1}.keys() <= BUSY
    assert asked.keys() == {f"prompt {i}" for i in range(PROMPTS)}
    counts = [result.builders["Refusing"] for result in results]
    assert sum(count.calls for count in counts) == sum(asked.values())
    assert sum(count.usd for count in counts) == 0.25 * (PROMPTS - len(BUSY))
    for result, count in zip(results, counts, strict=True):
        assert result.status == "partial" and count.error == len(REFUSED | BUSY)
        refused = [
            error for error in result.errors.values() if "[terminal, 1 attempt] the model ref" in error
        ]
        assert len(refused) == 3 * len(REFUSED)
        assert all(error.startswith('Refusing["prompt ') for error in refused)
    assert sum(count.remembered for count in counts) == len(REFUSED), "each of them in one run"
    stored = cache.history("Refusing").to_pylist()
    assert len([row for row in stored if "terminal" in (row["error"] or "")]) == len(REFUSED)


def test_what_was_refused_is_asked_again_on_demand(shared: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "c"))
    run_refusing(cache, World(), "a", shared, "first")
    for asks_again, run_id in ((None, "second"), ("terminal", "third")):
        world = World()
        run_refusing(cache, world, "a", shared, run_id, retry_errors=asks_again)
        assert set(world.asked) == (BUSY if asks_again is None else BUSY | REFUSED)


def test_a_refusal_that_was_forgotten_does_not_stand(shared: Any, tmp_path: Path) -> None:
    """Another cache in the same place, say: what the server of leases tells is older than the run."""
    cache = DeltaCache(str(tmp_path / "c"))
    run_refusing(cache, World(), "a", shared, "first")
    shutil.rmtree(tmp_path / "c")
    world = World()
    run_refusing(DeltaCache(str(tmp_path / "c")), world, "a", shared, "second")
    assert set(world.asked) >= REFUSED


def test_a_refusal_of_a_run_that_goes_on_stands(tmp_path: Path) -> None:
    cache, folder = DeltaCache(str(tmp_path / "c")), tmp_path / "c" / "journal"
    shared = LocalLeases(wall=lambda: 50.0)
    single = SingleFlight(shared, Elsewhere(cache.journals, cache), "here", "mine", began=100.0)

    async def taken(owner: str, *, refusals: bool = True) -> Any:
        assert await shared.take(f"here/{owner}", owner) is None
        await shared.end(f"here/{owner}", owner, answered=False, refused="why")
        flight = single.of("Refusing", [owner], lambda entry: True, refusals=refusals)
        found = await flight.take(0)
        await flight.end(0, answered=False)
        await flight.close()
        return found

    (folder / "other").mkdir(parents=True)
    (folder / "other" / "begun.arrow").touch()
    assert aio.run(taken("other/1")) == Refusal("other/1", 50.0, "why")
    assert aio.run(taken("other/2", refusals=False)) is None, "it is to be asked again"
    assert aio.run(taken("over/1")) is None, "its run has ended, and the cache does not tell of it"
    (folder / "mine").mkdir()
    (folder / "mine" / "begun.arrow").touch()
    assert aio.run(taken("mine/1")) is None, "an attempt of the same task, which died"
