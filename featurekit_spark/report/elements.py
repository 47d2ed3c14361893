"""Pieces of HTML that pages of runs are made of: tables, bars, badges, numbers and times, and the frame around a page.

Whatever comes in as data is escaped here. Knows no documents, and no place to write to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from featurekit_spark.report.style import STYLE

__all__ = [
    "ANSWERS",
    "answer_bar",
    "badge",
    "bar",
    "cut",
    "name",
    "number",
    "page",
    "quiet",
    "seconds",
    "section",
    "shown_time",
    "table",
    "text",
    "usd",
]

ANSWERS: Final = ("hit", "updated", "computed", "empty", "error")
"""How keys were answered, in the order in which bars show it."""

_STATUSES = ("ok", "partial", "stopped", "failed")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def text(value: object) -> str:
    """`value` as HTML text, fit for attributes as well."""
    return escape(str(value))


def cut(value: object, length: int) -> str:
    """`value` as HTML text of at most so many characters; what was cut off is told."""
    told = str(value)
    if len(told) <= length:
        return escape(told)
    return f'{escape(told[:length])}<span class="dim">… and {len(told) - length:,} characters more</span>'


def name(value: object) -> str:
    """A class's name, which a narrow column may break between its words."""
    return "<wbr>".join(escape(part) for part in _HUMP.split(str(value)))


def number(value: Any) -> str:
    """With thousands apart; nothing for None."""
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else escape(str(value))


def quiet(count: Any) -> str:
    """A number; zeros stand back, so that the others are seen."""
    return number(count) if count else '<span class="dim">0</span>'


def usd(value: float | None) -> str:
    """An amount of money; None where no price is known."""
    if value is None:
        return '<span title="no price is known for a model that was called">unknown</span>'
    return f"{value:,.2f}" if value >= 100 else f"{value:.4f}" if value else "0"


def seconds(value: Any) -> str:
    """A span of time, as exact as one reads it."""
    if value is None:
        return ""
    if value >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.005 else "0 s"


def shown_time(instant: Any) -> str:
    """Date and time to the second, in UTC as it is kept."""
    if not instant:
        return ""
    told = str(instant)
    return f"<time>{escape(told.replace('T', ' ')[:19])}</time>"


def badge(run: Mapping[str, Any]) -> str:
    """How a run ended, as a word in a coloured frame."""
    status = str(run.get("status"))
    told = "unchanged" if status == "ok" and run.get("unchanged") else status
    return f'<span class="badge {status if status in _STATUSES else "other"}">{escape(told)}</span>'


def bar(share: float) -> str:
    """A bar of `share` of its column's width."""
    return f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'


def answer_bar(counts: Mapping[str, Any]) -> str:
    """A bar of how keys were answered; nothing where none was asked for."""
    found = {kind: counts.get(kind) or 0 for kind in ANSWERS}
    total = sum(found.values())
    if not total:
        return ""
    told = ", ".join(f"{count:,} {kind}" for kind, count in found.items() if count)
    pieces = "".join(
        f'<i class="{kind}" style="width:{100 * count / total:.1f}%"></i>'
        for kind, count in found.items()
        if count
    )
    return f'<span class="share" role="img" aria-label="{told}">{pieces}</span>'


def table(
    label: str, titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Iterable[int] = ()
) -> str:
    """A table, nothing where it has no rows. Titles and cells are HTML already; the first cell of a row names it."""
    if not rows:
        return ""
    right = set(numbers)
    sides = [' class="n"' if at in right else "" for at in range(len(titles))]
    head = "".join(f'<th scope="col"{side}>{title}</th>' for title, side in zip(titles, sides, strict=True))
    body = "".join(
        f'<tr><th scope="row"{sides[0]}>{row[0]}</th>'
        + "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row[1:], sides[1:], strict=True))
        + "</tr>\n"
        for row in rows
    )
    # What scrolls sideways on a narrow screen has to be reachable by keyboard.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def section(title: str, body: str, *, folded: bool = False) -> str:
    """A part of a page under a heading, nothing without a body. Folded: shown on a click."""
    if not body:
        return ""
    if folded:
        return f"<details><summary><h2>{title}</h2></summary>{body}</details>"
    return f"<section><h2>{title}</h2>{body}</section>"


def page(title: str, parts: Iterable[str], *, links: str = "") -> str:
    """A whole page: one file, which fetches nothing and runs nothing. `links` go to its head."""
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
{links}<style>
{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
