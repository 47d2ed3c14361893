from __future__ import annotations

from typing import Any

import pytest

from featurekit_spark.errors import UsageError
from featurekit_spark.search.filters import (
    And,
    Equals,
    FieldKind,
    Filter,
    In,
    Or,
    Range,
    checked_filter,
    matches,
    parse_filter,
)

FIELDS: dict[str, FieldKind] = {"brand": "str", "stock": "int", "price": "float", "new": "bool"}
LG = Equals("brand", "LG")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (None, True),
        (And(), True),
        (Or(), False),
        (In("brand", []), False),
        (And(LG, And()), LG),
        (And(LG, Or()), False),
        (Or(LG, Or()), LG),
        (Or(LG, And()), True),
        (And(Or(In("brand", ()), LG), And()), LG),
        (Equals("price", 3), Equals("price", 3.0)),
        (Equals("price", -0.0), Equals("price", 0.0)),
        (In("stock", [2, 2, 1]), In("stock", (2, 1))),
    ],
)
def test_what_decides_nothing_is_left_out(given: Filter | None, left: Filter | bool) -> None:
    found = checked_filter(given, FIELDS)
    assert found == left
    assert not isinstance(found, Equals) or repr(found) == repr(left)  # 3 is 3.0 to ==


@pytest.mark.parametrize(
    ("payload", "met"),
    [
        ({"stock": 3}, True),
        ({"stock": 5}, False),
        ({"stock": None}, False),
        ({}, False),
        ({"stock": 1}, False),
    ],
)
def test_a_null_meets_no_condition(payload: dict[str, Any], met: bool) -> None:
    assert matches(Range("stock", gt=1, lt=5), payload) is met
    assert matches(And(Or(Equals("stock", 3), In("stock", (3, 4))), And()), payload) is met


@pytest.mark.parametrize(
    ("texts", "meant"),
    [
        ([], None),
        (["brand=LG"], And(LG)),
        (["brand = LG ", "price<=9.5"], And(LG, Range("price", lte=9.5))),
        (["brand in LG, Sony"], And(In("brand", ("LG", "Sony")))),
        (["brand==x"], And(Equals("brand", "=x"))),
        (["stock>-1", "stock>=2", "stock<3"], And(Range("stock", gt=-1), Range("stock", gte=2), Range("stock", lt=3))),
        (["new=TRUE"], And(Equals("new", True))),
        (["stock in 1,2"], And(In("stock", (1, 2)))),
    ],
)  # fmt: skip
def test_conditions_as_they_are_typed(texts: list[str], meant: Filter | None) -> None:
    assert parse_filter(texts, FIELDS) == meant


@pytest.mark.parametrize(
    "text", ["brand", "=x", "stock=many", "new=1", "colour=red", "price in 1,,2", "a b=c"]
)
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError):
        parse_filter([text], FIELDS)
