"""However attempts end, what the server billed is what entries, runs and sums say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.errors import FeaturekitError
from featurekit_spark.paid.cost import NOTHING, Cost
from featurekit_spark.paid.limits import LocalLimiter
from featurekit_spark.paid.retry import (
    Breaker,
    CallFailure,
    Clock,
    FailureKind,
    RetryPolicy,
    Sign,
    with_retries,
)
from featurekit_spark.results import Origin, Result, count, count_rows, to_rows
from featurekit_spark.testing.virtual import virtual_run

KINDS = st.sampled_from([FailureKind.RETRYABLE, FailureKind.RETRYABLE, FailureKind.TERMINAL])


@dataclass(frozen=True)
class Attempt:
    """`kind`: of its failure; None: an answer. `tokens`: as the server bills them; None: it does not say."""

    kind: FailureKind | None
    tokens: int | None
    estimated: int = 0


attempts = st.lists(
    st.builds(
        lambda kind, tokens, share: Attempt(kind, tokens, 0 if tokens is None else tokens * share // 2),
        KINDS,
        st.none() | st.integers(0, 1000),
        st.integers(0, 2),
    ),
    max_size=8,
)


def called(script: list[Attempt], most: int) -> tuple[int, Cost | None, int, bool]:
    """(requests, what is said of their cost, attempts that are told, whether there was an answer)."""
    made = 0

    async def attempt() -> str:
        nonlocal made
        made += 1
        if made > len(script):
            return "answer"
        this = script[made - 1]
        failure = CallFailure("no", this.kind or FailureKind.RETRYABLE, Sign.WORKS)
        failure.tokens, failure.estimated_tokens = this.tokens, this.estimated
        failure.usd = None if this.tokens is None else this.tokens / 4
        raise failure

    async def main() -> tuple[int, Cost | None, int, bool]:
        try:
            found = await with_retries(
                attempt,
                lambda error: CallFailure(repr(error), FailureKind.RETRYABLE, Sign.BROKEN),
                what="m",
                limiter=LocalLimiter(),
                breaker=Breaker(),
                policy=RetryPolicy(most, deadline_s=1e9),
                clock=Clock(uniform=lambda low, high: low),
            )
        except FeaturekitError as error:
            known = None if error.tokens is None else Cost(error.tokens, error.usd, error.estimated_tokens)
            return made, known, error.attempts or 0, False
        return made, found.lost, found.attempts, True

    return virtual_run(main())


@given(attempts, st.integers(1, 8))
def test_what_was_billed_is_told(script: list[Attempt], most: int) -> None:
    made, cost, told, answered = called(script, most)
    assert told == made
    sent = script[:made]
    billed = [one for one in sent if one.tokens is not None]
    tokens = sum(one.tokens or 0 for one in billed)
    expected = Cost(tokens, tokens / 4, sum(one.estimated for one in billed))
    if billed:
        assert cost == expected
    else:
        assert cost == (NOTHING if answered else None)


results = st.lists(
    st.builds(
        lambda origin, known, cost: (origin, known, cost),
        st.sampled_from([Origin.COMPUTED, Origin.ERROR, Origin.HIT, Origin.UPSTREAM]),
        st.none() | st.integers(0, 6),
        st.tuples(st.integers(0, 100), st.integers(0, 100), st.integers(0, 40)),
    ),
    max_size=12,
)


@given(results, st.booleans())
def test_objects_and_rows_count_alike(drawn: list[tuple[Origin, int | None, Any]], paid: bool) -> None:
    made = [
        Result(
            origin,
            None if "error" in origin or origin is Origin.UPSTREAM else "h",
            entry_id=str(at),
            error="A[1]: no" if origin in (Origin.ERROR, Origin.UPSTREAM) else None,
            seconds=1.0,
            tokens=tokens,
            usd=usd / 4,
            estimated_tokens=min(estimated, tokens),
            attempts=known,
        )
        for at, (origin, known, (tokens, usd, estimated)) in enumerate(drawn)
    ]
    one = count(made, paid=paid)
    rows = to_rows("A", "c", [(f"[{at}]", result) for at, result in enumerate(made)])
    assert isinstance(rows, pa.Table)
    assert count_rows(rows, paid=paid) == one
    assert one.attempts - one.failed_attempts <= one.calls
    assert one.failed_attempts <= one.attempts
