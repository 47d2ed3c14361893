"""Limiters of a process and of a machine: paces, pauses, corrections, damage."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.errors import ConfigError, UsageError
from featurekit_spark.paid.host_limits import HostLimiter, limits_folder
from featurekit_spark.paid.limits import LocalLimiter, RateLimiter, Rates
from featurekit_spark.testing.virtual import virtual_run


@pytest.fixture(params=["local", "host"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A limiter by the running loop's clock."""

    def made(rates: Rates) -> RateLimiter:
        now = asyncio.get_running_loop().time
        if request.param == "local":
            return LocalLimiter(rates, now)
        return HostLimiter(str(tmp_path / "limits"), "m", rates, now)

    return made


async def granted(limiter: RateLimiter, calls: int, tokens: int = 0) -> list[float]:
    """When each of so many simultaneous calls was let go."""
    times: list[float] = []

    async def one() -> None:
        await limiter.acquire(1, tokens)
        times.append(asyncio.get_running_loop().time())

    await asyncio.gather(*(one() for _ in range(calls)))
    return times


def test_requests_are_paced(make: Any) -> None:
    times = virtual_run(_granted(make, Rates(requests_per_minute=600), 110))
    assert times[:10] == [0.0] * 9 + [pytest.approx(times[9])]
    assert times[-1] == pytest.approx(100 / 9.7, rel=0.02)  # a little below 10 per second
    assert times == sorted(times)


def test_tokens_are_paced_and_a_large_request_waits_for_all_of_its_own(make: Any) -> None:
    times = virtual_run(_granted(make, Rates(tokens_per_minute=6000), 5, tokens=1000))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == pytest.approx([1000 / 97] * 4)


def test_a_correction_counts(make: Any) -> None:
    async def main() -> float:
        limiter = make(Rates(tokens_per_minute=6000))
        await limiter.acquire(1, 970)
        await limiter.correct(-873)
        await limiter.acquire(1, 97)
        return asyncio.get_running_loop().time()

    assert virtual_run(main()) == pytest.approx(1.0)


def test_a_pause_holds_everybody_and_does_not_end_in_a_burst(make: Any) -> None:
    async def main() -> list[float]:
        limiter = make(Rates(requests_per_minute=600))
        await limiter.pause(30)
        await limiter.pause(3)  # does not shorten it
        return await granted(limiter, 5)

    times = virtual_run(main())
    assert times == pytest.approx([30 + i / 9.7 for i in range(1, 6)])


def test_a_pause_catches_those_who_wait_already(make: Any) -> None:
    async def main() -> list[float]:
        limiter = make(Rates(requests_per_minute=60))
        waiting = asyncio.ensure_future(granted(limiter, 4))
        await asyncio.sleep(0.5)
        await limiter.pause(60)
        return await waiting

    times = virtual_run(main())
    assert times[0] == 0 and times[1] > 60.5


def test_without_rates_only_pauses_hold(make: Any) -> None:
    async def main() -> list[float]:
        limiter = make(Rates())
        first = await granted(limiter, 1000, tokens=10_000)
        await limiter.pause(2)
        return [max(first), *await granted(limiter, 1)]

    assert virtual_run(main()) == [0, 2]


def test_shares(tmp_path: Path) -> None:
    rates = Rates(600, 1000)
    assert LocalLimiter(rates).divided(4) == LocalLimiter(Rates(150, 250))
    host = HostLimiter(str(tmp_path), "m", rates)
    assert host.divided(4, one_host=True) is host
    assert host.divided(4) == LocalLimiter(Rates(150, 250))
    assert LocalLimiter().divided(4) == LocalLimiter()
    with pytest.raises(UsageError, match="at least 1"):
        rates.divided(0)


def test_what_travels_is_the_same_limit(tmp_path: Path) -> None:
    for limiter in (LocalLimiter(Rates(600)), HostLimiter(str(tmp_path), "m", Rates(600))):
        again = pickle.loads(pickle.dumps(limiter))
        assert again == limiter and hash(again) == hash(limiter)


@pytest.mark.parametrize("wrong", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"burst_s": -1}])
def test_rates_that_allow_nothing(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Rates(**wrong)


@pytest.mark.parametrize("junk", [b"", b"x", b"junk" * 10, b"fklimit1" + b"\xff" * 32, b"\0" * 4096])
def test_a_damaged_file_is_begun_anew_without_a_burst(tmp_path: Path, junk: bytes) -> None:
    limiter = HostLimiter(str(tmp_path), "m", Rates(600))
    limiter.path.write_bytes(junk)

    async def main() -> None:
        await limiter.acquire()

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 5
    assert limiter.path.stat().st_size == 40


def test_the_file_is_the_users_own(tmp_path: Path) -> None:
    limiter = HostLimiter(str(tmp_path / "a" / "b"), "m", Rates(600))
    asyncio.run(limiter.acquire())
    assert limiter.path.parent.stat().st_mode & 0o77 == 0
    assert str(os.getuid()) in limits_folder()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    limiter.path.unlink()
    limiter.path.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="cannot be used"):
        asyncio.run(limiter.acquire())
    assert elsewhere.read_bytes() == b"mine"


def test_a_killed_process_takes_nothing_with_it_but_its_turn(tmp_path: Path) -> None:
    limiter = HostLimiter(str(tmp_path), "m", Rates(6000))
    code = (
        "import asyncio, sys\n"
        "from featurekit_spark.paid.host_limits import HostLimiter\n"
        "from featurekit_spark.paid.limits import Rates\n"
        "async def main():\n"
        "    limiter = HostLimiter(sys.argv[1], 'm', Rates(6000))\n"
        "    await asyncio.gather(*(limiter.acquire() for _ in range(20)))\n"
        "    print('up', flush=True)\n"
        "    while True:\n"
        "        await limiter.acquire()\n"
        "asyncio.run(main())\n"
    )
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    asyncio.run(limiter.acquire())
    assert time.monotonic() - started < 1


def test_a_stopped_process_stops_no_other_work(tmp_path: Path) -> None:
    """Who holds the lock may be stopped; whoever waits for it waits without blocking the loop."""
    import fcntl

    limiter = HostLimiter(str(tmp_path), "m", Rates(600))

    async def main() -> None:
        await limiter.acquire()
        file = os.open(limiter.path, os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = asyncio.ensure_future(limiter.acquire())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        os.close(file)
        await waiting

    asyncio.run(main())


async def _granted(make: Any, rates: Rates, calls: int, tokens: int = 0) -> list[float]:
    return await granted(make(rates), calls, tokens)
