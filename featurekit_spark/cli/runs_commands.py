"""`featurekit runs list | show`: what earlier runs left. Reads their documents; runs and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import Answer, GroupOptions, answering, command_app
from featurekit_spark.cli.wording import counted, counts_table, shown_seconds, table

if TYPE_CHECKING:
    from featurekit_spark.report.store import RunStore

__all__ = ["runs_app"]

runs_app = command_app("runs", "What earlier runs did, and how they ended.")

_SHOWN_ERRORS = 20


@runs_app.command("list")
@answering
def list_command(
    options: GroupOptions,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
) -> Answer:
    """The runs of one merchant and market, newest first.

    Example: featurekit runs list --merchant demo --market US --limit 5
    """
    merchant, market = options.merchant, options.market
    store = _store(options)
    runs = store.runs(merchant, market)[:limit]
    text = _listed(runs) if runs else [_none_text(store, merchant, market)]
    return Answer({"status": "ok", "merchant": merchant, "market": market, "runs": runs}, text)


@runs_app.command("show")
@answering
def show_command(
    options: GroupOptions,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or latest.")],
) -> Answer:
    """What one run did: counts, stages, errors, and where its page is.

    Example: featurekit runs show latest --merchant demo --market US
    """
    store = _store(options)
    document = store.read(options.merchant, options.market, run)
    page = store.page(options.merchant, options.market, document["run_id"])
    return Answer(document, [*_shown(document), f"  page: {page}"])


def _store(options: GroupOptions) -> RunStore:
    from featurekit_spark.report.store import RunStore

    return RunStore(options.settings().warehouse)


def _none_text(store: RunStore, merchant: str, market: str) -> str:
    others = ", ".join(f"{group[0]} in {group[1]}" for group in store.groups()[:10])
    hint = (
        f"there are runs of {others}"
        if others
        else "give --conf-file or --set warehouse=... of those there are"
    )
    return f"no runs of {merchant} in {market} below {store.root}: {hint}"


def _listed(runs: list[dict[str, Any]]) -> Iterator[str]:
    rows = [("started (UTC)", "status", "run date", "products", "computed", "took", "run")]
    for run in runs:
        status = "unchanged" if run.get("unchanged") and run["status"] == "ok" else run["status"]
        counts = (_or_empty(run.get(name)) for name in ("products", "computed_total"))
        took = f"{run.get('wall_seconds') or 0:.1f} s"
        rows.append(
            (_when(run.get("started")), status, run.get("run_date") or "", *counts, took, run["run_id"])
        )
    return table(rows, align="<<<>>><")


def _shown(document: Mapping[str, Any]) -> Iterator[str]:
    day = f" {document['run_date']}" if document.get("run_date") else ""
    yield (
        f"{document['merchant']} {document['market']}{day}: run {document['run_id']}, {document['status']}, began "
        f"{_when(document.get('started'))} UTC and took {shown_seconds(document.get('wall_seconds') or 0)}"
        + (", nothing had changed" if document.get("unchanged") else "")
    )
    if document.get("error"):
        yield f"  ended before its end (exit code {document.get('exit_code')}): {document['error']}"
    yield from counts_table(document.get("builders") or {})
    for stage in document.get("stages") or []:
        yield f"  stage {stage['stage']}: {shown_seconds(stage['seconds'])}"
    for name, sink in (document.get("sinks") or {}).items():
        yield f"  sink {name}: {sink.get('status')}, {counted(sink.get('rows') or 0, 'row')}"
    errors = document.get("errors") or {"first": [], "total": 0}
    for found in errors["first"][:_SHOWN_ERRORS]:
        yield f"  failed: {found['key']}: {found['error']}"
    if errors["total"] > _SHOWN_ERRORS:
        yield f"  failed: {counted(errors['total'] - _SHOWN_ERRORS, 'more key')}"


def _when(instant: Any) -> str:
    return str(instant).replace("T", " ")[:19] if instant else ""


def _or_empty(value: Any) -> str:
    return "" if value is None else str(value)
