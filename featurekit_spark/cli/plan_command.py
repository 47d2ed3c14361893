"""`featurekit plan`, and `featurekit run --dry-run`: what a run would do and cost, before it does.

Owns how an estimate is printed and when it fails a build. What is counted is in `estimate`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.cli.shared import (
    ConfFile,
    Engine,
    Market,
    Merchant,
    Output,
    OutputOption,
    Overrides,
    guarded,
    print_json,
    settings_of,
)

if TYPE_CHECKING:
    from featurekit_spark.changes import Change
    from featurekit_spark.estimate import BuilderEstimate, PlanEstimate

__all__ = ["plan_command", "show_plan"]

_COLUMNS = {"hit": 8, "stale": 7, "miss": 8, "error": 6, "calls": 8, "tokens": 10, "usd": 10, "seconds": 9}


def plan_command(
    merchant: Merchant,
    market: Market,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    run_date: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The date the run would take for today.")
    ] = None,
    engine: Engine = None,
    fail_over_usd: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 6 where the run would cost more, or nobody knows what it costs."),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say what a run would compute and pay, per builder, without doing it.

    Sources are read; nothing is written, paid or started. Exit codes as of `run`; 6 with --fail-over-usd exceeded.

    Example: featurekit plan --merchant demo --market US --conf-file conf/dev.yaml
    """
    day = run_date.date() if run_date else None
    show_plan(merchant, market, conf_file, overrides, engine, day, fail_over_usd=fail_over_usd, output=output)


def show_plan(
    merchant: str,
    market: str,
    conf_file: Path | None,
    overrides: list[str] | None,
    engine: str | None,
    run_date: date | None,
    *,
    fail_over_usd: float | None = None,
    output: Output = Output.TEXT,
) -> None:
    """Print the estimate of a run; raises typer.Exit where it cannot be made or is over the limit."""
    with guarded(output):
        settings = settings_of(merchant, market, conf_file, overrides, engine)
        from featurekit_spark.bootstrap import Bootstrap

        with progress_line() as progress:
            boot = Bootstrap(settings, merchant=merchant, market=market, run_date=run_date, progress=progress)
            try:
                keys = boot.get_logic_keys()
                targets = [builder.over(keys) for builder in boot.get_logic_builders()]
                estimate = boot.get_session().estimate(*targets, merchant=merchant, market=market)
            finally:
                boot.close()
        over = _over(estimate, fail_over_usd)
        if output is Output.JSON:
            print_json(
                _facts(estimate) | ({"status": "failed", "error": over, "exit_code": 6} if over else {})
            )
        else:
            print(_text(estimate), flush=True)
        for warning in estimate.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if over:
            print(f"error: {over}", file=sys.stderr)
            raise typer.Exit(ExitCode.BUDGET)


def _over(estimate: PlanEstimate, limit: float | None) -> str | None:
    """What to say where the run may cost more than `limit` usd."""
    if limit is None:
        return None
    if estimate.usd is None:
        names = ", ".join(builder.name for builder in estimate.builders if builder.usd is None)
        return (
            f"nobody knows whether this run stays below {limit} usd: {names} would make calls, and no entry of theirs "
            "has a price. Run a few keys first, or leave out --fail-over-usd."
        )
    if estimate.usd > limit:
        return f"this run would cost {_money(estimate.usd)} usd, more than --fail-over-usd {limit}"
    return None


def _facts(estimate: PlanEstimate) -> dict[str, Any]:
    builders = {builder.name: asdict(builder) for builder in estimate.builders}
    for facts in builders.values():
        del facts["name"]
    return {
        "status": "ok",
        **estimate.group,
        "products": estimate.keys,
        "unchanged": estimate.unchanged,
        "estimated": estimate.estimated,
        "calls": estimate.calls,
        "tokens": estimate.tokens,
        "usd": estimate.usd,
        "seconds": estimate.seconds,
        "builders": builders,
        "warnings": list(estimate.warnings),
        "changes": [
            {
                "builder": change.builder,
                "kinds": list(change.kinds),
                "adoptable": change.adoptable,
                "told": str(change),
            }
            for change in estimate.changes
        ],
    }


def _text(estimate: PlanEstimate) -> str:
    head = f"{' '.join(map(str, estimate.group.values()))}: {estimate.keys} products"
    if estimate.unchanged:
        lines = [f"{head}, all proven unchanged: a run would compute nothing"]
    else:
        about = "about " if any(b.estimated for b in estimate.builders if b.paid) else ""
        paid = f"{about}{estimate.calls} calls ({_told(estimate.tokens)} tokens, {_money(estimate.usd)} usd)"
        seconds = _seconds(estimate.seconds)
        lines = [f"{head}; a run would make {paid} and compute for about {seconds} s of one core"]
    width = max(len(builder.name) for builder in estimate.builders)
    lines.append(f"  {'builder':<{width}}" + "".join(f" {name:>{w}}" for name, w in _COLUMNS.items()))
    lines += [f"  {builder.name:<{width}}{_cells(builder)}" for builder in estimate.builders]
    proven = sum(builder.proven for builder in estimate.builders)
    if proven:
        lines.append(
            f"  {proven} of the hits are proven unchanged: what they were made from is not looked up"
        )
    if estimate.estimated:
        lines.append("  ~: about, because it depends on values that the run has yet to compute")
    if any(part is None for b in estimate.builders for part in (b.usd, b.tokens, b.seconds)):
        lines.append("  ?: not known, because no entry tells")
    if estimate.changes:
        lines += ["  changed since the last run:", *(f"    {_change(c, estimate)}" for c in estimate.changes)]
    return "\n".join(lines)


def _change(change: Change, estimate: PlanEstimate) -> str:
    """What changed, what it makes a run build, and how that may be saved."""
    own = next((builder for builder in estimate.builders if builder.name == change.builder), None)
    if own is None or not own.to_build:
        return str(change)
    cost = f"{own.to_build} keys to build" + (f", {_money(own.usd)} usd" if own.paid else "")
    hint = f" (the same values? `featurekit adopt {change.builder}`)" if change.adoptable else ""
    return f"{change}: {cost}{hint}"


def _cells(builder: BuilderEstimate) -> str:
    about = "~" if builder.estimated else ""
    shown = {
        "hit": str(builder.hit),
        "stale": str(builder.stale),
        "miss": f"{about}{builder.miss}" if builder.miss else "0",
        "error": str(builder.error),
        "calls": f"{about}{builder.calls}" if builder.calls else "0",
        "tokens": _told(builder.tokens),
        "usd": _money(builder.usd),
        "seconds": _seconds(builder.seconds),
    }
    return "".join(f" {shown[name]:>{width}}" for name, width in _COLUMNS.items())


def _told(count: int | None) -> str:
    return "?" if count is None else str(count)


def _money(usd: float | None) -> str:
    return "?" if usd is None else f"{usd:.4f}" if 0 < usd < 1 else f"{usd:.2f}"


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.1f}"
