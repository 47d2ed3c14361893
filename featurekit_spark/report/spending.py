"""What calls of models took, as bars in tables: of one run by builder, and day by day over the last runs.

Knows counts and summaries of runs; must not know how a document or a page is kept. The tables say all that bars show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from featurekit_spark.report.elements import bar, name, number, table, text, usd

__all__ = ["by_day", "spending"]

_SHOWN_DAYS: Final = 14


def by_day(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sums of summaries of runs, oldest day first; only the last days on which a call was made. `usd` and `tokens` are
    None where one of the runs does not tell; `failed_attempts` are told where there were any."""
    days: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run.get("calls_total") and run.get("started"):
            days.setdefault(str(run["started"])[:10], []).append(run)
    return [
        {
            "day": day,
            "runs": len(days[day]),
            "calls": sum(run["calls_total"] for run in days[day]),
            "tokens": _sum(days[day], "tokens_total"),
            "usd": _sum(days[day], "usd_total"),
            **_failed_attempts(days[day]),
        }
        for day in sorted(days)[-_SHOWN_DAYS:]
    ]


def spending(builders: Mapping[str, Mapping[str, Any]], days: Sequence[Mapping[str, Any]]) -> str:
    """The part of a page, nothing where no call was made."""
    paid = [{**counts, "what": name(it)} for it, counts in builders.items() if counts.get("calls")]
    daily = [{**day, "what": f"<time>{text(day['day'])}</time>"} for day in days]
    of_run = _chart("Calls of this run", "Builder", paid)
    told = '<p class="dim">Of this merchant and market, day by day (UTC), over its last runs with calls:</p>'
    return of_run + (told + _chart("Calls by day", "Day", daily, runs=True) if daily else "")


def _chart(label: str, title: str, rows: Sequence[Mapping[str, Any]], *, runs: bool = False) -> str:
    """A table whose second column is a bar against the greatest row: of usd where all rows have some, else of tokens,
    else of calls."""
    measure = next(
        (which for which in ("usd", "tokens") if all(row.get(which) for row in rows)),
        "calls",
    )
    most = max((row[measure] for row in rows), default=0) or 1
    shown = {"usd": "USD", "tokens": "Tokens", "calls": "Calls"}[measure]
    in_vain = any(row.get("failed_attempts") for row in rows)
    titles = [title, f"{shown}, as bars", *(["Runs"] if runs else []), "Calls"]
    titles += [*(["Failed attempts"] if in_vain else []), "Tokens", "USD"]
    cells = [
        [
            row["what"],
            bar(row[measure] / most),
            *([number(row["runs"])] if runs else []),
            number(row["calls"]),
            *([number(row.get("failed_attempts") or 0)] if in_vain else []),
            "unknown" if row.get("tokens") is None else number(row["tokens"]),
            usd(row.get("usd")),
        ]
        for row in rows
    ]
    return table(label, titles, cells, numbers=range(2, len(titles)))


def _failed_attempts(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    failed = sum(run.get("failed_attempts_total") or 0 for run in runs)
    return {"failed_attempts": failed} if failed else {}


def _sum(runs: Sequence[Mapping[str, Any]], which: str) -> Any:
    amounts = [run.get(which) for run in runs]
    known = [amount for amount in amounts if amount is not None]
    return round(sum(known), 6) if len(known) == len(amounts) else None
