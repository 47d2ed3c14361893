"""A Redis that stops answering in the middle costs a run seconds, not a timeout for each of its keys."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, KeySet, Metered
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import ServiceError
from featurekit_spark.paid.limits import Rates
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.paid.redis_limits import RedisLimiter
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import MovingClock
from featurekit_spark.testing.redis import redis_server

pytestmark = pytest.mark.redis

PROMPTS, AT_ONCE, TIMEOUT_S = 1000, 4, 0.5


@dataclass(frozen=True)
class Stoppable:
    """A server of its own, which `stop` holds still: it takes connections, and says nothing."""

    url: str
    pid: int

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def server() -> Iterator[Stoppable]:
    with redis_server() as url:
        with redis.Redis.from_url(url) as client:
            found = Stoppable(url, client.info("server")["process_id"])
        try:
            yield found
        finally:
            found.go_on()


@dataclass
class World:
    clock: Callable[[], datetime] = field(default_factory=MovingClock)
    asked: Counter[str] = field(default_factory=Counter)
    on_call: Callable[[int], None] = lambda number: None


class Prompts(KeySet):
    key, of, value, version = ("shop",), "prompt", pa.list_(pa.string()), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"prompt {i}" for i in range(PROMPTS)]


class Ask(FeatureBuilder[str]):
    key, value, needs, paid, version = ("prompt",), pa.string(), ("asked", "on_call"), True, "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        context.asked[inputs["prompt"]] += 1
        context.on_call(sum(context.asked.values()))
        await asyncio.sleep(0.01)
        return Metered(inputs["prompt"].upper(), tokens=2, usd=0.25)


class Use(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "prompt"), (Ask,), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"])


def run(cache: DeltaCache, world: World, leases: RedisLeases) -> RunResult:
    session = Session(world, cache, engine="local", limits=Limits(micro_batch=AT_ONCE), leases=leases)
    return session.run(Use.over(Prompts), shop="a")


def test_leases(server: Stoppable, tmp_path: Path, caplog: Any) -> None:
    stopped = threading.Event()

    def stop(number: int) -> None:
        if number == 40:
            server.stop()
            stopped.set()

    world, cache = World(on_call=stop), DeltaCache(str(tmp_path))
    leases = RedisLeases(server.url, timeout_s=TIMEOUT_S)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, cache, world, leases)
            assert stopped.wait(60)
            start = time.monotonic()
            result = running.result(120)
            took = time.monotonic() - start
        # One timeout for each of those that may be asked at once would be a minute.
        assert took < 25, f"{took:.1f} s for {PROMPTS - 40} keys"
        rows = cache.history("Ask").to_pylist()
        answers = [row for row in rows if row["status"] == "ok"]
        failed = [row["error"] for row in rows if row["status"] == "error"]
        assert result.status == "partial" and len(answers) == sum(world.asked.values()), "no answer is lost"
        assert len(failed) == PROMPTS - len(answers)
        assert all("[retryable, 0 attempts] leases of paid calls in Redis" in error for error in failed)
        told = Counter(error.split("attempts] ")[1] for error in failed)
        assert len(told) <= 3 and "has answered nothing for 1 s" in told.most_common(1)[0][0], told
        assert caplog.text.count("cannot be kept") == 1
        server.go_on()
        again = World()
        assert run(cache, again, leases).status == "ok", "the next run asks the server anew"
        assert sorted(again.asked) == sorted({f"prompt {i}" for i in range(PROMPTS)} - set(world.asked))
    finally:
        aio.run(leases.aclose())


def test_a_limit(server: Stoppable) -> None:
    limiter = RedisLimiter(server.url, "m", Rates(60_000), timeout_s=TIMEOUT_S)

    async def all_ask() -> tuple[int, float]:
        await limiter.acquire()
        server.stop()
        places, start, failed = asyncio.Semaphore(8), time.monotonic(), 0

        async def one() -> None:
            nonlocal failed
            async with places:
                try:
                    await limiter.acquire()
                except ServiceError:
                    failed += 1

        await asyncio.gather(*(one() for _ in range(500)))
        took = time.monotonic() - start
        await limiter.aclose()
        return failed, took

    failed, took = aio.run(all_ask())
    assert failed == 500 and took < 5


def test_a_pause_of_the_server_is_waited_for(server: Stoppable) -> None:
    """Shorter than a timeout: nobody fails."""
    limiter = RedisLimiter(server.url, "m", Rates(60_000), timeout_s=5.0)

    async def ask() -> None:
        await limiter.acquire()
        server.stop()
        asyncio.get_running_loop().call_later(0.5, server.go_on)
        await asyncio.gather(*(limiter.acquire() for _ in range(20)))
        await limiter.aclose()

    aio.run(ask())


def test_it_is_asked_again_after_a_while(server: Stoppable, monkeypatch: pytest.MonkeyPatch) -> None:
    from featurekit_spark.paid import redis_client

    limiter = RedisLimiter(server.url, "m", Rates(60_000), timeout_s=0.2)
    outage = redis_client._outage(server.url, 0.4)
    outage.pause_s = 0.5

    async def ask() -> None:
        server.stop()
        for _ in range(3):
            with pytest.raises(ServiceError, match="the rate limit in Redis"):
                await limiter.acquire()
        start = time.monotonic()
        with pytest.raises(ServiceError, match="left alone for 0.5 s .at 127.0.0.1:.*Is it running"):
            await limiter.acquire()
        assert time.monotonic() - start < 0.1
        server.go_on()
        await asyncio.sleep(0.6)
        await limiter.acquire()
        await limiter.aclose()

    aio.run(ask())
