"""The one retry layer of paid calls: attempts, deadlines, waits, and a circuit breaker.

Owns when a call is tried again and when calls are not made at all. It must not know what is called: an adapter makes
an attempt and judges its failure.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Generic, TypeVar, assert_never

from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ConfigError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.failures import FailureKind
from featurekit_spark.paid.cost import NOTHING, Cost, cost_of
from featurekit_spark.paid.limits import RateLimiter

__all__ = [
    "Breaker",
    "CallFailure",
    "Called",
    "Clock",
    "FailureKind",
    "RetryPolicy",
    "Sign",
    "failure_of",
    "retry_after",
    "with_retries",
]

T = TypeVar("T")
_QUOTA_S = 5.0  # long enough for the run to end, short for who has paid and runs again


class Sign(Enum):
    """What a failure says of the service: that it works (it refused this request), that it is busy (it may work for
    others), or that it is broken for everybody (down, unreachable, a wrong key)."""

    WORKS = "works"
    BUSY = "busy"
    BROKEN = "broken"


class CallFailure(Exception):
    """A failed attempt, and in the end the call: `attempts` says how many were made. `retry_after_s`: as the server
    asked. `tokens`, `usd`: what the attempt cost all the same, where anybody knows; `estimated_tokens`: how many of
    these the provider did not count."""

    attempts = 0
    tokens: int | None = None
    usd: float | None = None
    estimated_tokens: int = 0

    def __init__(
        self, message: str, kind: FailureKind, sign: Sign, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.kind, self.sign, self.retry_after_s = message, kind, sign, retry_after_s


@dataclass(frozen=True)
class Clock:
    """Where time and chance come from. `now` is monotonic, `wall` is seconds since 1970."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    uniform: Callable[[float, float], float] = random.uniform


@dataclass(frozen=True)
class RetryPolicy:
    """Seconds: `timeout_s` of an attempt, `deadline_s` of a call with all its attempts and waits, but without the time
    it stands in line at our own rate limit. Waits back off from `first_wait_s` to `longest_wait_s`, full jitter."""

    attempts: int = 6
    timeout_s: float = 60.0
    deadline_s: float = 300.0
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.timeout_s, self.deadline_s) <= 0:
            raise UsageError(
                "attempts, timeout_s and deadline_s must be positive, found "
                f"{self.attempts!r}, {self.timeout_s!r}, {self.deadline_s!r}"
            )

    def wait(self, attempts: int, failure: CallFailure, clock: Clock) -> float:
        """Seconds until the next attempt, after so many."""
        # A long row of attempts must not overflow; 2^30 is beyond any longest wait.
        most = min(self.first_wait_s * 2 ** min(attempts - 1, 30), self.longest_wait_s)
        if failure.retry_after_s is None:
            return clock.uniform(0.0, most)
        return failure.retry_after_s + clock.uniform(0.0, min(self.first_wait_s, failure.retry_after_s))


@dataclass(frozen=True)
class Called(Generic[T]):
    """An answer, how many attempts it took, and what those before it cost."""

    value: T
    attempts: int
    lost: Cost = NOTHING


@dataclass
class Breaker:
    """Stops calls to a service that fails for everybody: after `failures` calls in a row without one success, calls
    fail at once for `open_s` seconds; then one is let through, and decides for all.

    Counted are calls that failed in the end, not attempts: a server that is away for seconds breaks nothing. One call
    without quota is enough: those that wait for their turn are not made.
    """

    failures: int = 20
    open_s: float = 30.0
    clock: Clock = field(default_factory=Clock)
    _in_a_row: int = 0
    _open_until: float | None = None
    _probing: bool = False
    _why: str = ""
    _no_quota: bool = False

    def check(self) -> None:
        """ServiceError while calls are not made, BudgetError where that is for want of quota."""
        if self._open_until is None:
            return
        left = self._open_until - self.clock.now()
        if left > 0 or self._probing:
            when = f"in {left:.0f} s" if left > 0 else "when a call that is under way has succeeded"
            unasked = BudgetError if self._no_quota else ServiceError
            hint = (
                "whether there is quota"
                if self._no_quota
                else "whether the service is up and the key is right"
            )
            raise unasked(
                f"not asked, because {self._why}. Calls are made again {when}; what was answered is kept. See {hint}, "
                "then run again."
            )

    def enter(self) -> bool:
        """As `check`; True for the call that probes a service that was given up."""
        self.check()
        self._probing = self._open_until is not None
        return self._probing

    def passed(self) -> None:
        """The service answered."""
        self._in_a_row, self._open_until, self._probing = 0, None, False

    def failed(self, message: str) -> None:
        """A call failed in the end, or the one that probes did."""
        self._in_a_row += 1
        if self._in_a_row >= self.failures:
            self.open(self.open_s, f"{self._in_a_row} calls in a row failed (the last: {message})")

    def open(self, seconds: float, why: str, *, no_quota: bool = False) -> None:
        """Make no calls for so long."""
        self._open_until, self._probing, self._why = self.clock.now() + seconds, False, why
        self._no_quota = no_quota

    def undecided(self) -> None:
        """The call that probes ended without a word on the service; the next one probes."""
        self._probing = False


async def with_retries(
    attempt: Callable[[], Awaitable[T]],
    judge: Callable[[Exception], CallFailure],
    *,
    what: str,
    limiter: RateLimiter,
    breaker: Breaker,
    policy: RetryPolicy,
    clock: Clock,
    tokens: int = 0,
    used: Callable[[T], int] | None = None,
) -> Called[T]:
    """Call until there is an answer: `attempt` makes one attempt, `judge` says what an exception of it means.

    `tokens` is what an attempt is expected to use, `used` what it did. Raises ServiceError (worth a retry later),
    BuildError (this request never succeeds) or BudgetError (no quota), its text beginning with `what`, with the cost of
    all attempts; `failure_of` tells more.
    """
    spent, number, failure = 0.0, 0, None
    lost: Cost | None = None
    while True:
        try:
            breaker.check()  # before standing in line, and again behind it
            await limiter.acquire(1, tokens)
            probing = breaker.enter()
        except (ServiceError, BudgetError) as refusal:
            if failure is None:
                unasked = type(refusal)(f"{what}: {refusal}")
                unasked.attempts = 0
                raise unasked from None
            raise _told(what, failure, policy, f"; {refusal}", lost) from failure
        except ConfigError as error:  # the limiter's
            error.attempts = number
            _with(lost, error)
            raise
        number += 1
        start = clock.now()
        try:
            value = await _in_time(attempt, min(policy.timeout_s, policy.deadline_s - spent))
        except Exception as error:
            failure = judged(error, judge)
            failure.attempts = number
            lost = _sum(lost, cost_of(failure))
            if failure is not error:
                failure.__cause__ = error
        except BaseException:
            if probing:
                breaker.undecided()
            raise
        else:
            breaker.passed()
            if used is not None:
                with suppress(FeaturekitError):  # an answer is worth more than an exact limit
                    await limiter.correct(used(value) - tokens)
            return Called(value, number, lost or NOTHING)
        spent += clock.now() - start
        asked = failure.retry_after_s
        if asked is not None:
            with suppress(FeaturekitError):  # this call waits all the same
                await limiter.pause(min(asked, policy.deadline_s))
        wait = policy.wait(number, failure, clock)
        late = spent + wait >= policy.deadline_s
        last = failure.kind is not FailureKind.RETRYABLE or number >= policy.attempts or late
        _tell(breaker, failure, probing=probing, last=last)
        if last:
            if failure.kind is FailureKind.QUOTA:
                breaker.open(_QUOTA_S, failure.message, no_quota=True)
            if asked is not None and asked > policy.deadline_s:
                breaker.open(asked, f"the server asks to wait {asked:.0f} s ({failure.message})")
            why = (
                f"; another would end after {policy.deadline_s:g} s"
                if late and number < policy.attempts
                else ""
            )
            raise _told(what, failure, policy, why, lost) from failure
        await clock.sleep(wait)
        spent += wait


async def _in_time(attempt: Callable[[], Awaitable[T]], seconds: float) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await attempt()
    except TimeoutError:
        raise CallFailure(f"no answer in time ({seconds:g} s)", FailureKind.RETRYABLE, Sign.BROKEN) from None


def judged(error: Exception, judge: Callable[[Exception], CallFailure]) -> CallFailure:
    """What a failure means; one that says so itself is taken at its word."""
    return error if isinstance(error, CallFailure) else judge(error)


def _tell(breaker: Breaker, failure: CallFailure, *, probing: bool, last: bool) -> None:
    match failure.sign:
        case Sign.WORKS:
            breaker.passed()
        case Sign.BROKEN if last or probing:
            breaker.failed(failure.message)
        case Sign.BUSY | Sign.BROKEN:
            if probing:
                breaker.undecided()
        case _:
            assert_never(failure.sign)


def _told(
    what: str, failure: CallFailure, policy: RetryPolicy, why: str, lost: Cost | None
) -> FeaturekitError:
    """The failure as an error of the library."""
    tried = f" (attempt {failure.attempts} of {policy.attempts}{why})"
    told = f"{what}: {failure.message}"
    match failure.kind:
        case FailureKind.RETRYABLE:
            error: FeaturekitError = ServiceError(told + tried)
        case FailureKind.TERMINAL:
            error = BuildError(told + tried * (failure.attempts > 1))
        case FailureKind.QUOTA:
            error = BudgetError(told + tried * (failure.attempts > 1))
        case _:
            assert_never(failure.kind)
    error.attempts, error.blames_request = failure.attempts, failure.sign is Sign.WORKS
    return _with(lost, error)


def _with(lost: Cost | None, error: FeaturekitError) -> FeaturekitError:
    return error if lost is None else error.with_cost(lost.tokens, lost.usd, lost.estimated_tokens)


def _sum(one: Cost | None, other: Cost | None) -> Cost | None:
    return other if one is None else one if other is None else one + other


def failure_of(error: BaseException) -> CallFailure | None:
    """The failed call behind an error, with its kind and how many attempts were made; None where none was made."""
    cause = error.__cause__
    return cause if isinstance(cause, CallFailure) else None


def retry_after(headers: Mapping[str, str], clock: Clock) -> float | None:
    """Seconds that a server asks to wait, by `retry-after-ms` or `retry-after` (seconds, or an HTTP date); None where
    it does not say."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) / unit
        except ValueError:
            seconds = _until(text, headers.get("date"), clock)
        if 0 <= seconds < float("inf"):  # not NaN either
            return seconds
    return None


def _until(text: str, date: str | None, clock: Clock) -> float:
    """Seconds until an HTTP date, by the server's own clock where it tells the time."""
    try:
        then = parsedate_to_datetime(text).timestamp()
    except ValueError:
        return -1.0
    try:
        now = clock.wall() if date is None else parsedate_to_datetime(date).timestamp()
    except ValueError:
        now = clock.wall()
    return max(0.0, then - now)
