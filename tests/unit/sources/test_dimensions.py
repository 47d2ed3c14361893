"""Column names, layouts, and which value of several is chosen."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.errors import DataError
from featurekit_spark.sources.base import Dimension, Layout, is_blank, parse_column, resolve_dimension

DE = ("locale", "de_DE")
W1 = ("warehouse", "w1")


@pytest.mark.parametrize(
    ("column", "parsed"),
    [
        ("title", ("title", ())),
        ("title[locale=de_DE]", ("title", (DE,))),
        ("price[warehouse=w1;locale=de_DE]", ("price", (DE, W1))),
        ("price[warehouse:w1|locale:de_DE]", ("price", (DE, W1))),
        ("url[kind=a=b]", ("url", (("kind", "a=b"),))),
        ("weight [kg]", ("weight [kg]", ())),
        ("a[b][c=d]", ("a[b][c=d]", ())),
        ("[locale=de]", ("[locale=de]", ())),
    ],
)
def test_a_column_name_gives_attribute_and_key(column: str, parsed: object) -> None:
    assert parse_column(column) == parsed


@pytest.mark.parametrize("column", ["t[locale=]", "t[=de]", "t[locale=de;]", "t[locale=de;locale=fr]"])
def test_a_half_written_variant_is_refused(column: str) -> None:
    with pytest.raises(DataError, match="write it like title"):
        parse_column(column)


def test_the_most_specific_value_wins_then_the_plain_one() -> None:
    values = {(): "plain", (DE,): "german", (DE, W1): "german in w1", (("locale", "fr_FR"),): "french"}
    assert resolve_dimension(values, {"locale": "de_DE", "warehouse": "w1"}) == "german in w1"
    assert resolve_dimension(values, {"locale": "de_DE", "warehouse": "w2"}) == "german"
    assert resolve_dimension(values, {"warehouse": "w1"}) == "plain"
    assert resolve_dimension(values, {}) == "plain"
    assert resolve_dimension({(DE,): "german"}, {"locale": "fr_FR"}) is None


def test_a_missing_value_hides_nothing() -> None:
    assert resolve_dimension({(): "plain", (DE,): None}, {"locale": "de_DE"}) == "plain"
    assert resolve_dimension({(): "plain", (DE,): " \u00a0"}, {"locale": "de_DE"}) == "plain"
    assert resolve_dimension({(): 0}, {}) == 0


def test_ties_do_not_depend_on_the_order_of_columns() -> None:
    values = {(W1,): "by warehouse", (DE,): "by locale"}
    for order in itertools.permutations(values.items()):
        assert resolve_dimension(dict(order), {"locale": "de_DE", "warehouse": "w1"}) == "by locale"


names = st.sampled_from("abc")
keys = st.dictionaries(names, st.sampled_from("xy"), max_size=3).map(lambda d: tuple(sorted(d.items())))


@given(st.dictionaries(keys, st.integers()), st.dictionaries(names, st.sampled_from("xy")))
def test_no_matching_key_says_more_than_the_chosen_one(
    values: dict[tuple[tuple[str, str], ...], int], wanted: dict[str, str]
) -> None:
    matching = {key: value for key, value in values.items() if set(key) <= set(wanted.items())}
    chosen = resolve_dimension(values, wanted)
    if not matching:
        assert chosen is None
    else:
        most = max(map(len, matching))
        assert chosen in [value for key, value in matching.items() if len(key) == most]


def test_a_layout_knows_what_its_columns_vary_by() -> None:
    layout = Layout(
        ("product_id", "", "title", "title[locale=de_DE]", "title[locale=fr_FR;warehouse=w1]", "brand"),
        where="x.csv",
        reserved=("product_id",),
    )
    assert layout.dimensions() == {
        "brand": Dimension(),
        "title": Dimension(("locale", "warehouse"), (("de_DE", "fr_FR"), ("w1",))),
    }
    assert layout.resolution("title", {"locale": "de_DE"}) == ("title[locale=de_DE]", "title")
    assert layout.resolution("brand", {"locale": "de_DE"}) == ("brand",)


def test_a_layout_refuses_what_it_cannot_tell_apart() -> None:
    with pytest.raises(DataError, match=r"x\.csv: column 'a' is there twice"):
        Layout(("a", "b", "a"), where="x.csv")
    with pytest.raises(DataError, match="mean the same"):
        Layout(("a[x=1;y=2]", "a[y:2|x:1]"), where="x.csv")
    with pytest.raises(DataError, match=r"x\.csv: column 'a\[x=\]'"):
        Layout(("a[x=]",), where="x.csv")
    with pytest.raises(DataError, match="no column 'titel'; the columns found are 'product_id', 'title'"):
        Layout(("product_id", "title"), where="x.csv").variants("titel")


def test_blank_means_nothing_to_see() -> None:
    assert all(map(is_blank, [None, "", " \t\r\n", "\u00a0\u2003\u3000"]))
    assert not any(map(is_blank, ["\u200b", "x", 0, False, []]))
