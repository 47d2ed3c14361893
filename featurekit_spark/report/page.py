"""Pages of runs: plain HTML text from documents, with no script, no file beside it and nothing fetched.

Owns the look; must not know where pages are kept, nor how a document came about. Everything that a document says is
escaped: names, errors and settings come from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from featurekit_spark.report.style import STYLE

__all__ = ["groups_page", "list_page", "run_page"]

_SHOWN_ERRORS: Final = 25
_COUNTS = ("hit", "computed", "empty", "error", "calls", "tokens", "usd", "seconds")


def run_page(document: Mapping[str, Any]) -> str:
    """The page of one run."""
    merchant, market = document["merchant"], document["market"]
    parts = [
        f'<nav><a href="index.html">Runs of {_text(merchant)} {_text(market)}</a></nav>',
        f"<h1>{_text(merchant)} {_text(market)} {_badge(document)}</h1>",
        _lead(document),
        _said(document),
        _section("Builders", _builders(document.get("builders") or {})),
        _section("Stages", _stages(document.get("stages") or [])),
        _section("Published", _sinks(document.get("sinks") or {})),
        _section("Data", _pairs(document.get("quality") or {})),
        _section("Failed keys", _errors(document.get("errors") or {})),
        _folded("Plan", _pre(document.get("plan"))),
        _folded("Settings", _settings(document.get("settings") or [])),
        _folded("Identities", _identities(document.get("identities") or {})),
        _folded("Versions", _pairs(document.get("versions") or {})),
        _folded("Earlier runs of this name", _earlier(document.get("earlier") or [])),
    ]
    return _page(f"{merchant} {market} {document.get('status')}: run {document['run_id']}", parts)


def list_page(merchant: str, market: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs of one merchant and market, newest first."""
    rows = [
        [
            f'<a href="{_text(run["run_id"])}.html">{_when(run.get("started"))}</a>',
            _badge(run),
            _text(run.get("run_date") or ""),
            _number(run.get("products")),
            _number(run.get("computed_total")),
            _number(run.get("error_total")),
            _number(run.get("calls_total")),
            _seconds(run.get("wall_seconds")),
            f"<code>{_text(run['run_id'])}</code>",
        ]
        for run in runs
    ]
    titles = ["Started (UTC)", "Status", "Run date", "Products", "Computed", "Failed", "Calls", "Took", "Run"]
    parts = [
        '<nav><a href="../../index.html">All merchants</a></nav>',
        f"<h1>{_text(merchant)} {_text(market)}</h1>",
        f'<p class="dim">{len(runs)} runs, newest first.</p>',
        _table(titles, rows, numbers=range(3, 8)),
    ]
    return _page(f"Runs of {merchant} {market}", parts)


def groups_page(groups: Sequence[tuple[str, str]]) -> str:
    """Every merchant and market that has runs."""
    rows = [
        [_text(merchant), f'<a href="{_text(merchant)}/{_text(market)}/index.html">{_text(market)}</a>']
        for merchant, market in groups
    ]
    return _page("Runs", ["<h1>Runs</h1>", _table(["Merchant", "Market"], rows)])


def _lead(document: Mapping[str, Any]) -> str:
    builders = (document.get("builders") or {}).values()
    usd = [counts.get("usd") for counts in builders]
    calls = sum(counts.get("calls") or 0 for counts in builders)
    cost = sum(value or 0 for value in usd) if None not in usd else None
    facts = [
        ("Products", _number(document.get("products"))),
        ("Took", _seconds(document.get("wall_seconds"))),
        ("Computed", _number(sum(counts.get("computed") or 0 for counts in builders))),
        ("Paid calls", _number(calls) + (f" · {cost:,.4f} USD" if cost else "")),
        ("Engine", _text(document.get("engine") or "")),
        ("Started (UTC)", _when(document.get("started"))),
        *([("Run date", _text(document["run_date"]))] if document.get("run_date") else []),
        ("Run", f"<code>{_text(document['run_id'])}</code>"),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts) + "</dl>"


def _said(document: Mapping[str, Any]) -> str:
    if document.get("error"):
        code = document.get("exit_code")
        told = f" <small>exit code {_text(code)}</small>" if code is not None else ""
        return (
            f'<p class="box bad"><b>The run ended before its end.</b>{told}<br>{_text(document["error"])}</p>'
        )
    if document.get("unchanged"):
        return '<p class="box">Nothing had changed: every key was proven by what it read before.</p>'
    return ""


def _builders(builders: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, counts in builders.items():
        cells = [_number(counts.get(column)) for column in _COUNTS[:6]]
        usd = counts.get("usd", 0)
        cells += ["?" if usd is None else f"{usd:,.4f}" if usd else "", f"{counts.get('seconds') or 0:,.2f}"]
        rows.append([f"{_text(name)}{_share(counts)}", *cells])
    return _table(["Builder", *_COUNTS], rows, numbers=range(1, 9))


def _share(counts: Mapping[str, Any]) -> str:
    """A bar of how a builder's keys were answered."""
    kinds = ("hit", "computed", "empty", "error")
    total = sum(counts.get(kind) or 0 for kind in kinds)
    if not total:
        return ""
    pieces = "".join(
        f'<i class="{kind}" style="width:{100 * counts[kind] / total:.2f}%"></i>'
        for kind in kinds
        if counts.get(kind)
    )
    return f'<span class="share">{pieces}</span>'


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    longest = max((stage["seconds"] for stage in stages), default=0.0) or 1.0
    rows = [
        [_text(stage["stage"]) + _bar(stage["seconds"] / longest), _seconds(stage["seconds"])]
        for stage in stages
    ]
    return _table(["Stage", "Took"], rows, numbers=[1])


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * share:.2f}%"></i></span>'


def _sinks(sinks: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, sink in sinks.items():
        rest = {key: value for key, value in sink.items() if key not in ("status", "rows")}
        detail = ", ".join(f"{_text(key)} {_text(value)}" for key, value in rest.items())
        rows.append([_text(name), _text(sink.get("status")), _number(sink.get("rows")), detail])
    return _table(["Output", "Status", "Rows", ""], rows, numbers=[2])


def _errors(errors: Mapping[str, Any]) -> str:
    first, total = errors.get("first") or [], errors.get("total") or 0
    shown = first[:_SHOWN_ERRORS]
    rows = [[f"<code>{_text(found['key'])}</code>", _text(found["error"])] for found in shown]
    more = f'<p class="dim">{total - len(shown):,} more.</p>' if total > len(shown) else ""
    return _table(["Key", "Error"], rows) + more


def _settings(settings: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for setting in settings:
        own = setting["origin"] != "default"
        key, value = f"<code>{_text(setting['key'])}</code>", _text(setting["value"])
        rows.append([f"<b>{key}</b>" if own else key, value, _text(setting["origin"])])
    return _table(["Setting", "Value", "From"], rows)


def _identities(identities: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            _text(name),
            _text(found["version"]),
            f"<code>{_text(found['config_hash'])}</code>",
            _text(found["type"]),
            _text(found["config"]),
        ]
        for name, found in identities.items()
    ]
    return _table(["Builder", "Version", "Config hash", "Value", "Config"], rows)


def _earlier(earlier: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [_when(run.get("started")), _text(run.get("status")), _text(run.get("error") or "")]
        for run in reversed(earlier)
    ]
    return _table(["Started (UTC)", "Status", ""], rows)


def _pairs(pairs: Mapping[str, Any]) -> str:
    rows = [
        [_text(name.replace("_", " ")), _number(value) if isinstance(value, int) else _text(value)]
        for name, value in pairs.items()
    ]
    return _table(["", ""], rows, numbers=[1] if all(isinstance(v, int) for v in pairs.values()) else [])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """Cells are HTML already."""
    if not rows:
        return ""
    right = set(numbers)
    sides = [' class="n"' if at in right else "" for at in range(len(titles))]
    head = "".join(f"<th{side}>{title}</th>" for title, side in zip(titles, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>\n"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(titles) else ""
    return f'<div class="wide"><table>{head}<tbody>\n{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _pre(text: object) -> str:
    return f"<pre>{_text(text)}</pre>" if text else ""


def _badge(document: Mapping[str, Any]) -> str:
    status = str(document.get("status"))
    kind = status if status in ("ok", "partial", "failed") else "other"
    told = "unchanged" if status == "ok" and document.get("unchanged") else status
    return f'<span class="badge {kind}">{_text(told)}</span>'


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else _text(value)


def _seconds(value: Any) -> str:
    if value is None:
        return ""
    if value >= 120:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def _when(instant: Any) -> str:
    return _text(str(instant).replace("T", " ")[:19]) if instant else ""


def _text(value: object) -> str:
    return escape(str(value))


def _page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
