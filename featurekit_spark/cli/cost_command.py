"""`featurekit cost`: what was paid, for which builder, merchant, model and day. What is summed is in `report.cost`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.cache_place import CacheOptions, Place
from featurekit_spark.cli.shared import Answer, answering
from featurekit_spark.cli.wording import counted, shown_seconds, shown_usd, table
from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    from featurekit_spark.report.cost import Spent
    from featurekit_spark.report.on_the_way import OnTheWay

__all__ = ["cost_command"]

_UNKNOWN = "unknown"


@answering
def cost_command(
    options: CacheOptions,
    by: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Any of builder,merchant,model,day: a line for each combination."),
    ] = "builder,model",
    since: Annotated[
        date | None,
        typer.Option(metavar="YYYY-MM-DD", parser=date.fromisoformat, help="From this day on (UTC)."),
    ] = None,
    until: Annotated[
        date | None,
        typer.Option(metavar="YYYY-MM-DD", parser=date.fromisoformat, help="To the end of this day (UTC)."),
    ] = None,
) -> Answer:
    """What was paid for calls of models, failed ones among them.

    Counted from the cache's entries and its records of runs: calls, attempts, tokens, usd and seconds. What nobody
    knows the price of is told as unknown. --merchant and --market choose settings, and with them the cache; all that
    was paid for it is counted. Calls that were handed in as batches are told of, and counted once they came.

    Example: featurekit cost --by merchant,day --since 2026-01-01 --conf-file conf/dev.yaml
    """
    from featurekit_spark.cache.rows import run_records
    from featurekit_spark.report.cost import checked_dimensions, paid_lots, summed
    from featurekit_spark.report.on_the_way import batches_folder, on_the_way

    names = checked_dimensions([name.strip() for name in by.split(",")])
    if since is not None and until is not None and since > until:
        raise UsageError(f"--since {since} is after --until {until}: no day is between them.")
    place = options.place()
    lots = paid_lots(place.cache, since=since, until=until, merchants=_merchants(place))
    (total,) = summed(lots, ()) or summed([_nothing()], ())
    rows = summed(lots, names)
    cache = place.cache
    waiting = on_the_way(batches_folder(cache.path), run_records(cache), cache.storage_options)
    facts = {
        "status": "ok",
        "path": place.cache.path,
        "by": list(names),
        "since": since,
        "until": until,
        "rows": [row.facts(names) for row in rows],
        "total": total.facts(()),
        "on_the_way": [batch.facts() for batch in waiting],
    }
    return Answer(facts, [*_text(rows, total, names), *map(_handed_in, waiting)])


def _merchants(place: Place) -> dict[str, str]:
    """Merchants by run, as the documents of runs tell them: a run that failed has one, and no record in the cache."""
    if place.warehouse is None:
        return {}
    from featurekit_spark.report.store import RunStore

    store = RunStore(place.warehouse)
    return {
        run["run_id"]: merchant for merchant, market in store.groups() for run in store.runs(merchant, market)
    }


def _nothing() -> Spent:
    from featurekit_spark.report.cost import Spent

    return Spent()


def _text(rows: Sequence[Spent], total: Spent, by: Sequence[str]) -> Iterator[str]:
    if not total.calls:
        yield "nothing was paid for"
        return
    repeated = total.failed_attempts != total.failed
    tried = ("attempts", "failed attempts") if repeated else ()
    lines = [(*by, "calls", "failed", *tried, "tokens", "usd", "seconds")]
    lines += [(*_names(row, by), *_amounts(row, repeated)) for row in rows]
    if len(rows) > 1:
        lines.append((*("total" if at == 0 else "" for at, _ in enumerate(by)), *_amounts(total, repeated)))
    yield from table(lines, align="<" * len(by))
    if repeated:
        yield (
            f"{total.failed_attempts} of {counted(total.attempts, 'attempt')} led to no answer: in the sums is what "
            "the provider said that they took"
        )
    if 0 < total.unpriced < total.calls:
        yield (
            f"+: and what {counted(total.unpriced, 'call')} of {total.calls} cost, whose price nobody knows "
            f"({total.failed} of all failed)"
        )
    elif total.unpriced:
        yield "no answer carries a price: set llm.price, or llm.prices to a table such as conf/prices.yaml"
    if total.estimated_tokens:
        yield (
            f"{total.estimated_tokens} of {counted(total.tokens or 0, 'token')} were counted here, because the "
            "provider did not say: what they cost is an estimate"
        )
    if total.removed:
        yield (
            f"{counted(total.removed, 'call')} among them only by records of runs: their entries were taken out, or "
            "the next run takes them in"
        )


def _handed_in(waiting: OnTheWay) -> str:
    whose = _UNKNOWN if waiting.group is None else " ".join(map(str, waiting.group))
    came = f"; {waiting.answered} of them came, and a run takes them in" if waiting.answered else ""
    return (
        f"on the way for {whose}, not counted yet: {counted(waiting.calls, 'call')} of {waiting.model} in "
        f"{counted(waiting.batches, 'batch', 'batches')}, since {waiting.since:%Y-%m-%d %H:%M} UTC{came}"
    )


def _names(row: Spent, by: Sequence[str]) -> Iterator[str]:
    for name in by:
        value = getattr(row, name)
        yield _UNKNOWN if value is None else str(value)


def _amounts(row: Spent, repeated: bool) -> tuple[str, ...]:
    usd = _UNKNOWN if row.usd is None else shown_usd(float(row.usd)) + ("+" if row.unpriced else "")
    tokens = _UNKNOWN if row.tokens is None else str(row.tokens)
    tried = (str(row.attempts), str(row.failed_attempts)) if repeated else ()
    return str(row.calls), str(row.failed), *tried, tokens, usd, shown_seconds(row.seconds)
