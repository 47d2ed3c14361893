"""Text in and out of the model: rendering prompts, and reading a list out of an answer. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from string import Formatter
from typing import Any

from featurekit_spark.errors import ConfigError, known_names

__all__ = ["parse_suggestions", "render"]

_BULLET = r"(?:\(?\d{1,3}[.):]|[-*+\u2022\u2023\u2013\u2014])"
_ITEM = re.compile(rf"{_BULLET}\s+(?P<item>\S.*)")
_EMPTY_ITEM = re.compile(_BULLET)
_MARKED_NUMBER = re.compile(
    r"""(?P<mark>\*\*|__)\(?\d{1,3}[.):](?P=mark)\s*(?P<item>\S.*)      # **1.** lamp
    |   (?P<marks>\*\*|__)\(?\d{1,3}[.):]\s+(?P<inside>\S.*)(?P=marks)  # **1. lamp**
    |   \(?\d{1,3}\\[.)]\s+(?P<escaped>\S.*)                            # 1\. lamp
    """,
    re.VERBOSE,
)
# Looser forms, which count where at least two lines have one and none has a form above.
_LOOSE = (
    re.compile(
        r"""(?: [(\[\uff08]?\d{1,3}(?:[.):\]\uff0e\uff09\uff1a\u3001](?!\d) | \ufe0f?\u20e3)  # 1.lamp, [1] lamp
        |   [\u2460-\u2473\u2776-\u2793]                                                      # in circles
        )\s*(?P<item>\S.*)""",
        re.VERBOSE,
    ),
    re.compile(
        r"""(?: [-+\u2022\u2023\u2013\u2014](?=[^\W\d]) | \*(?=[^\W\d][^*]*$)                 # -lamp
        |   [\u00b7\u2043\u2219\u25a0-\u25ff\u2605\u2606\u2713\u2714\u2192\u27a2\u27a4\u30fb] # squares, arrows, stars
        )\s*(?P<item>\S.*)""",
        re.VERBOSE,
    ),
)
_NUMBER_WITHIN = re.compile(r"(?:^|\s)\(?(?P<number>\d{1,3})[.)]\s+")
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_FENCED = re.compile(r"^[ \t]*```\w*[ \t]*\n(?P<inside>.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_BEFORE = re.compile(
    r"(?:sure|certainly|of course|ok(?:ay)?)\b.*[.!:]|here(?:['\u2019]s| is| are)\b.*|.*[:\uff1a]",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"(?:let me know|i hope|hope th|feel free|would you like|do you want|(?:is there )?anything else|please note|note:"
    r"|th[ei]se (?:are|items|products|suggestions|recommendations)|enjoy)\b.*[.!?]",
    re.IGNORECASE,
)
_SAYS_LIST = re.compile(r"\b(?:are|is|include|recommend\w*|suggest\w*)\b", re.IGNORECASE)
_SEPARATORS = ((re.compile(r"[;\uff1b]"), 2), (re.compile(r",\s|[\uff0c\u3001]"), 3))
_AND = re.compile(r"(?:and|or|&)\s+", re.IGNORECASE)
_LIST = re.compile(r"^\s*\[", re.MULTILINE)
_STRING = re.compile(
    r"""\s*(?:"(?P<double>(?:[^"\\]|\\.)*)"|'(?P<single>(?:[^'\\]|\\.)*)')\s*(?P<end>,|\]|\Z)"""
)
_OPENING = re.compile(r"[\[{]")
_MOST_OPENINGS = 1_000
_DECODER = json.JSONDecoder()
_TEXT_FIELDS = ("title", "name", "description", "product", "text")
_MARKED = re.compile(r"(?P<mark>\*\*|__|[*_`\"'])(?P<inner>(?:(?!(?P=mark)).)+)(?P=mark)")
_QUOTED = re.compile("\u201c(?P<inner>[^\u201c\u201d]+)\u201d")


def render(template: str, columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The template filled in for each row. Values go in as they are: braces in a title mean nothing.

    Raises ConfigError for anything but plain named fields that exist.
    """
    parts: list[str | Sequence[str]] = []
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"prompt_template {template!r} is no template: {error}; write a brace as {{{{ or }}}}"
        ) from None
    for literal, name, spec, conversion in parsed:
        if literal:
            parts.append(literal)
        if name is not None:
            if name not in columns or spec or conversion:
                raise ConfigError(
                    f"prompt_template {template!r} has the field {name!r}; use plain named fields. "
                    + known_names(name, columns)
                )
            parts.append(columns[name])
    rows = len(next(iter(columns.values())))
    return ["".join(part if isinstance(part, str) else part[row] for part in parts) for row in range(rows)]


def parse_suggestions(answer: str | None, *, limit: int) -> list[str]:
    """The items of a list in an answer: a JSON list, else numbered or bulleted lines, else every line, else what commas
    or semicolons part in the only line.

    Text around the list is dropped, and so are marks of emphasis and repeated items (case and spacing aside).
    """
    text = (answer or "").strip()
    if not text:
        return []
    items = _from_json(text)
    if items is None:
        lines = [line.strip() for line in _FENCE.sub("", text).splitlines()]
        items = _marked_lines(lines) or _quoted_items(text) or _plain_lines(text, lines, limit)
    seen: dict[str, str] = {}
    for item in map(_plain, items):
        if item:
            seen.setdefault(" ".join(item.casefold().split()), item)
    return list(seen.values())[: max(limit, 0)]


def _from_json(text: str) -> list[str] | None:
    """The items of the first JSON list (or of an object's first list) in `text`; None where there is none."""
    for opening in islice(_OPENING.finditer(text), _MOST_OPENINGS):
        try:
            value, _ = _DECODER.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            value = next((item for item in value.values() if isinstance(item, list)), None)
        if isinstance(value, list):
            items = list(_texts(value))
            if items or not value:
                return items
    return None


def _marked_lines(lines: list[str]) -> list[str]:
    """Items of numbered or bulleted lines."""
    found = [match for line in lines if (match := _ITEM.fullmatch(line) or _MARKED_NUMBER.fullmatch(line))]
    items = [
        next(text for name, text in match.groupdict().items() if text and name[:4] != "mark")
        for match in found
    ]
    if len(items) == 1:
        return _numbered_within(found[0].string) or items
    for form in _LOOSE:
        if not items:
            items = [match["item"] for line in lines if (match := form.fullmatch(line))]
            items = items if len(items) > 1 else []
    return items


def _numbered_within(line: str) -> list[str]:
    """Items of a line that has 1., 2. and 3. in it."""
    found = list(_NUMBER_WITHIN.finditer(line))
    if len(found) < 3 or [int(match["number"]) for match in found] != list(range(1, len(found) + 1)):
        return []
    ends = [match.start() for match in found[1:]]
    return [line[match.end() : end] for match, end in zip(found, [*ends, len(line)], strict=True)]


def _quoted_items(text: str) -> list[str]:
    """Items of a list that is not quite JSON: single quotes, a comma before its end, or no end."""
    for opening in islice(_LIST.finditer(text), _MOST_OPENINGS):
        items, at = [], opening.end()
        while found := _STRING.match(text, at):
            items.append(_unescaped(found["double"] or found["single"] or ""))
            at = found.end()
            if found["end"] != ",":
                break
        if items:
            return items
    return []


def _unescaped(text: str) -> str:
    if '"' not in text.replace('\\"', ""):
        with suppress(ValueError):
            return str(json.loads(f'"{text}"'))
    return re.sub(r"\\(.)", r"\1", text)


def _plain_lines(text: str, lines: list[str], limit: int) -> list[str]:
    """Every line, of the code block where there is one, less words before and after; the parts of an only line."""
    if block := _FENCED.search(text):
        lines = [line.strip() for line in block["inside"].splitlines()]
    lines = [line for line in lines if line and not _EMPTY_ITEM.fullmatch(line)]
    if len(lines) > 1 and _BEFORE.fullmatch(lines[0]):
        lines = lines[1:]
    while len(lines) > 1 and _AFTER.fullmatch(lines[-1]):
        lines = lines[:-1]
    return _parts(lines[0]) if len(lines) == 1 and limit > 1 else lines


def _parts(line: str) -> list[str]:
    """What semicolons part, or at least two commas; else the line."""
    before, colon, after = line.partition(":")
    inside = after if colon and _SAYS_LIST.search(before) else line
    for separator, least in _SEPARATORS:
        parts = [part.strip() for part in separator.split(inside.strip().rstrip("."))]
        parts = [part for part in parts if part]
        if len(parts) >= least:
            return [*parts[:-1], parts[-1][found.end() :] if (found := _AND.match(parts[-1])) else parts[-1]]
    return [line]


def _texts(items: Iterable[Any]) -> Iterable[str]:
    for item in items:
        if isinstance(item, dict):
            item = next((item[name] for name in _TEXT_FIELDS if isinstance(item.get(name), str)), None)
        if isinstance(item, str):
            yield item


def _plain(item: str) -> str:
    """An item without Markdown emphasis or quotation marks around all of it."""
    item = " ".join(item.split())
    found = _MARKED.fullmatch(item) or _QUOTED.fullmatch(item)
    return found["inner"].strip() if found else item
