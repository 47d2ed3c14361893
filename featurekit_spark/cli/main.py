"""`featurekit run`, which is also the main of jobs/run_logic.py; and all commands by name.

Owns arguments: what becomes of a run is in `one_run`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.adopt_command import adopt_command
from featurekit_spark.cli.backfill import Dates, run_each
from featurekit_spark.cli.batches_commands import batches_app
from featurekit_spark.cli.cache_commands import cache_app
from featurekit_spark.cli.config_commands import config_app
from featurekit_spark.cli.cost_command import cost_command
from featurekit_spark.cli.demo import demo_command
from featurekit_spark.cli.doctor import doctor_command
from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.explain_command import explain_command
from featurekit_spark.cli.one_run import RunRequest, reported
from featurekit_spark.cli.order import InOrder
from featurekit_spark.cli.outputs_commands import outputs_app
from featurekit_spark.cli.overlay_commands import promote_command
from featurekit_spark.cli.plan_command import estimated, plan_command
from featurekit_spark.cli.removal_commands import invalidate_command, purge_command
from featurekit_spark.cli.retain_command import retain_command
from featurekit_spark.cli.retry_command import retry_command
from featurekit_spark.cli.runs_commands import runs_app
from featurekit_spark.cli.shared import (
    Answer,
    Day,
    Engine,
    GroupOptions,
    answering,
)
from featurekit_spark.cli.streams import stderr_apart
from featurekit_spark.cli.vectors_commands import vectors_app
from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    pass

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
app.command("retry")(retry_command)
app.add_typer(batches_app)
app.add_typer(cache_app)
cache_app.command("promote")(promote_command)
cache_app.command("purge")(purge_command)
cache_app.command("retain")(retain_command)
app.command("invalidate")(invalidate_command)
app.add_typer(vectors_app)
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
        typer.Option(
            "--no-new-calls",
            help="Answer from what was paid for, or say what is missing and end with exit code 6.",
        ),
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
    request = RunRequest(options, engine, run_date, run_id, republish, export_failed)
    if backfill is None:
        raise typer.Exit(reported(request).code)
    if run_date is not None:
        raise UsageError("--backfill gives each run its date: leave out --run-date.")
    raise typer.Exit(run_each(backfill, lambda day: reported(request.on(day))))


def run_logic_main(arguments: Sequence[str] | None = None) -> int:
    """The main of jobs/run_logic.py: `--merchant M --market K ...` in (default: sys.argv), exit code out."""
    with stderr_apart():
        try:
            _job(args=None if arguments is None else list(arguments), prog_name="run_logic.py")
        except SystemExit as done:
            return int(done.code or 0)
    return ExitCode.OK
