from __future__ import annotations

import json
import re
import time
from typing import Any

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


@pytest.mark.parametrize(
    "answer",
    [
        "**1.** Red lamp\n**2.** Oak table - 2 m\n**3.** Chair",
        "Sure!\n\n**1. Red lamp**\n**2. Oak table - 2 m**\n__3. Chair__",
        "1\\. Red lamp\n2\\. Oak table - 2 m\n3\\. Chair",
        "1.Red lamp\n2.Oak table - 2 m\n3.Chair",
        "[1] Red lamp\n[2] Oak table - 2 m\n[3] Chair",
        "\u0661. Red lamp\n\u0662. Oak table - 2 m\n\u0663. Chair",
        "\uff11\uff0eRed lamp\n\uff12\uff0eOak table - 2 m\n\uff13\uff0eChair",
        "\u2460 Red lamp\n\u2461 Oak table - 2 m\n\u2462 Chair",
        "1\ufe0f\u20e3 Red lamp\n2\ufe0f\u20e3 Oak table - 2 m\n3\ufe0f\u20e3 Chair",
        "\u25aa Red lamp\n\u25aa Oak table - 2 m\n\u25aa Chair",
        "-Red lamp\n-Oak table - 2 m\n-Chair",
        "*Red lamp\n*Oak table - 2 m\n*Chair",
        "*Red lamp*\n**Oak table - 2 m**\n_Chair_",
        "['Red lamp', 'Oak table - 2 m', 'Chair']",
        'Here:\n["Red lamp", "Oak table - 2 m", "Chair",]\nDone.',
        '["Red lamp", "Oak table - 2 m", "Chair", "Sof',
        '```json\n{"items": ["Red lamp", "Oak table - 2 m", "Chair"], "note": "x"}\n```',
        "Sure! Here are three:\nRed lamp\nOak table - 2 m\nChair\nLet me know if you need more.",
        "Here is the list\n```\nRed lamp\nOak table - 2 m\nChair\n```\nEnjoy!",
        "1. Red lamp 2. Oak table - 2 m 3. Chair",
        "Red lamp; Oak table - 2 m; Chair",
        "Red lamp, Oak table - 2 m, and Chair.",
        "I would suggest: Red lamp, Oak table - 2 m, Chair",
        "1. Red lamp\n2. Oak table - 2 m\n3. Chair\n\nThese go well with a sofa, a rug, and a desk.",
    ],
)
def test_lists_that_are_not_quite_as_asked_for_are_read(answer: str) -> None:
    assert parse_suggestions(answer, limit=10) == ITEMS


@pytest.mark.parametrize(
    "answer",
    ["Lamp, red", "Lamp: red, with shade", "*NEW* lamp", "2.4 GHz router", "4:3 screen", "Here is a lamp"],
)
def test_a_description_in_one_line_stays_whole(answer: str) -> None:
    assert parse_suggestions(answer, limit=10) == [answer]


def test_the_only_suggestion_asked_for_is_not_parted() -> None:
    assert parse_suggestions("Lamp, red, oak, and glass", limit=1) == ["Lamp, red, oak, and glass"]


def test_no_code_is_run() -> None:
    answer = "[__import__('os').getcwd(), 'a']"
    assert parse_suggestions(answer, limit=5) == [answer]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "{" * 50_000,
        "- " + " " * 50_000 + "x",
        "['" * 20_000,
        "1. " * 20_000,
        "```\n" * 20_000,
        "**1." * 20_000,
    ],
)
def test_odd_answers_are_read_in_no_time(text: str) -> None:
    start = time.monotonic()
    parse_suggestions(text, limit=5)
    assert time.monotonic() - start < 2


_WORDS = st.text("abcdefghijABCXYZ\u00e9\u00df\u65e50123456789&%+", min_size=1, max_size=8).filter(
    lambda w: w[0].isalpha()
)
_ITEMS = st.lists(
    st.lists(_WORDS, min_size=1, max_size=4).map(" ".join),
    min_size=2,
    max_size=8,
    unique_by=str.casefold,
).filter(lambda items: not any(re.match(r"(?i)(and|or)\b", item) for item in items))


def _numbered(mark: str) -> Any:
    return lambda items: "\n".join(mark.format(n=n, item=item) for n, item in enumerate(items, 1))


_FORMS: dict[str, Any] = {
    **{
        mark: _numbered(mark)
        for mark in (
            "{n}. {item}",
            "{n}) {item}",
            "({n}) {item}",
            "{n}: {item}",
            " {n}.  {item} ",
            "**{n}.** {item}",
            "**{n}. {item}**",
            "{n}. **{item}**",
            "{n}\\. {item}",
            "{n}.{item}",
            "[{n}] {item}",
        )
    },
    **{f"bullet {mark}": _numbered(f"{mark} {{item}}") for mark in "-*+\u2022\u2013\u25aa\u25cf\u2605"},
    "arabic": lambda items: "\n".join(f"{chr(0x660 + n)}. {item}" for n, item in enumerate(items, 1)),
    "circled": lambda items: "\n".join(f"{chr(0x245F + n)} {item}" for n, item in enumerate(items, 1)),
    "json": json.dumps,
    "indented json": lambda items: json.dumps(items, indent=2, ensure_ascii=False),
    "object": lambda items: json.dumps({"suggestions": items}),
    "objects": lambda items: json.dumps([{"title": item, "why": "x"} for item in items]),
    "single quotes": repr,
    "cut off": lambda items: json.dumps(items)[:-1] + ', "so',
    "lines": "\n".join,
    "windows": "\r\n".join,
    "blank lines": "\n\n".join,
    "semicolons": "; ".join,
}
_FRAMES = {
    "alone": "{}",
    "fenced": "```\n{}\n```",
    "fenced with a language": "```json\n{}\n```",
    "after words": "Sure! Here are some suggestions:\n\n{}",
    "between words": "Here are the products you asked for:\n{}\n\nLet me know if you need more!",
    "fenced between words": "Certainly:\n\n```text\n{}\n```\nHope these help!",
}


@given(_ITEMS, st.sampled_from(sorted(_FORMS)), st.sampled_from(sorted(_FRAMES)), st.data())
def test_a_list_in_any_form_comes_back(items: list[str], form: str, frame: str, data: st.DataObject) -> None:
    shown = list(items)
    if data.draw(st.booleans()):
        shown.append(data.draw(st.sampled_from(items)))  # said twice
    answer = _FRAMES[frame].replace("{}", _FORMS[form](shown))
    assert parse_suggestions(answer, limit=20) == items
    assert parse_suggestions(answer, limit=1) == items[:1] or form == "semicolons"


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
