"""Attempts, waits, deadlines and the breaker, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import pytest

from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ConfigError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.failures import kind_of, unasked
from featurekit_spark.paid.limits import LocalLimiter, Rates
from featurekit_spark.paid.retry import (
    Breaker,
    Called,
    CallFailure,
    Clock,
    FailureKind,
    RetryPolicy,
    Sign,
    failure_of,
    retry_after,
    with_retries,
)
from featurekit_spark.testing.virtual import virtual_run

EPOCH = 1_800_000_000.0


def failure(
    kind: FailureKind = FailureKind.RETRYABLE, sign: Sign = Sign.BROKEN, wait: float | None = None
) -> CallFailure:
    return CallFailure(f"{kind.value} and {sign.value}", kind, sign, retry_after_s=wait)


BUSY = failure(sign=Sign.BUSY)


@dataclass
class Service:
    """Answers by script, then with its number of calls; keeps the time of each attempt."""

    script: Iterator[Any] = field(default_factory=lambda: iter(()))
    times: list[float] = field(default_factory=list)

    async def __call__(self) -> int:
        self.times.append(asyncio.get_running_loop().time())
        match next(self.script, None):
            case Exception() as error:
                raise error
            case float() as seconds:
                await asyncio.sleep(seconds)
        return len(self.times)


class Caller:
    """Calls a service in virtual time; chance always says the most."""

    def __init__(
        self, policy: RetryPolicy, breaker: Breaker | None = None, rates: Rates | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        self.clock = Clock(loop.time, lambda: EPOCH + loop.time(), asyncio.sleep, lambda low, high: high)
        self.policy = policy
        self.breaker = breaker or Breaker(clock=self.clock)
        self.breaker.clock = self.clock
        self.limiter = LocalLimiter(rates or Rates(), loop.time)

    async def __call__(self, service: Callable[[], Awaitable[int]], **options: Any) -> Called[int]:
        return await with_retries(
            service,
            lambda error: CallFailure(repr(error), FailureKind.RETRYABLE, Sign.BROKEN),
            what="m at here",
            limiter=self.limiter,
            breaker=self.breaker,
            policy=self.policy,
            clock=self.clock,
            **options,
        )


def tried(
    *script: Any, policy: RetryPolicy | None = None
) -> tuple[Called[int] | FeaturekitError, list[float]]:
    service = Service(iter(script))

    async def main() -> Called[int] | FeaturekitError:
        try:
            return await Caller(policy or RetryPolicy())(service)
        except FeaturekitError as error:
            return error

    return virtual_run(main()), service.times


def test_waits_double_up_to_the_longest() -> None:
    answer, times = tried(*[failure()] * 5, policy=RetryPolicy(longest_wait_s=3))
    assert answer == Called(6, 6)
    assert times == [0, 0.5, 1.5, 3.5, 6.5, 9.5]


def test_chance_picks_from_the_whole_wait() -> None:
    asked = []
    clock = Clock(uniform=lambda low, high: asked.append((low, high)) or low)  # type: ignore[func-returns-value]
    assert RetryPolicy().wait(3, failure(), clock) == 0
    assert asked == [(0.0, 2.0)]
    assert RetryPolicy().wait(5000, failure(), Clock(uniform=lambda low, high: high)) == 60


def test_a_server_that_says_when_is_waited_for() -> None:
    answer, times = tried(failure(sign=Sign.BUSY, wait=7.0), failure(wait=0.2))
    assert isinstance(answer, Called)
    assert times == [0, 7.5, 7.9]


@pytest.mark.parametrize(
    ("kind", "error"), [(FailureKind.TERMINAL, BuildError), (FailureKind.QUOTA, BudgetError)]
)
def test_what_does_not_help_is_not_tried_again(kind: FailureKind, error: type[FeaturekitError]) -> None:
    answer, times = tried(failure(), failure(kind, Sign.WORKS))
    assert type(answer) is error
    assert str(answer) == f"m at here: {kind.value} and works (attempt 2 of 6)"
    assert len(times) == 2
    told = failure_of(answer)
    assert told is not None and (told.kind, told.attempts) == (kind, 2)


def test_the_last_attempt_tells_how_many_there_were() -> None:
    answer, times = tried(*[failure()] * 9, policy=RetryPolicy(attempts=3))
    assert isinstance(answer, ServiceError)
    assert str(answer) == "m at here: retryable and broken (attempt 3 of 3)"
    assert len(times) == 3


def test_an_attempt_and_a_call_end_in_time() -> None:
    answer, times = tried(*[1000.0] * 9, policy=RetryPolicy(timeout_s=10, deadline_s=25))
    assert isinstance(answer, ServiceError)
    assert times == [0, 10.5, 21.5]
    assert "no answer in time (3.5 s) (attempt 3 of 6; another would end after 25 s)" in str(answer)


def test_a_wait_beyond_the_deadline_is_not_waited() -> None:
    answer, times = tried(failure(sign=Sign.BUSY, wait=400.0), policy=RetryPolicy(deadline_s=300))
    assert isinstance(answer, ServiceError)
    assert times == [0]


def test_standing_in_line_is_not_counted() -> None:
    async def main() -> list[int]:
        caller = Caller(RetryPolicy(deadline_s=5), rates=Rates(requests_per_minute=6))
        answers = await asyncio.gather(*(caller(Service()) for _ in range(10)))
        assert asyncio.get_running_loop().time() > 80
        return [answer.attempts for answer in answers]

    assert virtual_run(main()) == [1] * 10


def test_everybody_pauses_for_one() -> None:
    async def main() -> list[float]:
        caller = Caller(RetryPolicy())
        later = Service()

        async def second() -> None:
            await asyncio.sleep(1)
            await caller(later)

        await asyncio.gather(caller(Service(iter([failure(sign=Sign.BUSY, wait=9.0)]))), second())
        return later.times

    assert virtual_run(main()) == [9.0]


def test_other_errors_are_judged() -> None:
    answer, _ = tried(KeyError("x"), policy=RetryPolicy(attempts=1))
    assert "KeyError('x')" in str(answer)
    assert isinstance(answer, ServiceError)
    told = failure_of(answer)
    assert told is not None and isinstance(told.__cause__, KeyError)


def test_tokens_are_corrected_by_what_was_used() -> None:
    async def main() -> float:
        caller = Caller(RetryPolicy(), rates=Rates(tokens_per_minute=60))
        for _ in range(3):
            await caller(Service(), tokens=100, used=lambda answer: 10)
        return asyncio.get_running_loop().time()

    assert 18 < virtual_run(main()) < 22  # 2 * 10 tokens at 1 per second, and not 2 * 100


class TestBreaker:
    def test_opens_probes_and_closes(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(attempts=2), Breaker(failures=3, open_s=30))
            for _ in range(3):
                with pytest.raises(ServiceError, match="attempt 2 of 2"):
                    await caller(Service(iter([failure(), failure()])))
            service = Service()
            with pytest.raises(
                ServiceError, match=r"m at here: not asked, because 3 calls in a row failed.*30 s"
            ):
                await caller(service)
            assert service.times == []
            await asyncio.sleep(31)
            with pytest.raises(ServiceError, match=r"broken; not asked.*attempt 1|attempt 1.*not asked"):
                await caller(Service(iter([failure()])))  # the probe fails, and gives up at once
            with pytest.raises(ServiceError, match="not asked"):
                await caller(service)
            await asyncio.sleep(31)
            slow = asyncio.ensure_future(caller(Service(iter([5.0]))))
            await asyncio.sleep(1)
            with pytest.raises(ServiceError, match="when a call that is under way has succeeded"):
                await caller(service)  # one probes, the others do not
            assert (await slow).value == 1
            assert (await caller(service)).value == 1

        virtual_run(main())

    def test_a_success_between_starts_the_count_anew(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(attempts=1), Breaker(failures=3))
            for _ in range(5):
                for _ in range(2):
                    with pytest.raises(ServiceError, match="attempt 1 of 1"):
                        await caller(Service(iter([failure()])))
                await caller(Service())

        virtual_run(main())

    def test_prompts_that_are_refused_say_nothing_against_the_service(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(), Breaker(failures=2))
            for _ in range(5):
                with pytest.raises(BuildError):
                    await caller(Service(iter([failure(FailureKind.TERMINAL, Sign.WORKS)])))

        virtual_run(main())

    def test_a_wrong_key_is_everybodys(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(), Breaker(failures=2))
            for _ in range(2):
                with pytest.raises(BuildError):
                    await caller(Service(iter([failure(FailureKind.TERMINAL, Sign.BROKEN)])))
            with pytest.raises(ServiceError, match="not asked"):
                await caller(Service())

        virtual_run(main())

    def test_a_spent_quota_stops_those_who_wait(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy())
            with pytest.raises(BudgetError) as spent:
                await caller(Service(iter([failure(FailureKind.QUOTA, Sign.BUSY)])))
            assert (spent.value.attempts, unasked(spent.value)) == (1, False)
            service = Service()
            with pytest.raises(
                BudgetError, match=r"not asked, because quota and busy.*in 5 s.*is quota"
            ) as waits:
                await caller(service)
            assert (waits.value.attempts, unasked(waits.value), service.times) == (0, True, [])
            await asyncio.sleep(6)
            assert (await caller(service)).value == 1  # somebody has paid meanwhile
            assert (await caller(service)).value == 2

        virtual_run(main())

    def test_errors_carry_their_attempts_and_whom_they_blame(self) -> None:
        async def main() -> None:
            found = []
            for script in (
                [BUSY, failure(FailureKind.TERMINAL, Sign.WORKS)],
                [failure(FailureKind.TERMINAL, Sign.BROKEN)],
                [BUSY, BUSY],
            ):
                with pytest.raises(FeaturekitError) as told:
                    await Caller(RetryPolicy(attempts=2))(Service(iter(script)))
                found.append((told.value.attempts, kind_of(told.value).value))
            assert found == [(2, "terminal"), (1, "retryable"), (2, "retryable")]

        virtual_run(main())

    def test_a_busy_server_is_not_a_broken_one(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(attempts=1), Breaker(failures=2))
            for _ in range(5):
                with pytest.raises(ServiceError, match="attempt 1 of 1"):
                    await caller(Service(iter([BUSY])))

        virtual_run(main())

    def test_a_cancelled_probe_leaves_the_place_to_another(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy(attempts=1), Breaker(failures=1, open_s=10))
            with pytest.raises(ServiceError):
                await caller(Service(iter([failure()])))
            await asyncio.sleep(11)
            probe = asyncio.ensure_future(caller(Service(iter([60.0]))))
            await asyncio.sleep(1)
            probe.cancel()
            with pytest.raises(asyncio.CancelledError):
                await probe
            assert (await caller(Service())).value == 1

        virtual_run(main())

    def test_a_server_that_asks_for_an_hour_is_left_alone(self) -> None:
        async def main() -> None:
            caller = Caller(RetryPolicy())
            with pytest.raises(ServiceError, match="attempt 1 of 6"):
                await caller(Service(iter([failure(sign=Sign.BUSY, wait=3600.0)])))
            with pytest.raises(ServiceError, match="the server asks to wait 3600 s"):
                await caller(Service())

        virtual_run(main())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": formatdate(EPOCH + 90, usegmt=True)}, 90.0),
        ({"retry-after": formatdate(EPOCH - 90, usegmt=True)}, 0.0),
        # The server's clock is an hour behind, and it says so.
        (
            {
                "retry-after": formatdate(EPOCH - 3570, usegmt=True),
                "date": formatdate(EPOCH - 3600, usegmt=True),
            },
            30.0,
        ),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-4"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, Clock(wall=lambda: EPOCH)) == seconds


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"timeout_s": 0}, {"deadline_s": -1.0}])
def test_a_policy_that_allows_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        RetryPolicy(**wrong)


def test_where_a_limiter_cannot_be_asked_no_attempt_is_told() -> None:
    """A server of limits that refuses the user."""

    class Refusing(LocalLimiter):
        async def acquire(self, requests: int = 1, tokens: int = 0) -> None:
            raise ConfigError("Redis at h refused the user")

    service = Service(iter([]))

    async def main() -> None:
        caller = Caller(RetryPolicy())
        caller.limiter = Refusing()
        await caller(service)

    with pytest.raises(ConfigError) as refused:
        virtual_run(main())
    assert refused.value.attempts == 0 and not service.times
