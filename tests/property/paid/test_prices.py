"""Prices add up: of calls, of their parts, and in whatever order."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.paid.prices import Price

AMOUNTS = st.decimals(0, 1000, places=5) | st.floats(1e-6, 1000) | st.integers(0, 1000)
PRICES = st.builds(Price.of, AMOUNTS, AMOUNTS, st.none() | AMOUNTS)
TOKENS = st.integers(0, 10**9)
CALLS = st.tuples(TOKENS, TOKENS, TOKENS).map(lambda c: (c[0] + c[2], c[1], c[2]))


def exactly(price: Price, asked: int, answered: int, cached: int) -> Fraction:
    """The same in fractions, which know no rounding."""
    of_cached = price.input if price.cached is None else price.cached
    parts = ((asked - cached, price.input), (cached, of_cached), (answered, price.output))
    return sum((Fraction(tokens) * Fraction(each) for tokens, each in parts), Fraction(0)) / 10**6


@given(PRICES, CALLS)
def test_a_price_is_exact(price: Price, call: tuple[int, int, int]) -> None:
    assert Fraction(price.usd(*call)) == exactly(price, *call)


@given(PRICES, st.lists(CALLS, max_size=20), st.randoms())
def test_calls_add_up_in_any_order(price: Price, calls: list[tuple[int, int, int]], chance: object) -> None:
    together = price.usd(*(sum(part) for part in zip(*calls, strict=True))) if calls else Decimal(0)
    shuffled = sorted(calls, key=lambda _: chance.random())  # type: ignore[attr-defined]
    assert sum((Fraction(price.usd(*call)) for call in shuffled), Fraction(0)) == Fraction(together)


@given(PRICES, CALLS, st.integers(1, 1000))
def test_more_tokens_never_cost_less(price: Price, call: tuple[int, int, int], more: int) -> None:
    asked, answered, cached = call
    assert price.usd(asked + more, answered, cached) >= price.usd(asked, answered, cached) >= 0
    assert price.usd(asked, answered + more, cached) >= price.usd(asked, answered, cached)
