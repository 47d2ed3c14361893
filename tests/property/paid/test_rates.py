"""No limiter ever grants more than its rate, whoever asks when, by whatever clock."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import LocalLimiter, RateLimiter, Rates, Timetable
from featurekit_spark.testing.virtual import virtual_run

_SLACK = 1e-6

RATES = st.builds(
    Rates,
    st.none() | st.floats(1, 100_000),
    st.none() | st.floats(10, 10_000_000),
    st.floats(0, 5),
)


@dataclass(frozen=True)
class Grant:
    at: float
    requests: float
    tokens: float


def bounded(grants: list[Grant], rates: Rates) -> None:
    """In every window between two grants at most rate * time + burst, or the largest request where that is more."""
    grants = sorted(grants, key=lambda grant: grant.at)
    for limit, burst, of in zip(
        (rates.requests_per_minute, rates.tokens_per_minute),
        rates.bursts,
        (lambda g: g.requests, lambda g: g.tokens),
        strict=True,
    ):
        if limit is None:
            continue
        most = max([burst, *map(of, grants)])
        for first in range(len(grants)):
            total = 0.0
            for last in range(first, len(grants)):
                total += of(grants[last])
                allowed = limit / 60 * (grants[last].at - grants[first].at) + most
                assert total <= allowed * (1 + _SLACK) + _SLACK


@given(
    RATES,
    st.lists(
        st.tuples(
            st.floats(-50, 50),  # how far the clock went: not all of them only go forward
            st.integers(1, 5),
            st.integers(0, 5000),
            st.none() | st.floats(0, 20),
        ),
        max_size=40,
    ),
)
def test_turns_keep_the_rate_whatever_the_clock_does(
    rates: Rates, asked: list[tuple[float, int, int, float | None]]
) -> None:
    timetable, now, grants = Timetable(), 100.0, []
    for step, requests, tokens, pause in asked:
        now = max(0.0, now + step)
        if pause is not None:
            timetable = timetable.paused(rates, now, pause)
        before = timetable
        timetable = timetable.next(rates, now, requests, tokens)
        assert timetable.turn >= max(now, before.turn, before.resume)
        grants.append(Grant(timetable.turn, requests, tokens))
    bounded(grants, rates)


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 30), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2000)), max_size=40
)
PAUSES = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 10)), max_size=3)


async def _grants(
    limiters: list[RateLimiter],
    arrivals: list[tuple[float, int, int, int]],
    pauses: list[tuple[float, float]],
) -> list[Grant]:
    grants: list[Grant] = []
    loop = asyncio.get_running_loop()

    async def call(at: float, process: int, requests: int, tokens: int) -> None:
        await asyncio.sleep(at)
        await limiters[process % len(limiters)].acquire(requests, tokens)
        grants.append(Grant(loop.time(), requests, tokens))

    async def pause(at: float, seconds: float) -> None:
        await asyncio.sleep(at)
        await limiters[0].pause(seconds)

    await asyncio.gather(*(call(*arrival) for arrival in arrivals), *(pause(*one) for one in pauses))
    for at, seconds in pauses:  # nobody is let go within a pause
        assert not [grant for grant in grants if at < grant.at < at + seconds - _SLACK]
    assert len(grants) == len(arrivals)
    return grants


@given(RATES, ARRIVALS, PAUSES)
def test_a_process_keeps_the_rate(
    rates: Rates, arrivals: list[tuple[float, int, int, int]], pauses: list[tuple[float, float]]
) -> None:
    async def main() -> list[Grant]:
        return await _grants([LocalLimiter(rates, asyncio.get_running_loop().time)], arrivals, pauses)

    bounded(virtual_run(main()), rates)


@given(RATES, ARRIVALS, PAUSES)
def test_processes_of_a_machine_keep_the_rate_together(
    rates: Rates, arrivals: list[tuple[float, int, int, int]], pauses: list[tuple[float, float]]
) -> None:
    def limiter(folder: str) -> Callable[[], RateLimiter]:
        return lambda: HostLimiter(folder, "m", rates, asyncio.get_running_loop().time)

    async def main(folder: str) -> list[Grant]:
        return await _grants([limiter(folder)() for _ in range(4)], arrivals, pauses)

    with tempfile.TemporaryDirectory() as folder:
        bounded(virtual_run(main(folder)), rates)


@given(st.floats(10, 10_000), st.lists(st.integers(-500, 500), max_size=20), st.floats(0, 100))
def test_corrections_move_later_turns_by_just_as_much(limit: float, by: list[int], now: float) -> None:
    rates = Rates(tokens_per_minute=limit, burst_s=0)
    timetable = Timetable().next(rates, now, 1, 1000)
    for tokens in by:
        timetable = timetable.corrected(rates, tokens)
    after = timetable.next(rates, now, 1, 1)
    expected = max(now, now + (1000 + sum(by)) / rates.per_second[1])
    assert abs(after.turn - expected) < 1e-6 * max(1.0, expected)
