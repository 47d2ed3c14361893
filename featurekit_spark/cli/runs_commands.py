"""`featurekit runs list | show`: what earlier runs left. Reads their documents; runs and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from featurekit_spark.cli.shared import (
    ConfFile,
    Market,
    Merchant,
    Output,
    OutputOption,
    Overrides,
    command_app,
    guarded,
    print_json,
    settings_of,
)

__all__ = ["runs_app"]

runs_app = command_app("runs", "What earlier runs did, and how they ended.")

_COLUMNS = {"hit": 8, "computed": 9, "error": 6, "calls": 7, "seconds": 8}
_SHOWN_ERRORS = 20


@runs_app.command("list")
def list_command(
    merchant: Merchant,
    market: Market,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """The runs of one merchant and market, newest first.

    Example: featurekit runs list --merchant demo --market US --limit 5
    """
    with guarded(output):
        from featurekit_spark.report.store import RunStore

        store = RunStore(settings_of(merchant, market, conf_file, overrides).warehouse)
        runs = store.runs(merchant, market)[:limit]
        if output is Output.JSON:
            print_json({"merchant": merchant, "market": market, "runs": runs})
        else:
            print(
                "\n".join(_listed(runs)) if runs else f"no runs of {merchant} in {market} below {store.root}"
            )


@runs_app.command("show")
def show_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or latest.")],
    merchant: Merchant,
    market: Market,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """What one run did: counts, stages, errors, and where its page is.

    Example: featurekit runs show latest --merchant demo --market US
    """
    with guarded(output):
        from featurekit_spark.report.store import RunStore

        store = RunStore(settings_of(merchant, market, conf_file, overrides).warehouse)
        document = store.read(merchant, market, run)
        if output is Output.JSON:
            print_json(document)
        else:
            page = store.page(merchant, market, document["run_id"])
            print("\n".join([*_shown(document), f"  page: {page}"]))


def _listed(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'started (UTC)':<19}  {'status':<9}  {'run date':<10}  {'products':>9}  {'computed':>9}  {'took':>9}  run"
    for run in runs:
        status = "unchanged" if run.get("unchanged") and run["status"] == "ok" else run["status"]
        yield (
            f"{_when(run.get('started')):<19}  {status:<9}  {run.get('run_date') or '':<10}  "
            f"{_or_empty(run.get('products')):>9}  {_or_empty(run.get('computed_total')):>9}  "
            f"{run.get('wall_seconds') or 0:>7.1f} s  {run['run_id']}"
        )


def _shown(document: Mapping[str, Any]) -> Iterator[str]:
    day = f" {document['run_date']}" if document.get("run_date") else ""
    yield (
        f"{document['merchant']} {document['market']}{day}: run {document['run_id']}, {document['status']}, began "
        f"{_when(document.get('started'))} UTC and took {document.get('wall_seconds') or 0:.1f} s"
        + (", nothing had changed" if document.get("unchanged") else "")
    )
    if document.get("error"):
        yield f"  ended before its end (exit code {document.get('exit_code')}): {document['error']}"
    builders = document.get("builders") or {}
    if builders:
        width = max(len(name) for name in builders)
        yield f"  {'builder':<{width}}" + "".join(f" {name:>{w}}" for name, w in _COLUMNS.items())
        for name, counts in builders.items():
            cells = (f" {_or_empty(counts.get(column)):>{w}}" for column, w in _COLUMNS.items())
            yield f"  {name:<{width}}" + "".join(cells)
    for stage in document.get("stages") or []:
        yield f"  stage {stage['stage']}: {stage['seconds']:.2f} s"
    for name, sink in (document.get("sinks") or {}).items():
        yield f"  sink {name}: {sink.get('status')}, {sink.get('rows')} rows"
    errors = document.get("errors") or {"first": [], "total": 0}
    for found in errors["first"][:_SHOWN_ERRORS]:
        yield f"  failed: {found['key']}: {found['error']}"
    if errors["total"] > _SHOWN_ERRORS:
        yield f"  failed: {errors['total'] - _SHOWN_ERRORS} more keys"


def _when(instant: Any) -> str:
    return str(instant).replace("T", " ")[:19] if instant else ""


def _or_empty(value: Any) -> str:
    return "" if value is None else str(value)
