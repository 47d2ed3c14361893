"""What an answer took: as the provider counted, else as it is counted here, and then it says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from featurekit_spark.costs import Expected
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.tokens import count_request, count_tokens
from featurekit_spark.paid.usage import Usage, expected_cost, usage_of

PRICE = Price.of(1.0, 10.0, 0.5)


def usage(reported: Any, *, model: str = "m", price: Price | None = PRICE, text: str = "an answer") -> Usage:
    return usage_of(reported, prompt="a lamp", system="a list", text=text, model=model, price=price)


def reported(**counts: Any) -> SimpleNamespace:
    return SimpleNamespace(**counts)


def test_the_provider_counts() -> None:
    assert usage(reported(prompt_tokens=7, completion_tokens=3)) == Usage(7, 3, pytest.approx(37e-6))
    cached = reported(prompt_tokens=7, completion_tokens=3, prompt_tokens_details=reported(cached_tokens=4))
    assert usage(cached).usd == pytest.approx(35e-6)
    assert usage(cached, price=None) == Usage(7, 3, None)
    assert usage(reported(prompt_tokens=7, completion_tokens=0), text="").counted_by == "provider"


@pytest.mark.parametrize(
    "counts",
    [
        None,
        reported(),
        reported(prompt_tokens=None, completion_tokens=None),
        reported(prompt_tokens=0, completion_tokens=0),
        reported(prompt_tokens=7),
        reported(prompt_tokens=-1, completion_tokens=3),
        reported(prompt_tokens="7", completion_tokens=True),
    ],
)
def test_what_it_does_not_say_is_counted_here_and_labelled(counts: Any) -> None:
    found = usage(counts)
    asked, answered = count_request("a lamp", "a list", "m").count, count_tokens("an answer", "m").count
    assert found == Usage(asked, answered, pytest.approx((asked + 10 * answered) / 1e6), "estimate")
    assert found.prompt_tokens > 0 and found.completion_tokens > 0


def test_more_cached_tokens_than_there_are_do_not_lose_an_answer() -> None:
    odd = reported(prompt_tokens=7, completion_tokens=3, prompt_tokens_details=reported(cached_tokens=9))
    assert usage(odd).usd == pytest.approx(33.5e-6)


def test_what_a_call_is_expected_to_cost() -> None:
    def told(answer_tokens: int | None, price: Price | None = PRICE) -> Expected:
        return expected_cost("a lamp", system=None, answer_tokens=answer_tokens, model="m", price=price)

    asked = count_request("a lamp", None, "m").count
    assert told(10) == Expected(asked + 10, pytest.approx((asked + 100) / 1e6), priced=True)
    assert told(None) == Expected(None, None, priced=True)
    assert told(10, None) == Expected(asked + 10, None, priced=False)
