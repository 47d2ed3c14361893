"""`featurekit outputs rollback`: puts what is published back to an earlier run. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import Answer, DryRun, GroupOptions, answering, command_app
from featurekit_spark.cli.wording import counted

if TYPE_CHECKING:
    from featurekit_spark.pipelines.outputs import Step

__all__ = ["outputs_app"]

_FINISHED = ("ok", "partial")

outputs_app = command_app("outputs", "What is published, and going back to what was.")


@outputs_app.command("rollback")
@answering
def rollback_command(
    options: GroupOptions,
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="The run whose outputs are wanted back, or latest: that finished."
        ),
    ],
    dry_run: DryRun = False,
) -> Answer:
    """Publish again what RUN had published for one merchant and market, in every sink.

    The next run publishes what it computes: mend the cause, or hold the job, before it starts.

    Example: featurekit outputs rollback RUN --merchant demo --market US
    """
    settings, merchant, market = options.settings(), options.merchant, options.market
    import uuid
    from datetime import UTC, datetime

    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.errors import UsageError
    from featurekit_spark.pipelines.outputs import rollback
    from featurekit_spark.report.store import RunStore

    store, told = RunStore(settings.warehouse), dict[str, Any]()
    runs = store.runs(merchant, market)
    last = next((found["run_id"] for found in runs if found["status"] in _FINISHED), None)
    if run == "latest" and last is not None:
        run = last  # one that stopped or failed left outputs as they were
    with suppress(UsageError):  # its record may be gone; what it published need not be
        told = store.read(merchant, market, run)
    run = str(told.get("run_id", run))
    if told.get("status") == "stopped":
        before = (
            f"The last run that published is {last!r}: give that, or latest."
            if last
            else "No run before it published anything."
        )
        raise UsageError(
            f"run {run!r} stopped before its end and published nothing, so that there is nothing of it to go back to. "
            f"{before}"
        )
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
    facts = {
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
                "changed": not dry_run and _changes(step),
            }
            for step in steps
        },
    }
    return Answer(facts, _text(facts, steps))


def _changes(step: Step) -> bool:
    return step.switch or step.held is not None


def _text(facts: Mapping[str, Any], steps: Sequence[Step]) -> Iterator[str]:
    run, dry_run = facts["run_id"], facts["dry_run"]
    yield f"{facts['merchant']} {facts['market']}: {'would go' if dry_run else 'went'} back to run {run}"
    for step in steps:
        rows = counted(step.rows, "row")
        yield f"  sink {step.sink.name}: {step.found} -> {step.run_id}, {rows} ({step.how})"
        if step.run_id != run:
            yield f"    run {run} left the rows of run {step.run_id} there"
    if not dry_run and any(map(_changes, steps)):
        yield "  the next run publishes what it computes: mend the cause, or hold the job, before it starts"
