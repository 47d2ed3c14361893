"""Pages that lead to runs: those of one merchant and market, and every merchant and market.

Owns their look and who comes before and after whom. Must not know where pages are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from featurekit_spark.report.elements import (
    ANSWERS,
    answer_bar,
    badge,
    number,
    page,
    seconds,
    shown_time,
    table,
    text,
    usd,
)

__all__ = ["groups_page", "list_page", "neighbours"]

_SHOWN_RUNS = 100
_SHOWN_ERROR = 110


def list_page(merchant: str, market: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs of one merchant and market, newest first."""
    priced = any(run.get("usd_total", 0) != 0 for run in runs)
    titles = ["Started (UTC)", "Status", "Products", "Hit", "Computed", "Failed keys", "Calls"]
    titles += [*(["USD"] if priced else []), "Took"]
    rows = []
    for run in runs[:_SHOWN_RUNS]:
        day = f" for {text(run['run_date'])}" if run.get("run_date") else ""
        link = f'<a href="{text(run["run_id"])}.html">{shown_time(run.get("started"))}</a>'
        error = f"<small>{text(_short(str(run['error'])))}</small>" if run.get("error") else ""
        made = (run.get("computed_total") or 0) + (run.get("updated_total") or 0)
        answers = answer_bar({kind: run.get(f"{kind}_total") for kind in ANSWERS})
        cells = [f"{link}<small><code>{text(run['run_id'])}</code>{day}</small>", badge(run) + error]
        cells += [number(run.get("products")), number(run.get("hit_total")), number(made) + answers]
        cells += [number(run.get("failed_keys")), number(run.get("calls_total"))]
        cells += [usd(run["usd_total"]) if run.get("usd_total", 0) != 0 else "0"] if priced else []
        rows.append([*cells, seconds(run.get("wall_seconds"))])
    count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    more = f" Here are {_SHOWN_RUNS}; <code>featurekit runs list</code> names the others."
    more = more if len(runs) > _SHOWN_RUNS else ""
    parts = [
        '<nav aria-label="Runs"><a href="../../index.html">All merchants</a></nav>',
        f"<h1>Runs of {text(merchant)} {text(market)}</h1>",
        f'<p class="dim">{count}, newest first. Hit and computed (with updated) are summed over builders.{more}</p>',
        table("Runs", titles, rows, numbers=range(2, len(titles))),
    ]
    return page(f"Runs of {merchant} {market}", parts)


def groups_page(groups: Sequence[tuple[str, str]]) -> str:
    """Every merchant and market that has runs."""
    rows = []
    for merchant, markets in groupby(groups, key=lambda group: group[0]):
        links = [
            f'<a href="{text(merchant)}/{text(market)}/index.html">{text(market)}</a>'
            for _, market in markets
        ]
        rows.append([text(merchant), " · ".join(links)])
    told = f'<p class="dim">{len(groups)} {"group" if len(groups) == 1 else "groups"} of a merchant and a market.</p>'
    return page("Runs", ["<h1>Runs</h1>", told, table("Merchants", ["Merchant", "Markets"], rows)])


def neighbours(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str | None, str | None]]:
    """By run the names of those before and after it in time. `runs`: newest first."""
    names = [None, *(run["run_id"] for run in runs), None]
    return {run["run_id"]: (names[at + 2], names[at]) for at, run in enumerate(runs)}


def _short(told: str) -> str:
    return told if len(told) <= _SHOWN_ERROR else told[: _SHOWN_ERROR - 1] + "…"
