"""A limit shared by several processes, by file and by Redis, in real time."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import RateLimiter, Rates
from featurekit_spark.paid.redis_limits import RedisLimiter

PROCESS = """
import asyncio, json, pickle, sys, time
limiter = pickle.loads(bytes.fromhex(sys.argv[1]))
until, at_once = float(sys.argv[2]), int(sys.argv[3])
times = []
async def caller():
    while True:
        await limiter.acquire()
        if time.monotonic() >= until:
            return
        times.append(time.monotonic())
async def main():
    try:
        await asyncio.gather(*(caller() for _ in range(at_once)))
    finally:
        await limiter.aclose()
asyncio.run(main())
print(json.dumps(times))
"""


@pytest.fixture(params=["host", pytest.param("redis", marks=pytest.mark.redis)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Rates], RateLimiter]:
    """A limiter that another process can share; each its own name."""
    if request.param == "host":
        return lambda rates: HostLimiter(str(tmp_path), "m", rates)
    url = request.getfixturevalue("redis_url")
    name = uuid.uuid4().hex
    return lambda rates: RedisLimiter(url, name, rates)


def run(limiter: RateLimiter, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await work()
        finally:
            await limiter.aclose()

    return asyncio.run(main())


def test_four_processes_share_one_rate_fairly(make: Callable[[Rates], RateLimiter]) -> None:
    rates = Rates(requests_per_minute=3000)  # 48.5 per second
    start, seconds = time.monotonic() + 1.5, 4.0
    command = [sys.executable, "-c", PROCESS, pickle.dumps(make(rates)).hex(), str(start + seconds), "4"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    times = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    steady = [[at for at in own if at >= start] for own in times]
    total = sum(map(len, steady))
    assert 0.9 * 50 * seconds <= total <= 50 * seconds + max(rates.bursts)
    assert min(map(len, steady)) >= 0.5 * total / 4
    together = sorted(at for own in times for at in own)
    for first in range(0, len(together), 10):  # 0.1 s for those who were woken late
        for last in range(first, len(together), 10):
            allowed = 50 * (together[last] - together[first] + 0.1) + rates.bursts[0]
            assert last - first <= allowed


def test_one_is_paused_by_another(make: Callable[[Rates], RateLimiter]) -> None:
    one, other = make(Rates(6000)), make(Rates(6000))

    async def work() -> float:
        start = time.monotonic()
        await one.acquire()
        await one.pause(0.5)
        await other.acquire()
        await other.aclose()
        return time.monotonic() - start

    assert 0.5 <= run(one, work) < 1.5


def test_tokens_are_shared_and_corrected(make: Callable[[Rates], RateLimiter]) -> None:
    one, other = make(Rates(tokens_per_minute=6000)), make(Rates(tokens_per_minute=6000))

    async def work() -> tuple[float, float]:
        start = time.monotonic()
        await one.acquire(1, 2000)
        await one.correct(-1950)
        await other.acquire(1, 50)
        quick = time.monotonic() - start
        await other.correct(50)
        await one.acquire(1, 20)
        await other.aclose()
        return quick, time.monotonic() - start

    quick, whole = run(one, work)
    assert quick < 1.0
    assert whole < 3.0


@pytest.mark.redis
class TestRedis:
    def test_it_is_the_same_for_every_task(self, redis_url: str) -> None:
        limiter = RedisLimiter(redis_url, "m", Rates(600))
        assert limiter.divided(8) is limiter
        assert redis_url not in repr(limiter)

    def test_the_arithmetic_is_that_of_the_other_limiters(self, redis_url: str) -> None:
        """By the server's clock, so that differences of turns are compared."""
        rates = Rates(600, 6000)
        limiter = RedisLimiter(redis_url, uuid.uuid4().hex, rates)

        async def work() -> list[float]:
            return [(await limiter._asked("turn", 1, tokens))[0] for tokens in (0, 500, 0, 30, 500)]

        turns = run(limiter, work)
        waits = [after - before for before, after in itertools.pairwise(turns)]
        # (burst 97 - 30) tokens and then all 97 have to be paid off, at 97 per second
        assert waits[2] == pytest.approx((500 - (97 - 30)) / 97, abs=0.05)
        assert waits[3] == pytest.approx((97 - 30 + 30) / 97, abs=0.05)

    def test_what_is_kept_there_goes_away_by_itself(self, redis_url: str) -> None:
        import redis

        name = uuid.uuid4().hex
        limiter = RedisLimiter(redis_url, name, Rates(600))
        run(limiter, limiter.acquire)
        with redis.Redis.from_url(redis_url) as client:
            assert 0 < client.ttl(f"featurekit/limit/{name}") <= 120

    def test_a_server_that_is_not_there(self) -> None:
        limiter = RedisLimiter("redis://127.0.0.1:9/0", "m", Rates(600))
        with pytest.raises(ServiceError, match=r"127.0.0.1:9 cannot be asked"):
            run(limiter, limiter.acquire)
        with pytest.raises(ConfigError, match="redis://:password@host:6379/0"):
            RedisLimiter("http://x", "m", Rates(600))
