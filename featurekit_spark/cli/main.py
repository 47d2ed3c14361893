"""`featurekit run`, which is also the main of jobs/run_logic.py: arguments in, results on stdout, logs on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from featurekit_spark.cli.exit_codes import ExitCode, exit_code
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.config import check_name, load_settings
from featurekit_spark.errors import FeaturekitError

__all__ = ["app", "run_logic_main"]

app = typer.Typer(
    name="featurekit",
    help="Compute features once, on Spark or in-process, and pay for each model call once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps `run` a subcommand while it is the only one."""


@app.command("run")
def run_command(
    merchant: Annotated[str, typer.Option(help="Merchant, as in the catalog's file name.")],
    market: Annotated[str, typer.Option(help="Market, such as US.")],
    conf_file: Annotated[
        Path | None, typer.Option(help="YAML settings; merchants/MERCHANT.yaml beside it is read too.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key, such as search.top_k=20.")
    ] = None,
    run_date: Annotated[str | None, typer.Option(help="The run's date, YYYY-MM-DD (default: now).")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of this run (default: made up).")] = None,
    engine: Annotated[str | None, typer.Option(help="spark or local; short for --set engine.kind=...")] = None,
    output: Annotated[str, typer.Option(help="text or json; json ends with one JSON object in one line.")] = "text",
) -> None:
    """Run the logic builders of one merchant and market and publish their recommendations."""
    if output not in ("text", "json"):
        raise click.BadParameter(f"{output!r}; choose text or json", param_hint="--output")
    settings = list(overrides or []) + ([f"engine.kind={engine}"] if engine else [])
    code = _run(merchant, market, conf_file, settings, run_date, run_id, output)
    raise typer.Exit(code)


def run_logic_main(argv: Sequence[str] | None = None) -> int:
    """main(merchant, market) of the main job: `--merchant M --market K ...`; returns the exit code."""
    command = typer.main.get_command(app)
    arguments = ["run", *(sys.argv[1:] if argv is None else argv)]
    try:
        command.main(arguments, prog_name="run_logic.py", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except click.Abort:
        return ExitCode.BUG
    return ExitCode.OK


def _run(
    merchant: str,
    market: str,
    conf_file: Path | None,
    overrides: Sequence[str],
    run_date: str | None,
    run_id: str | None,
    output: str,
) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        summary, code = _job(merchant, market, conf_file, overrides, _date(run_date), run_id)
    except FeaturekitError as error:
        code = exit_code(error)
        print(f"error: {error}", file=sys.stderr)
        summary = {"status": "failed", "merchant": merchant, "market": market, "error": str(error), "exit_code": code}
    except Exception as error:
        code = ExitCode.BUG
        traceback.print_exc()
        summary = {"status": "failed", "merchant": merchant, "market": market, "error": repr(error), "exit_code": code}
    if output == "json":
        print(json.dumps(summary, ensure_ascii=False), flush=True)
    elif summary["status"] != "failed":
        print(_told(summary), flush=True)
    return code


def _job(
    merchant: str,
    market: str,
    conf_file: Path | None,
    overrides: Sequence[str],
    run_date: date | None,
    run_id: str | None,
) -> tuple[dict[str, Any], ExitCode]:
    settings = load_settings(
        merchant=merchant, market=market, conf_file=conf_file, environ=os.environ, overrides=overrides
    )
    if run_id is not None:
        check_name("run id", run_id)
    # After the settings are known to be good: what follows imports pyarrow and the adapters.
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.pipelines.logic import run_logic

    with progress_line() as progress:
        boot = Bootstrap(settings, merchant=merchant, market=market, run_date=run_date, progress=progress)
        try:
            with boot.run_lock():
                outcome = run_logic(
                    boot.get_session(),
                    boot.get_logic_builders(),
                    boot.get_logic_keys(),
                    merchant=merchant,
                    market=market,
                    sinks=boot.get_sinks(),
                    max_row_drop=settings.publish_gate.max_row_drop,
                    max_coverage_drop=settings.publish_gate.max_coverage_drop,
                    run_id=run_id,
                    quality=boot.get_quality,
                )
        finally:
            boot.close()
    result = outcome.result
    for key, error in list(result.errors.items())[:5]:
        print(f"failed {key}: {error}", file=sys.stderr)
    if len(result.errors) > 5:
        print(f"... and {len(result.errors) - 5} more failed keys, each an error entry in the cache", file=sys.stderr)
    summary = {
        "status": result.status,
        "run_id": result.run_id,
        "merchant": merchant,
        "market": market,
        "products": result.keys,
        "wall_seconds": round(outcome.wall_seconds, 3),
        "builders": {name: _counts(counts) for name, counts in result.builders.items()},
        "sinks": outcome.sinks,
        "quality": outcome.quality,
        "unchanged": result.unchanged,
    }
    return summary, ExitCode.OK if result.status == "ok" else ExitCode.PARTIAL


def _date(text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()  # noqa: DTZ007 - a date has no zone
    except ValueError:
        raise click.BadParameter(f"{text!r} is no date; write YYYY-MM-DD", param_hint="--run-date") from None


def _counts(counts: Any) -> dict[str, Any]:
    usd = None if counts.usd is None else round(counts.usd, 6)
    return {
        "hit": counts.hit,
        "computed": counts.computed,
        "error": counts.error,
        "empty": counts.empty,
        "calls": counts.calls,
        "tokens": counts.tokens,
        "usd": usd,
        "seconds": round(counts.seconds, 3),
    }


def _told(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [
        f"{summary['merchant']} {summary['market']}: {summary['products']} products, {summary['status']} "
        f"in {summary['wall_seconds']:.1f} s (run {summary['run_id']})"
        + (", nothing had changed" if summary["unchanged"] else "")
    ]
    width = max((len(name) for name in summary["builders"]), default=0)
    lines.append(f"  {'builder':<{width}}  {'hit':>8} {'computed':>9} {'error':>6} {'calls':>7} {'seconds':>8}")
    for name, c in summary["builders"].items():
        lines.append(
            f"  {name:<{width}}  {c['hit']:>8} {c['computed']:>9} {c['error']:>6} {c['calls']:>7} {c['seconds']:>8.2f}"
        )
    for name, sink in summary["sinks"].items():
        lines.append(f"  sink {name}: {sink['status']}, {sink['rows']} rows")
    quality = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in summary["quality"].items())
    lines.append(f"  data: {quality}")
    return "\n".join(lines)
