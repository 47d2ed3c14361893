"""Parts of a run's page that tell what a run was, not how it went: settings, identities, versions, plan, earlier runs.

Makes tables of parts of a document; where they stand on the page is the page's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from featurekit_spark.report.elements import cut, name, shown_time, table, text

__all__ = [
    "LONG",
    "contrast",
    "earlier_runs",
    "identities_table",
    "pairs_table",
    "plan_text",
    "settings_table",
]

Document = Mapping[str, Any]

LONG: Final = 400
"""How many characters of one text a page shows; the document has all of it."""

_SHOWN_RUNS: Final = 25


def settings_table(settings: Sequence[Document]) -> str:
    """Every setting with its origin, those that somebody set first."""
    own = [setting for setting in settings if setting["origin"] != "default"]
    rows = []
    for setting in [*own, *(setting for setting in settings if setting["origin"] == "default")]:
        origin, value = text(setting["origin"]), setting["value"]
        rows.append(
            [
                f"<code>{text(setting['key'])}</code>",
                _or_none(value),
                f"<b>{origin}</b>" if setting in own else origin,
            ]
        )
    return table("Settings", ["Setting", "Value", "From"], rows)


def identities_table(identities: Mapping[str, Document]) -> str:
    """What each builder's entries are found by."""
    rows = [
        [
            name(builder),
            text(found["version"]),
            f"<code>{cut(found['config_hash'], 64)}</code>",
            cut(found["type"], LONG),
            cut(found["config"], LONG),
        ]
        for builder, found in identities.items()
    ]
    return table("Identities", ["Builder", "Version", "Config hash", "Value", "Config"], rows)


def earlier_runs(earlier: Sequence[Document]) -> str:
    """Runs of the same name that this one replaced, newest first."""
    rows = [
        [shown_time(run.get("started")), text(run.get("status")), cut(run.get("error") or "", LONG)]
        for run in reversed(earlier[-_SHOWN_RUNS:])
    ]
    return table("Earlier runs", ["Started (UTC)", "Status", "Error"], rows)


def pairs_table(label: str, titles: tuple[str, str], pairs: Document) -> str:
    """Names and what they stand for."""
    return table(label, titles, [[text(key), text(value)] for key, value in pairs.items()])


def plan_text(plan: object) -> str:
    """The plan as `featurekit plan` draws it."""
    return f'<pre tabindex="0">{cut(plan, 12_000)}</pre>' if plan else ""


def contrast(before: object, now: object) -> tuple[str, str]:
    """Both as text; of long ones, the part in which they differ."""
    if before is None or now is None:
        return _or_none(before), _or_none(now)
    old, new = str(before), str(now)
    if max(len(old), len(new)) <= 160:
        return text(old), text(new)
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    start = max(0, same - 40)
    lead = "… " if start else ""
    return lead + cut(old[start:], 160), lead + cut(new[start:], 160)


def _or_none(value: object) -> str:
    return '<span class="dim">none</span>' if value is None else cut(value, LONG)
