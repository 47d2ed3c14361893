"""Text in and out of the model: rendering prompts, and reading a list out of an answer. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from featurekit_spark.errors import ConfigError, known_names

__all__ = ["parse_suggestions", "render"]

_BULLET = r"\s*(?:\(?\d{1,3}[.):]|[-*+\u2022\u2023\u2013\u2014])"
_ITEM = re.compile(rf"{_BULLET}\s+(?P<item>.*\S)\s*")
_EMPTY_ITEM = re.compile(rf"{_BULLET}\s*")
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_OPENING = re.compile(r"[\[{]")
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
    """The items of a list in an answer: a JSON list, else numbered or bulleted lines; without any, every
    line.

    Text around the list is dropped, and so are marks of emphasis and repeated items (case and spacing aside).
    """
    text = (answer or "").strip()
    if not text:
        return []
    items = _from_json(text)
    if items is None:
        lines = _FENCE.sub("", text).splitlines()
        items = [found["item"] for line in lines if (found := _ITEM.fullmatch(line))]
        items = items or [line for line in lines if not _EMPTY_ITEM.fullmatch(line)]
    seen: dict[str, str] = {}
    for item in map(_plain, items):
        if item:
            seen.setdefault(" ".join(item.casefold().split()), item)
    return list(seen.values())[: max(limit, 0)]


def _from_json(text: str) -> list[str] | None:
    """The items of the first JSON list (or of an object's first list) in `text`; None where there is none."""
    for opening in _OPENING.finditer(text):
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
