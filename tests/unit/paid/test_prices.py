"""Which price a model has on a day, and what is no price."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.config import load_settings, read_file
from featurekit_spark.errors import ConfigError, UsageError
from featurekit_spark.paid.prices import Price, PriceTable

DAY = date(2026, 1, 31)
SHIPPED = Path(__file__).parents[3] / "conf" / "prices.yaml"


def table(**models: Any) -> PriceTable:
    return PriceTable.parse({"models": models}, origin="prices.yaml")


def test_cached_tokens_cost_what_they_cost() -> None:
    price = Price.of(0.15, 0.6, 0.075)
    assert price.usd(1_000_000, 0) == Decimal("0.15")
    assert price.usd(1_000_000, 1_000_000, cached=1_000_000) == Decimal("0.675")
    assert price.usd(7, 3, cached=2) == Decimal("0.0000027")
    assert Price.of(0.15, 0.6).usd(7, 3, cached=2) == Decimal("0.00000285")
    assert Price.of(0.13).usd(10, 0) == Decimal("0.0000013")  # an embedder answers with no tokens


@pytest.mark.parametrize("counts", [(-1, 0, 0), (1, -1, 0), (1, 0, 2), (1, 0, -1)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="cannot be priced"):
        Price.of(1, 1).usd(*counts)


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf"), "1", True, None])
def test_what_is_no_price_is_refused(amount: Any) -> None:
    with pytest.raises(UsageError, match="is no price"):
        Price.of(amount, 1)


def test_the_own_name_comes_first_then_the_longest_pattern() -> None:
    prices = table(**{
        "gpt-4o": {"input": 1, "output": 1},
        "gpt-4o-*": {"input": 2, "output": 2},
        "gpt-4o-mini-*": {"input": 3, "output": 3},
        "*": {"input": 4, "output": 4},
        "a.c": {"input": 5, "output": 5},
    })  # fmt: skip
    expected = {"gpt-4o": 1, "gpt-4o-x": 2, "gpt-4o-mini-1": 3, "gpt-4": 4, "abc": 4, "a.c": 5}
    assert {name: prices.price(name, DAY) for name in expected} == {
        name: Price.of(amount, amount) for name, amount in expected.items()
    }


def test_a_plain_name_is_no_beginning_of_another() -> None:
    assert table(**{"gpt-4o": {"input": 1, "output": 1}}).price("gpt-4o-mini", DAY) is None


def test_a_price_holds_from_its_day_until_the_next_one() -> None:
    rows = [
        {"from": date(2026, 2, 1), "input": 2, "output": 0},
        {"from": date(2026, 1, 1), "input": 1, "output": 0},
    ]
    prices = table(m=rows)
    days = {date(2025, 12, 31): None, date(2026, 1, 1): 1, date(2026, 1, 31): 1, date(2026, 2, 1): 2}
    found = {day: prices.price("m", day) for day in days}
    assert {day: price and int(price.input) for day, price in found.items()} == days
    with_pattern = table(m=rows, **{"*": {"input": 9, "output": 9}})
    assert with_pattern.price("m", date(2025, 12, 31)) is None  # not the price of something else


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "found nothing"),
        ({"models": []}, "one key, models"),
        ({"models": {}, "model": {}}, "'models', 'model'"),
        ({"models": {"m": 3}}, "x: m: found 3 where a price should be"),
        ({"models": {"m": []}}, "x: m: the list of prices is empty"),
        ({"models": {"m": {"input": 1}}}, "x: m: a price has input, output .* found only input"),
        ({"models": {"m": {"input": 1, "outptu": 1}}}, "found 'outptu'"),
        ({"models": {"m": {"input": 1, "output": -1}}}, "x: m: -1 is no price"),
        ({"models": {"m": {"input": 1, "output": 1, "from": "2026-01-01"}}}, "is no date"),
        ({"models": {"m": [{"input": 1, "output": 1}] * 2}}, "two prices have no from"),
        ({"models": {"m": [{"input": 1, "output": 1, "from": DAY}] * 2}}, "two prices have from: 2026-01-31"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PriceTable.parse(data, origin="x")


def test_the_settings_that_are_shipped_name_the_table_and_a_model_in_it() -> None:
    settings = load_settings(merchant="abt", market="US", conf_file=SHIPPED.with_name("prod.yaml")).llm
    assert settings.prices == f"conf/{SHIPPED.name}" and settings.model is not None
    assert PriceTable.parse(read_file(SHIPPED), origin="x").price(settings.model, DAY) is not None


def test_the_table_that_is_shipped() -> None:
    prices = PriceTable.parse(read_file(SHIPPED), origin="conf/prices.yaml")
    names = list(read_file(SHIPPED)["models"])
    for name in names:
        price = prices.price(name.replace("*", "01-01"), DAY)
        assert price is not None and price.input > 0, name
        assert price.cached is None or price.cached < price.input, name
    assert prices.price("gpt-4o", date(2024, 6, 1)) == Price.of(5.0, 15.0)
    assert prices.price("gpt-4o", date(2024, 1, 1)) is None
    assert prices.price("gpt-4o-audio-preview", DAY) is None  # another model than gpt-4o, at another price
    # "gpt-4o-mini-2024-07-18" fits no pattern of the larger model
    assert prices.price("gpt-4o-mini-2024-07-18", DAY) == prices.price("gpt-4o-mini", DAY)
