"""`featurekit plan`, and `featurekit run --dry-run`: what a run would do and cost, before it does.

Owns how an estimate is printed and when it fails a build. What is counted is in `estimate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.progress import progress_line
from featurekit_spark.cli.shared import Answer, Day, Engine, EngineKind, GroupOptions, answering
from featurekit_spark.cli.wording import counted, shown_seconds, shown_usd, table

if TYPE_CHECKING:
    from featurekit_spark.changes import Change
    from featurekit_spark.estimate import BuilderEstimate, PlanEstimate

__all__ = ["estimated", "plan_command"]

_COLUMNS = ("hit", "stale", "miss", "error", "calls", "tokens", "usd", "seconds")


@answering
def plan_command(
    options: GroupOptions,
    run_date: Day = None,
    engine: Engine = None,
    fail_over_usd: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 6 where the run would cost more, or nobody knows what it costs."),
    ] = None,
) -> Answer:
    """Say what a run would compute and pay, per builder, without doing it.

    Sources are read; nothing is written, paid or started. Exit codes as of `run`; 6 with --fail-over-usd exceeded.

    Example: featurekit plan --merchant demo --market US --conf-file conf/dev.yaml
    """
    return estimated(options, engine, run_date, fail_over_usd=fail_over_usd)


def estimated(
    options: GroupOptions,
    engine: EngineKind | None,
    run_date: date | None,
    *,
    fail_over_usd: float | None = None,
) -> Answer:
    """The estimate of a run."""
    settings = options.settings(engine)
    from featurekit_spark.bootstrap import Bootstrap

    group: dict[str, Any] = {"merchant": options.merchant, "market": options.market}
    with progress_line() as progress:
        boot = Bootstrap(settings, **group, run_date=run_date, progress=progress)
        try:
            keys = boot.get_logic_keys()
            targets = [builder.over(keys) for builder in boot.get_logic_builders()]
            estimate = boot.get_session().estimate(*targets, **group)
        finally:
            boot.close()
    over = _over(estimate, fail_over_usd)
    code = ExitCode.BUDGET if over else ExitCode.OK
    failed = {"status": "failed", "error": over, "exit_code": int(code)} if over else {}
    notes = [*(f"warning: {warning}" for warning in estimate.warnings), *([f"error: {over}"] if over else [])]
    return Answer(_facts(estimate) | failed, _text(estimate), notes, code)


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
        return f"this run would cost {shown_usd(estimate.usd)} usd, more than --fail-over-usd {limit}"
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
        "failed": [asdict(line) | {"kind": line.kind.value} for line in estimate.failed],
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


def _text(estimate: PlanEstimate) -> Iterator[str]:
    group = " ".join(map(str, estimate.group.values()))
    head = f"{group}: {counted(estimate.keys, 'product')}"
    if estimate.unchanged:
        yield f"{head}, all proven unchanged: a run would compute nothing"
    else:
        yield f"{head}; a run would make {_calls(estimate)} and compute {_computing(estimate)}"
    looked_at = [builder for builder in estimate.builders if builder.keys]
    rows = [(f"  {builder.name}", *_cells(builder)) for builder in looked_at]
    yield from table([("  builder", *_COLUMNS), *rows])
    proven = sum(builder.proven for builder in estimate.builders)
    if proven:
        yield f"  {counted(proven, 'hit is', 'hits are')} proven unchanged: what is below is not looked up for them"
    if estimate.estimated:
        yield "  ~: about, because it depends on values that the run has yet to compute"
    if any(builder.expected for builder in estimate.builders):
        yield "  *: expected, by the prompts' tokens, the length of answers and the model's price; no entry tells"
    if any(part is None for b in estimate.builders for part in (b.usd, b.tokens, b.seconds)):
        yield "  ?: not known, because no entry tells"
    for line in estimate.failed:
        if line.kind.value == "terminal":
            keys = counted(line.keys, "key")
            yield f"  {keys} of {line.builder} refused for good: only `featurekit retry --errors terminal` asks again"
    if estimate.changes:
        yield "  changed since the last run:"
        yield from (f"    {_change(change, estimate)}" for change in estimate.changes)


def _calls(estimate: PlanEstimate) -> str:
    if not estimate.calls:
        return "no paid calls"
    about = "about " if any(builder.estimated for builder in estimate.builders if builder.paid) else ""
    expected = "about " if any(builder.expected for builder in estimate.builders) else ""
    tokens = f"{expected}{_told(estimate.tokens)} token{'' if estimate.tokens == 1 else 's'}"
    return f"{about}{counted(estimate.calls, 'paid call')} ({tokens}, {shown_usd(estimate.usd)} usd)"


def _computing(estimate: PlanEstimate) -> str:
    """How long, as far as any entry tells."""
    building = [builder for builder in estimate.builders if builder.to_build]
    if not building:
        return "nothing"
    if all(builder.seconds is None for builder in building):
        return "for nobody knows how long"
    least = "at least" if any(builder.seconds is None for builder in building) else "about"
    return f"for {least} {shown_seconds(estimate.seconds)} of one core"


def _change(change: Change, estimate: PlanEstimate) -> str:
    """What changed, what it makes a run build, and how that may be saved."""
    own = next((builder for builder in estimate.builders if builder.name == change.builder), None)
    if own is None or not own.to_build:
        return str(change)
    cost = f"{counted(own.to_build, 'key')} to build" + (f", {shown_usd(own.usd)} usd" if own.paid else "")
    hint = f" (the same values? `featurekit adopt {change.builder}`)" if change.adoptable else ""
    return f"{change}: {cost}{hint}"


def _cells(builder: BuilderEstimate) -> Iterator[str]:
    about = "~" if builder.estimated else ""
    yield from (
        str(builder.hit),
        str(builder.stale),
        f"{about}{builder.miss}" if builder.miss else "0",
        str(builder.error),
        f"{about}{builder.calls}" if builder.calls else "0",
        _expected(builder, _told(builder.tokens)),
        _expected(builder, shown_usd(builder.usd)),
        "?" if builder.seconds is None else f"{builder.seconds:.2f}",
    )


def _expected(builder: BuilderEstimate, told: str) -> str:
    return f"*{told}" if builder.expected and told != "?" else told


def _told(count: int | None) -> str:
    return "?" if count is None else str(count)
