from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.apps.product_recs.suggestions import parse_suggestions, render
from featurekit_spark.errors import ConfigError

ITEMS = ["Red lamp", "Oak table - 2 m", "Chair"]


@pytest.mark.parametrize(
    "answer",
    [
        "1. Red lamp\n2. Oak table - 2 m\n3. Chair",
        "Sure! Here you are:\n\n 1) Red lamp\n 2) Oak table - 2 m\n\n 3) Chair\n\nAnything else?",
        "(1) Red lamp\n(2) Oak table - 2 m\n(3) Chair",
        "- Red lamp\n- Oak table - 2 m\n- Chair",
        "* **Red lamp**\n* *Oak table - 2 m*\n* `Chair`",
        "\u2022 Red lamp\n\u2022 Oak table - 2 m\n\u2022 \u201cChair\u201d",
        '["Red lamp", "Oak table - 2 m", "Chair"]',
        'Here:\n```json\n["Red lamp", "Oak table - 2 m",\n "Chair"]\n```\nDone.',
        '{"suggestions": ["Red lamp", "Oak table - 2 m", "Chair"]}',
        '[{"title": "Red lamp"}, {"name": "Oak table - 2 m"}, {"description": "Chair"}]',
        "Red lamp\nOak table - 2 m\n\nChair\n",
        "1. Red lamp\r\n2. Oak table - 2 m\r\n3. Chair\r\n",
        "1. Red lamp\n2. RED  LAMP\n3. Oak table - 2 m\n4. Chair\n5. Chair",
    ],
)
def test_lists_are_read(answer: str) -> None:
    assert parse_suggestions(answer, limit=10) == ITEMS


@pytest.mark.parametrize("answer", [None, "", " \n ", "[]", '{"suggestions": []}', "1. \n2. "])
def test_nothing_is_an_empty_list(answer: str | None) -> None:
    assert parse_suggestions(answer, limit=10) == []


def test_what_looks_like_a_list_and_is_none() -> None:
    assert parse_suggestions("3.5 mm jack cable", limit=5) == ["3.5 mm jack cable"]
    assert parse_suggestions("Lamp [broken", limit=5) == ["Lamp [broken"]
    assert parse_suggestions("1. TV [2 HDMI]\n2. Radio [1]", limit=5) == ["TV [2 HDMI]", "Radio [1]"]
    assert parse_suggestions("1. *NEW* lamp *sale*", limit=5) == ["*NEW* lamp *sale*"]
    assert parse_suggestions("1. a\n2. b\n3. c", limit=2) == ["a", "b"]


@given(st.text(max_size=300), st.integers(0, 5))
def test_any_answer_gives_a_clean_list(answer: str, limit: int) -> None:
    items = parse_suggestions(answer, limit=limit)
    assert len(items) <= limit
    assert all(item == item.strip() and item for item in items)
    assert len({item.casefold() for item in items}) == len(items)


def test_templates_take_named_fields_byte_for_byte() -> None:
    titles = ["a {title} %s \\ \u00fc", " b\n"]
    assert render("for {title}, {{not}}: {title}!", {"title": titles}) == [
        f"for {title}, {{not}}: {title}!" for title in titles
    ]
    assert render("no field", {"title": titles}) == ["no field", "no field"]


@pytest.mark.parametrize(
    "template", ["{}", "{0}", "{name}", "{title!r}", "{title:>9}", "{title.x}", "{title", "}"]
)
def test_other_templates_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="prompt_template"):
        render(template, {"title": ["a"]})
