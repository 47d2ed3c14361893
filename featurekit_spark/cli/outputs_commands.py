"""`featurekit outputs rollback`: puts what is published back to an earlier run. Computes nothing."""

from __future__ import annotations

from contextlib import suppress
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

__all__ = ["outputs_app"]

outputs_app = command_app("outputs", "What is published, and going back to what was.")


@outputs_app.callback()
def _group() -> None:
    """Keeps `rollback` a subcommand while it is the only one."""


@outputs_app.command("rollback")
def rollback_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run whose outputs are wanted back.")],
    merchant: Merchant,
    market: Market,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Publish again what RUN had published for one merchant and market, in every sink.

    The next run publishes what it computes: mend the cause, or hold the job, before it starts.

    Example: featurekit outputs rollback RUN --merchant demo --market US
    """
    with guarded(output):
        settings = settings_of(merchant, market, conf_file, overrides)
        import uuid
        from datetime import UTC, datetime

        from featurekit_spark.bootstrap import Bootstrap
        from featurekit_spark.errors import UsageError
        from featurekit_spark.pipelines.outputs import rollback
        from featurekit_spark.report.store import RunStore

        told: dict[str, Any] = {}
        with suppress(UsageError):  # its record may be gone; what it published need not be
            told = RunStore(settings.warehouse).read(merchant, market, run)
        run = str(told.get("run_id", run))
        boot = Bootstrap(settings, merchant=merchant, market=market)
        try:
            sinks = boot.get_sinks()
            # A run that found a sink up to date published nothing: it is an earlier run's rows that stood there then.
            stood = {name: sink.get("run_id") for name, sink in (told.get("sinks") or {}).items()}
            with boot.run_lock():
                steps = rollback(
                    sinks,
                    boot.cache,
                    merchant=merchant,
                    market=market,
                    runs={sink.name: stood.get(sink.name) or run for sink in sinks},
                    logic_builders=[builder.name for builder in boot.get_logic_builders()],
                    run_id=uuid.uuid4().hex,
                    now=datetime.now(UTC),
                    dry_run=dry_run,
                )
        finally:
            boot.close()
        if output is Output.JSON:
            print_json(
                {
                    "status": "ok",
                    "run_id": run,
                    "merchant": merchant,
                    "market": market,
                    "dry_run": dry_run,
                    "sinks": {
                        step.sink.name: {
                            "from": step.found,
                            "to": step.run_id,
                            "rows": step.rows,
                            "how": step.how,
                            "changed": not dry_run and (step.switch or step.held is not None),
                        }
                        for step in steps
                    },
                }
            )
            return
        print(f"{merchant} {market}: {'would go' if dry_run else 'went'} back to run {run}")
        for step in steps:
            print(f"  sink {step.sink.name}: {step.found} -> {step.run_id}, {step.rows} rows ({step.how})")
