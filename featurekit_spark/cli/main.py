"""`featurekit run`, which is also the main of jobs/run_logic.py.

Owns arguments, exit codes and streams: results on stdout, everything else on stderr. What a run does is in
`pipelines`, what is said of it in `report`.
"""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.adopt_command import adopt_command
from featurekit_spark.cli.backfill import Dates, path_of_day, run_each
from featurekit_spark.cli.cache_commands import cache_app
from featurekit_spark.cli.config_commands import config_app
from featurekit_spark.cli.cost_command import cost_command
from featurekit_spark.cli.demo import demo_command
from featurekit_spark.cli.doctor import doctor_command
from featurekit_spark.cli.exit_codes import ExitCode, exit_code
from featurekit_spark.cli.explain_command import explain_command
from featurekit_spark.cli.memory import settle_in
from featurekit_spark.cli.order import InOrder
from featurekit_spark.cli.outputs_commands import outputs_app
from featurekit_spark.cli.overlay_commands import promote_command
from featurekit_spark.cli.plan_command import estimated, plan_command
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.cli.records import keep_record
from featurekit_spark.cli.removal_commands import invalidate_command, purge_command
from featurekit_spark.cli.report import RunReport
from featurekit_spark.cli.runs_commands import runs_app
from featurekit_spark.cli.shared import (
    Answer,
    Day,
    Engine,
    EngineKind,
    GroupOptions,
    Output,
    ReaderGone,
    answering,
    aside,
    say,
)
from featurekit_spark.cli.streams import stderr_apart
from featurekit_spark.errors import BudgetReachedError, FeaturekitError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.session import RunResult

__all__ = ["app", "run_logic_main"]


app = typer.Typer(
    name="featurekit",
    cls=InOrder,
    help="Compute features once, on Spark or in-process, and pay for each model call once.",
    epilog="Begin with: featurekit demo. Each command explains itself with --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(outputs_app)
app.add_typer(runs_app)
app.command("plan")(plan_command)
app.command("adopt")(adopt_command)
app.command("explain")(explain_command)
app.command("cost")(cost_command)
app.add_typer(cache_app)
cache_app.command("promote")(promote_command)
cache_app.command("purge")(purge_command)
app.command("invalidate")(invalidate_command)
app.add_typer(config_app)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)
_job = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("run")
@_job.command()
@answering
def run_command(
    options: GroupOptions,
    run_date: Day = None,
    run_id: Annotated[str | None, typer.Option(help="The run's name; made up if not given.")] = None,
    engine: Engine = None,
    backfill: Annotated[
        Dates | None,
        typer.Option(
            metavar="FROM..TO",
            parser=Dates.parse,
            help="One run per date, oldest first: 2026-01-01..2026-01-31.",
        ),
    ] = None,
    republish: Annotated[
        bool, typer.Option("--republish", help="Publish to every sink, also where nothing changed.")
    ] = False,
    export_failed: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Failed keys as a table: PATH.csv, PATH.parquet, or a Delta table."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the run would do and cost, as `plan` does.")
    ] = False,
    max_calls: Annotated[
        int | None, typer.Option(min=0, help="At most so many paid calls; short for --set run.max_calls=...")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(min=0, help="At most so much for them; short for --set run.max_usd=...")
    ] = None,
    no_new_calls: Annotated[
        bool,
        typer.Option("--no-new-calls", help="Answer from what was paid for, or say what is missing and end."),
    ] = False,
) -> Answer | None:
    """Run the logic builders of one merchant and market, and publish their recommendations.

    Exit codes: 0 ok, 1 bug, 2 usage, 3 configuration, 4 data quality, 5 partial, 6 quota spent or new calls needed,
    75 stopped by its own budget, or a temporary failure: run again, 130 interrupted.

    Example: featurekit run --merchant demo --market US --conf-file conf/dev.yaml --engine local
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")  # to stderr
    overrides = list(options.overrides or [])
    if max_calls is not None:
        overrides.append(f"run.max_calls={max_calls}")
    if max_usd is not None:
        overrides.append(f"run.max_usd={max_usd:f}")  # YAML takes 1e-05 for text
    if no_new_calls:
        overrides.append("run.no_new_calls=true")
    options = replace(options, overrides=overrides)
    if dry_run:
        return estimated(options, engine, run_date)
    request = _Request(options, engine, run_date, run_id, republish, export_failed)
    if backfill is None:
        raise typer.Exit(_reported(request).code)
    if run_date is not None:
        raise UsageError("--backfill gives each run its date: leave out --run-date.")
    raise typer.Exit(run_each(backfill, lambda day: _reported(request.on(day))))


def _reported(request: _Request) -> RunReport:
    """Carry out one run, keep its record, and print what is to be said of it."""
    report = RunReport(
        merchant=request.options.merchant,
        market=request.options.market,
        run_id=request.run_id or uuid.uuid4().hex,
        run_date=request.run_date,
    )
    try:
        _run(request, report)
    except BudgetReachedError as stop:
        report.failed(str(stop), exit_code(stop), status="stopped")
        aside(f"stopped: {stop}")
    except FeaturekitError as error:
        report.failed(str(error), exit_code(error))
        aside(f"error: {error}")
    except KeyboardInterrupt:
        aside("interrupted: what was computed is kept, and the next run goes on from there")
        report.failed("interrupted", 130)
        keep_record(report)
        raise
    except Exception as error:
        report.failed(f"{type(error).__name__}: {error}", ExitCode.BUG)
        aside(traceback.format_exc().rstrip())
    keep_record(report)
    with suppress(ReaderGone):  # the exit code is the run's, whoever reads of it
        if request.options.output is Output.JSON:
            say(report.json())
        elif report.status not in ("failed", "stopped"):
            say(report.text())
        elif "page" in report.facts:
            aside(f"its record: {report.facts['page']}")
    return report


def run_logic_main(arguments: Sequence[str] | None = None) -> int:
    """The main of jobs/run_logic.py: `--merchant M --market K ...` in (default: sys.argv), exit code out."""
    with stderr_apart():
        try:
            _job(args=None if arguments is None else list(arguments), prog_name="run_logic.py")
        except SystemExit as done:
            return int(done.code or 0)
    return ExitCode.OK


@dataclass(frozen=True)
class _Request:
    options: GroupOptions
    engine: EngineKind | None
    run_date: date | None
    run_id: str | None
    republish: bool
    export_failed: str | None

    def on(self, day: date) -> _Request:
        """The same on another date; a name that was given is told apart by it."""
        run_id = f"{self.run_id}-{day}" if self.run_id else None
        path = path_of_day(self.export_failed, day) if self.export_failed else None
        return replace(self, run_date=day, run_id=run_id, export_failed=path)


def _run(request: _Request, report: RunReport) -> None:
    merchant, market = request.options.merchant, request.options.market
    settings = request.options.settings(request.engine)
    from featurekit_spark.report.store import check_run_id

    check_run_id(report.run_id)
    report.settings = settings
    # Not before the settings are known to be good: pyarrow and the adapters take a second to import.
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.budget import Budget
    from featurekit_spark.pipelines.logic import Gate, run_logic

    settle_in()
    with progress_line() as progress:
        boot = Bootstrap(
            settings,
            merchant=merchant,
            market=market,
            run_date=request.run_date,
            progress=progress,
        )
        session = None
        try:
            with boot.run_lock():
                session = boot.get_session()
                outcome = run_logic(
                    session,
                    boot.get_logic_builders(),
                    boot.get_logic_keys(),
                    merchant=merchant,
                    market=market,
                    sinks=boot.get_sinks(),
                    gate=Gate(settings.publish_gate.max_row_drop, settings.publish_gate.max_coverage_drop),
                    run_id=report.run_id,
                    quality=boot.get_quality,
                    on_computed=lambda result: _computed(result, request, report),
                    republish=request.republish,
                    budget=Budget(settings.run.max_calls, settings.run.max_usd, settings.run.no_new_calls),
                )
        finally:
            report.came_to(session.execution if session is not None else None)
            boot.close()
    report.done(outcome)
    for line in report.problems():
        aside(line)


def _computed(result: RunResult, request: _Request, report: RunReport) -> None:
    report.computed(result)
    if request.export_failed is not None:
        from featurekit_spark.report.failed import failed_rows, write_rows

        write_rows(failed_rows(result), request.export_failed)
