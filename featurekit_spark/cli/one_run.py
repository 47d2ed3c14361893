"""One run of one merchant and market: carried out, recorded, and told.

Owns what becomes of a run's errors and where its words go; what a run does is in `pipelines`, what is said of it in
`report`. Knows no arguments.
"""

from __future__ import annotations

import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

from featurekit_spark.cli.backfill import path_of_day
from featurekit_spark.cli.exit_codes import ExitCode, exit_code
from featurekit_spark.cli.memory import settle_in
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.cli.records import keep_record
from featurekit_spark.cli.report import RunReport
from featurekit_spark.cli.shared import EngineKind, GroupOptions, Output, ReaderGone, aside, say
from featurekit_spark.errors import BudgetReachedError, FeaturekitError

if TYPE_CHECKING:
    from featurekit_spark.failures import RetryErrors
    from featurekit_spark.session import RunResult

__all__ = ["RunRequest", "reported"]


@dataclass(frozen=True)
class RunRequest:
    """What is to be run. `retry_errors`, `retry_builders`: what failed before and is asked again, as in `run`."""

    options: GroupOptions
    engine: EngineKind | None
    run_date: date | None
    run_id: str | None
    republish: bool = False
    export_failed: str | None = None
    retry_errors: RetryErrors | None = None
    retry_builders: tuple[str, ...] | None = None

    def on(self, day: date) -> RunRequest:
        """The same on another date; a name that was given is told apart by it."""
        run_id = f"{self.run_id}-{day}" if self.run_id else None
        path = path_of_day(self.export_failed, day) if self.export_failed else None
        return replace(self, run_date=day, run_id=run_id, export_failed=path)


def reported(request: RunRequest) -> RunReport:
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


def _run(request: RunRequest, report: RunReport) -> None:
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
                    retry_errors=request.retry_errors,
                    retry_builders=request.retry_builders,
                    budget=Budget(settings.run.max_calls, settings.run.max_usd, settings.run.no_new_calls),
                )
        finally:
            if session is not None:
                report.came_to(session.execution, session.ended_early)
            boot.close()
    report.done(outcome)
    for line in report.problems():
        aside(line)


def _computed(result: RunResult, request: RunRequest, report: RunReport) -> None:
    report.computed(result)
    if request.export_failed is not None:
        from featurekit_spark.report.failed import failed_rows, write_rows

        write_rows(failed_rows(result), request.export_failed)
