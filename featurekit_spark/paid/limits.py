"""Rate limits: who may call when. The arithmetic, and the limiter of one process.

Owns requests and tokens per minute, and the pause that a server asked for. It must not know what is called, nor why
a call is made again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

from featurekit_spark.errors import UsageError

__all__ = ["LocalLimiter", "RateLimiter", "Rates", "Timetable", "Turn", "wait_for_turn"]

# A limiter aims a little below its limit: what leaves here evenly arrives there in small clusters.
_AIM = 0.97


@runtime_checkable
class RateLimiter(Protocol):
    """Grants calls at a rate. Waiting is in order of asking, and nobody polls."""

    async def acquire(self, requests: int = 1, tokens: int = 0) -> None:
        """Return when so many requests and tokens (an estimate) may be sent."""
        ...

    async def correct(self, tokens: int) -> None:
        """Tokens used beyond the estimate, once that is known; negative where the estimate was too high."""
        ...

    async def pause(self, seconds: float) -> None:
        """Grant nothing for so long, to nobody who shares the limiter: a server asked for it."""
        ...

    def divided(self, n: int, *, one_host: bool = False) -> RateLimiter:
        """The limiter of each of `n` tasks; `one_host` where all of them run on this machine."""
        ...

    async def aclose(self) -> None:
        """Close what the running loop opened."""
        ...


@dataclass(frozen=True)
class Rates:
    """Requests and tokens per minute, None for no limit. After idle time `burst_s` seconds' worth may go at once."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    burst_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive (None for no limit), found {value!r}")
        if not self.burst_s >= 0:
            raise UsageError(f"burst_s must not be negative, found {self.burst_s!r}")

    @cached_property
    def per_second(self) -> tuple[float, float]:
        """Requests and tokens per second that are aimed at; 0 for no limit."""
        limits = (self.requests_per_minute, self.tokens_per_minute)
        return tuple(0.0 if limit is None else limit * _AIM / 60 for limit in limits)  # type: ignore[return-value]

    @cached_property
    def bursts(self) -> tuple[float, float]:
        """Requests and tokens that may go at once after idle time."""
        requests, tokens = self.per_second
        return max(1.0, requests * self.burst_s), tokens * self.burst_s

    def divided(self, n: int) -> Rates:
        if n < 1:
            raise UsageError(f"a limit is divided by at least 1, found {n!r}")
        requests, tokens = self.requests_per_minute, self.tokens_per_minute
        return replace(
            self,
            requests_per_minute=None if requests is None else requests / n,
            tokens_per_minute=None if tokens is None else tokens / n,
        )


@dataclass(frozen=True)
class Timetable:
    """The state of a limiter, all in seconds of one clock: the turn given last, when all requests and all tokens given
    so far are paid off at their rates, and when a pause ends.

    Turns never go back, whatever the clock does. In any T seconds at most rate * T + burst is granted (or one larger
    request): the generic cell rate algorithm, with turns given ahead of time instead of refused.
    """

    turn: float = 0.0
    requests: float = 0.0
    tokens: float = 0.0
    resume: float = 0.0

    def next(self, rates: Rates, now: float, requests: float, tokens: float) -> Timetable:
        """The timetable with one more turn, its `turn`."""
        turn = max(now, self.turn, self.resume)
        paid_off = [self.requests, self.tokens]
        asked = (requests, tokens)
        for i, (rate, burst) in enumerate(zip(rates.per_second, rates.bursts, strict=True)):
            if rate and asked[i]:
                turn = max(turn, paid_off[i] - max(0.0, burst - asked[i]) / rate)
        for i, rate in enumerate(rates.per_second):
            if rate and asked[i]:
                paid_off[i] = max(paid_off[i], turn) + asked[i] / rate
        return Timetable(turn, paid_off[0], paid_off[1], self.resume)

    def corrected(self, rates: Rates, tokens: float) -> Timetable:
        """With tokens that were used beyond what was asked for."""
        rate = rates.per_second[1]
        return replace(self, tokens=self.tokens + tokens / rate) if rate else self

    def paused(self, rates: Rates, now: float, seconds: float) -> Timetable:
        """With a pause, after which nothing may go at once: everybody waits for its end."""
        resume = now + seconds
        if resume <= self.resume:
            return self
        pairs = zip(rates.per_second, rates.bursts, strict=True)
        requests, tokens = (resume + burst / rate if rate else 0.0 for rate, burst in pairs)
        return replace(
            self, requests=max(self.requests, requests), tokens=max(self.tokens, tokens), resume=resume
        )


@dataclass(frozen=True)
class Turn:
    """When a call may go, by the limiter's clock, and in how many seconds."""

    at: float
    wait_s: float


async def wait_for_turn(
    take: Callable[[], Awaitable[Turn]],
    resume: Callable[[], Awaitable[float]],
    sleep: Callable[[float], Awaitable[None]],
) -> None:
    """Take a turn and wait for it; one that a pause fell upon is given up for another."""
    while True:
        turn = await take()
        if turn.wait_s <= 0:
            return
        await sleep(turn.wait_s)
        if await resume() <= turn.at:
            return


@dataclass
class _Kept:
    timetable: Timetable = field(default_factory=lambda: Timetable())


@dataclass(frozen=True)
class LocalLimiter:
    """Shared by the calls of one process; a copy that travels starts afresh. Without rates it only pauses."""

    rates: Rates = field(default_factory=Rates)
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _kept: _Kept = field(default_factory=_Kept, compare=False, repr=False)

    async def acquire(self, requests: int = 1, tokens: int = 0) -> None:
        async def take() -> Turn:
            now = self.now()
            self._kept.timetable = self._kept.timetable.next(self.rates, now, requests, tokens)
            return Turn(self._kept.timetable.turn, self._kept.timetable.turn - now)

        async def resume() -> float:
            return self._kept.timetable.resume

        await wait_for_turn(take, resume, self.sleep)

    async def correct(self, tokens: int) -> None:
        self._kept.timetable = self._kept.timetable.corrected(self.rates, tokens)

    async def pause(self, seconds: float) -> None:
        self._kept.timetable = self._kept.timetable.paused(self.rates, self.now(), seconds)

    def divided(self, n: int, *, one_host: bool = False) -> LocalLimiter:
        return LocalLimiter(self.rates.divided(n), self.now, self.sleep)

    async def aclose(self) -> None:
        """Nothing was opened."""
