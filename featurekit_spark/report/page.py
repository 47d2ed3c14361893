"""The page of one run: plain HTML from its document, with no script, no file beside it and nothing fetched.

Owns what is shown and in which order: how it ended, what failed, what was computed and why, then details to unfold.
Must not know where pages are kept, nor how a document came about. Everything that a document says is escaped: names,
errors and settings come from outside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from featurekit_spark.report.details import (
    LONG,
    contrast,
    earlier_runs,
    identities_table,
    pairs_table,
    plan_text,
    settings_table,
)
from featurekit_spark.report.elements import (
    ANSWERS,
    answer_bar,
    badge,
    bar,
    cut,
    name,
    number,
    page,
    quiet,
    seconds,
    section,
    shown_time,
    table,
    text,
    usd,
)
from featurekit_spark.report.spending import spending

__all__ = ["run_page"]

Document = Mapping[str, Any]

_SHOWN_ERRORS: Final = 25
_SHOWN_CAUSES: Final = 10
_SHOWN_WARNINGS: Final = 10

_MEANING: Final = {
    "hit": "the cache had the answer",
    "updated": "carried over from the value before",
    "computed": "built in this run",
    "empty": "an input has no value",
    "error": "its build failed, or an input did",
}
_TITLES: Final = {
    "hit": "Hit",
    "updated": "Updated",
    "computed": "Computed",
    "empty": "Empty",
    "error": "Failed",
}

_SHORT: Final = 0.01
"""Stages that took a smaller share of the time are told in one line."""

_EXIT_CODES: Final = {
    1: "a bug",
    2: "usage",
    3: "configuration",
    4: "data quality",
    6: "quota spent",
    75: "run it again",
}

_WHERE = re.compile(r'^([\w.]+)\[.*?(?:"|\d|null|true|false)\]: ', re.DOTALL)
"""Builder and key before an error's cause."""


def run_page(document: Document, *, before: str | None = None, after: str | None = None) -> str:
    """The page of one run. `before` and `after`: names of the runs of its merchant and market around it."""
    merchant, market, run_id = document["merchant"], document["market"], document["run_id"]
    settings = document.get("settings") or []
    own = sum(1 for setting in settings if setting["origin"] != "default")
    parts = [
        _nav(merchant, market, before, after),
        f"<h1>{text(merchant)} {text(market)} {badge(document)}</h1>",
        _subtitle(document),
        _ending(document),
        _warnings(document.get("warnings") or []),
        _facts(document),
        section("Failed keys", _errors(document.get("errors") or {})),
        section("Builders", _builders(document)),
        section("Cost", spending(document.get("builders") or {}, document.get("spending") or [])),
        section("Since the run before", _since(document.get("since") or {}, document)),
        section("Published", _sinks(document.get("sinks") or {}, document)),
        section("Data", _counted(document.get("quality") or {})),
        section("Time", _times(document)),
        section("Plan", plan_text(document.get("plan")), folded=True),
        section(f"Settings ({own} of {len(settings)} set)", settings_table(settings), folded=True),
        section("Identities", identities_table(document.get("identities") or {}), folded=True),
        section(
            "Versions",
            pairs_table("Versions", ("Software", "Version"), document.get("versions") or {}),
            folded=True,
        ),
        section("Earlier runs of this name", earlier_runs(document.get("earlier") or []), folded=True),
    ]
    links = "".join(
        f'<link rel="{kind}" href="{text(run)}.html">\n'
        for kind, run in (("prev", before), ("next", after))
        if run
    )
    return page(f"{merchant} {market} {document.get('status')}: run {run_id}", parts, links=links)


def _nav(merchant: object, market: object, before: str | None, after: str | None) -> str:
    ways = (
        [f'<a rel="prev" href="{text(before)}.html" title="{text(before)}">← Run before</a>']
        if before
        else []
    )
    ways += (
        [f'<a rel="next" href="{text(after)}.html" title="{text(after)}">Run after →</a>'] if after else []
    )
    around = f"<span>{' '.join(ways)}</span>" if ways else ""
    runs = f'<a href="index.html">Runs of {text(merchant)} {text(market)}</a>'
    up = f'<span><a href="../../index.html">All merchants</a> {runs}</span>'
    return f'<nav aria-label="Runs">{up}{around}</nav>'


def _subtitle(document: Document) -> str:
    run_id = text(document["run_id"])
    told = [
        f"Run <code>{run_id}</code>",
        *([f"for {text(document['run_date'])}"] if document.get("run_date") else []),
        f"started {shown_time(document.get('started'))} UTC",
        *([f"{text(document['engine'])} engine"] if document.get("engine") else []),
        f'<a href="{run_id}.json">its record (JSON)</a>',
    ]
    return f'<p class="sub">{" · ".join(told)}</p>'


def _ending(document: Document) -> str:
    """The one sentence for whoever was called because of this run."""
    failed, products = (document.get("errors") or {}).get("total") or 0, document.get("products")
    if document.get("error"):
        code = document.get("exit_code")
        means = f": {_EXIT_CODES[code]}" if code in _EXIT_CODES else ""
        told = f" <small>exit code {text(code)}{means}</small>" if code is not None else ""
        stopped = document.get("status") == "stopped"
        head = "The run stopped at its own limit." if stopped else "The run ended before its end."
        kind = "warn" if stopped else "bad"
        return f'<p class="box {kind}"><b>{head}</b>{told}<br>{cut(document["error"], 4 * LONG)}</p>'
    if failed:
        of = f" of {products:,}" if products else ""
        return f'<p class="box warn"><b>{failed:,}{of} keys failed.</b> The others have their answers.</p>'
    if document.get("unchanged"):
        return '<p class="box"><b>Nothing had changed.</b> Every key was proven by what it read before.</p>'
    return ""


def _warnings(warnings: Sequence[object]) -> str:
    shown = "".join(f"<li>{cut(warning, LONG)}</li>" for warning in warnings[:_SHOWN_WARNINGS])
    more = len(warnings) - _SHOWN_WARNINGS
    shown += f"<li>{more:,} more.</li>" if more > 0 else ""
    return f'<div class="box warn"><b>Warnings</b><ul>{shown}</ul></div>' if warnings else ""


def _facts(document: Document) -> str:
    total = {kind: _sum(document, kind) for kind in (*ANSWERS, "calls", "tokens", "failed_attempts")}
    answered = sum(total[kind] for kind in ANSWERS)
    share = f" <small>{100 * total['hit'] / answered:.0f} %</small>" if answered else ""
    amounts = [counts.get("usd", 0) for counts in (document.get("builders") or {}).values()]
    known = usd(None if None in amounts else sum(amounts))
    failed = (document.get("errors") or {}).get("total") or 0
    facts = [
        ("Products", number(document.get("products")) + _products_moved(document) or "not known"),
        *([("Failed keys", f'<b class="bad">{failed:,}</b>')] if failed else []),
        ("Took", seconds(document.get("wall_seconds"))),
        ("Hits", number(total["hit"]) + share),
        *([("Updated", number(total["updated"]))] if total["updated"] else []),
        ("Computed", number(total["computed"])),
        ("Paid calls", number(total["calls"])),
        *([("Failed attempts", number(total["failed_attempts"]))] if total["failed_attempts"] else []),
        *([("Tokens", number(total["tokens"])), ("USD", known)] if total["calls"] else []),
    ]
    return (
        "<dl>" + "".join(f"<div><dt>{title}</dt><dd>{value}</dd></div>" for title, value in facts) + "</dl>"
    )


def _products_moved(document: Document) -> str:
    now, then = document.get("products"), (document.get("since") or {}).get("products")
    return (
        f" <small>{now - then:+,}</small>".replace("-", "\u2212")
        if now is not None and then is not None and now != then
        else ""
    )


def _errors(errors: Document) -> str:
    """Causes first: a thousand keys mostly fail for a few reasons."""
    first, total = errors.get("first") or [], errors.get("total") or 0
    causes: dict[str, list[str]] = {}
    for found in first:
        causes.setdefault(_WHERE.sub(r"\1: ", found["error"]), []).append(found["key"])
    most = sorted(causes.items(), key=lambda cause: -len(cause[1]))
    rows = [
        [
            cut(cause, LONG),
            number(len(keys)),
            "<br>".join(f"<code>{cut(key, 120)}</code>" for key in keys[:3]),
        ]
        for cause, keys in most[:_SHOWN_CAUSES]
    ]
    counted = f"Among the first {len(first):,} of {total:,} failed keys. " if total > len(first) else ""
    others = f"{len(most) - _SHOWN_CAUSES:,} more errors. " if len(most) > _SHOWN_CAUSES else ""
    note = f'<p class="dim">{counted}{others}</p>' if counted or others else ""
    each = [
        [f"<code>{cut(found['key'], 120)}</code>", cut(found["error"], LONG)]
        for found in first[:_SHOWN_ERRORS]
    ]
    more = f'<p class="dim">{total - len(each):,} more.</p>' if total > len(each) else ""
    listed = table("Failed keys", ["Key", "Error"], each) + more
    folded = f"<details><summary>Key by key</summary>{listed}</details>" if len(first) > len(most) else more
    return table("Errors", ["Error", "Keys", "Such as"], rows, numbers=[1]) + note + folded if first else more


def _builders(document: Document) -> str:
    builders = document.get("builders") or {}
    asked = {
        builder: counts for builder, counts in builders.items() if any(counts.get(kind) for kind in ANSWERS)
    }
    # Columns of nothing but zeros would push the others off a narrow screen.
    kinds = [kind for kind in ANSWERS if kind in ("hit", "computed") or _sum(document, kind)]
    paid = bool(_sum(document, "calls") or any(counts.get("usd", 0) != 0 for counts in builders.values()))
    titles = [
        "Builder",
        *(_TITLES[kind] for kind in kinds),
        *(["Calls", "Tokens", "USD"] if paid else []),
        "Build time",
    ]
    rows = []
    for builder, counts in asked.items():
        cells = [name(builder) + answer_bar(counts), *(quiet(counts.get(kind)) for kind in kinds)]
        if paid:
            cells += [quiet(counts.get("calls")), quiet(counts.get("tokens"))]
            cells.append(usd(counts.get("usd", 0)) if counts.get("calls") else quiet(0))
        rows.append([*cells, seconds(counts.get("seconds") or 0)])
    legend = " ".join(
        f'<span><i class="{kind}"></i>{_TITLES[kind].lower()}: {_MEANING[kind]}</span>'
        for kind in kinds
        if _sum(document, kind)
    )
    rest = [name(builder) for builder in builders if asked and builder not in asked]
    idle = f'<p class="dim">Not asked for anything: {", ".join(rest)}.</p>' if rest else ""
    shown = table("Builders", titles, rows, numbers=range(1, len(titles)))
    return (f'<p class="legend">{legend}</p>{shown}' if rows else "") + idle


def _since(since: Document, document: Document) -> str:
    """What may be the reason for what was computed."""
    if not since:
        return ""
    run = f'<a href="{text(since["run_id"])}.html">{text(since["run_id"])}</a> ({text(since["status"])})'
    changes = since.get("changes") or []
    made = sum(_sum(document, kind) for kind in ("computed", "updated", "error"))
    if changes:
        told = f"<p>Different from {run}:</p>"
    elif made:
        told = (
            f"<p>Builders, settings and software are those of {run}: what was computed comes of changed data, of "
            "answers that expired, or of keys without an answer.</p>"
        )
    else:
        told = f"<p>Builders, settings and software are those of {run}.</p>"
    rows = [[text(change["what"]), *contrast(change["before"], change["now"])] for change in changes]
    target = next(reversed(document.get("builders") or {}), None)
    ask = (
        f"featurekit explain {target} --run {document['run_id']} --key KEY "
        f"--merchant {document['merchant']} --market {document['market']}"
    )
    why = f"<p>Why one key was computed: <code>{text(ask)}</code></p>" if made and target else ""
    return told + table("Changes", ["What", "Before", "Now"], rows) + why


def _sinks(sinks: Mapping[str, Document], document: Document) -> str:
    rows = []
    for sink, told in sinks.items():
        known = ("status", "rows", "covered", "seconds", "run_id")
        details = [f"{text(key)} {text(value)}" for key, value in told.items() if key not in known]
        run = told.get("run_id")
        if run and run != document["run_id"]:
            details.insert(0, f'holds what <a href="{text(run)}.html">{text(run)}</a> gave it')
        cells = [text(told.get("status")), number(told.get("rows")), number(told.get("covered"))]
        rows.append([text(sink), *cells, seconds(told.get("seconds")), ", ".join(details)])
    return table(
        "Outputs", ["Output", "Status", "Rows", "With an answer", "Took", "Where"], rows, numbers=[2, 3, 4]
    )


def _counted(counts: Document) -> str:
    each = (
        f"<div><dt>{text(what.replace('_', ' '))}</dt><dd>{quiet(count)}</dd></div>"
        for what, count in counts.items()
    )
    return f'<dl class="small">{"".join(each)}</dl>' if counts else ""


def _times(document: Document) -> str:
    spent = [(name(stage["stage"]), stage["seconds"]) for stage in document.get("stages") or []]
    sinks = document.get("sinks") or {}
    spent += [
        (f"publish {text(sink)}", told["seconds"]) for sink, told in sinks.items() if told.get("seconds")
    ]
    rest = (document.get("wall_seconds") or 0) - sum(took for _, took in spent)
    if not spent:
        return ""
    spent += [("outside of finished stages", rest)] if rest > 0 else []
    total = sum(took for _, took in spent) or 1.0
    rows = [[what, seconds(took), bar(took / total)] for what, took in spent if took >= _SHORT * total]
    short = [took for _, took in spent if took < _SHORT * total]
    if short:
        told = f"{len(short)} shorter {'one' if len(short) == 1 else 'ones'}"
        rows.append([f'<span class="dim">{told}</span>', seconds(sum(short)), bar(sum(short) / total)])
    return table("Time", ["Stage", "Took", "Share"], rows, numbers=[1])


def _sum(document: Document, kind: str) -> int:
    return sum(counts.get(kind) or 0 for counts in (document.get("builders") or {}).values())
