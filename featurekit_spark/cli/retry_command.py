"""`featurekit retry`: what paid builders failed at before, and asking them again.

Owns which errors are meant and how they are listed; the run itself is `one_run`, what is remembered is in `failures`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.one_run import RunRequest, reported
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.cli.shared import Answer, Day, DryRun, Engine, GroupOptions, answering
from featurekit_spark.cli.wording import counted, table
from featurekit_spark.errors import UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.failures import FailedKeys

__all__ = ["retry_command"]


class Errors(StrEnum):
    """Which errors are meant."""

    RETRYABLE = "retryable"
    TERMINAL = "terminal"
    QUOTA = "quota"
    ALL = "all"


@answering
def retry_command(
    options: GroupOptions,
    errors: Annotated[Errors, typer.Option(help="Which errors to ask again for.")] = Errors.RETRYABLE,
    builder: Annotated[
        list[str] | None, typer.Option(help="Only errors of this paid builder; may be given several times.")
    ] = None,
    dry_run: DryRun = False,
    run_date: Day = None,
    run_id: Annotated[str | None, typer.Option(help="The run's name; made up if not given.")] = None,
    engine: Engine = None,
    max_calls: Annotated[
        int | None, typer.Option(min=0, help="At most so many paid calls; short for --set run.max_calls=...")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(min=0, help="At most so much for them; short for --set run.max_usd=...")
    ] = None,
) -> Answer | None:
    """Run again where paid calls failed before, and ask for them again.

    A refused prompt (terminal) is asked again by no other run; what a server failed to answer (retryable, quota) by
    every one. It is a run like any other: what changed is computed as well, and all of it is published. Where there is
    no such error, nothing is run. With --dry-run the errors are listed, those of this merchant and market. Exit codes
    as of `run`.

    Example: featurekit retry --errors terminal --builder LLMCompletion --merchant demo --market US
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")  # to stderr
    limits = {"max_calls": max_calls, "max_usd": None if max_usd is None else f"{max_usd:f}"}
    given = [f"run.{name}={limit}" for name, limit in limits.items() if limit is not None]
    options = replace(options, overrides=[*(options.overrides or []), *given])
    request = RunRequest(
        options,
        engine,
        run_date,
        run_id,
        retry_errors=errors.value,
        retry_builders=None if builder is None else tuple(builder),
    )
    found = _found(request, dry_run=dry_run)
    meant = [line for line in found if errors in (line.kind.value, Errors.ALL)]
    meant = [line for line in meant if builder is None or line.builder in builder]
    if dry_run or not meant:
        return Answer(_facts(options, errors, meant, dry_run=dry_run), _text(options, errors, meant))
    raise typer.Exit(reported(request).code)


def _found(request: RunRequest, *, dry_run: bool) -> Sequence[FailedKeys]:
    """What failed before: of this group for a dry run, which walks its keys; else of all that share the cache, which
    is told at once."""
    options = request.options
    settings = options.settings(request.engine)
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.graph import Graph

    group: dict[str, Any] = {"merchant": options.merchant, "market": options.market}
    with progress_line() as progress:
        boot = Bootstrap(settings, **group, run_date=request.run_date, progress=progress)
        try:
            keys, builders = boot.get_logic_keys(), boot.get_logic_builders()
            paid = [builder.name for builder in Graph([*builders, keys]) if builder.paid]
            for name in request.retry_builders or ():
                if name not in paid:
                    raise UsageError(f"{name!r} is no paid builder of this run. {known_names(name, paid)}")
            session, targets = boot.get_session(), [builder.over(keys) for builder in builders]
            return (
                session.estimate(*targets, **group).failed if dry_run else session.failed(*targets, **group)
            )
        finally:
            boot.close()


def _facts(
    options: GroupOptions, errors: Errors, found: Sequence[FailedKeys], *, dry_run: bool
) -> dict[str, Any]:
    return {
        "status": "ok",
        "merchant": options.merchant,
        "market": options.market,
        "errors": errors.value,
        "dry_run": dry_run,
        "keys": sum(line.keys for line in found),
        "failed": [
            {
                "builder": line.builder,
                "kind": line.kind.value,
                "keys": line.keys,
                "attempts": line.attempts,
                "example": line.example,
            }
            for line in found
        ],
    }


def _text(options: GroupOptions, errors: Errors, found: Sequence[FailedKeys]) -> Iterator[str]:
    kinds = "" if errors is Errors.ALL else f" {errors.value}"
    group = f"{options.merchant} {options.market}"
    if not found:
        yield f"{group}: no{kinds} errors of paid builders to ask again for; nothing was run"
        return
    keys = sum(line.keys for line in found)
    yield f"{group}: {counted(keys, 'key')} with{kinds} errors would be asked again"
    rows = [
        (f"  {line.builder}", line.kind.value, str(line.keys), str(line.attempts), line.example)
        for line in found
    ]
    yield from table([("  builder", "kind", "keys", "attempts", "for example"), *rows], align="<<>><")
