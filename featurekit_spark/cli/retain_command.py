"""`featurekit cache retain`: takes old prompts and answers out of the cache. What is taken is in `cache.retention`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.cache_place import CacheOptions, Place
from featurekit_spark.cli.shared import Answer, DryRun, answering
from featurekit_spark.cli.wording import counted
from featurekit_spark.errors import DefinitionError, UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.cache.retention import Retention

__all__ = ["retain_command"]

_WHAT = ("prompts", "answers")


@answering
def retain_command(
    options: CacheOptions,
    hashed: Annotated[
        str | None,
        typer.Option(
            "--hash", metavar="WHAT", help="prompts, answers or prompts,answers, in place of llm.retention."
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Of what was stored longer ago: 30d, 12h, 2w; in place of llm.retention."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> Answer:
    """Leave only hashes of old prompts and answers.

    A prompt becomes a hash by which a run still finds its answer. An answer goes, and is asked again when it is needed
    again; what it cost stays. Earlier versions of the tables go as well. Refused (exit 75) while a run reads the
    cache.

    Example: featurekit cache retain --conf-file conf/prod.yaml --hash prompts --after 30d
    """
    place = options.place()
    rule = _rule(place, hashed, after)
    from featurekit_spark.cache.retention import retain

    if not (rule.prompts or rule.answers):
        raise UsageError(
            "llm.retention keeps prompts and answers, so there is nothing to do: set llm.retention.prompts or "
            "llm.retention.answers to hash, or give --hash."
        )
    report = retain(place.cache, rule, now=datetime.now(UTC), dry_run=dry_run, warehouse=place.warehouse)
    facts = {"after_s": rule.after.total_seconds(), "hash": [name for name in _WHAT if getattr(rule, name)]}
    batches = _batches(place)
    found = {"status": "ok", **facts, **report, "batches_on_their_way": batches}
    return Answer(found, [*_text(report, rule), *_on_the_way(batches)])


def _batches(place: Place) -> int:
    from featurekit_spark.cache.folder import Folder
    from featurekit_spark.llm.batch_records import BatchRecords

    return len(BatchRecords(Folder(f"{place.cache.path}/batches", place.cache.storage_options)).tags())


def _on_the_way(batches: int) -> Iterator[str]:
    if batches:
        yield (
            f"{counted(batches, 'batch', 'batches')} of calls on the way: prompts are kept, here and at the provider. "
            "`featurekit batches collect` takes answers in; then retain once more"
        )


def _rule(place: Place, hashed: str | None, after: str | None) -> Retention:
    from featurekit_spark.cache.retention import Retention
    from featurekit_spark.freshness import duration
    from featurekit_spark.settings import Settings

    retention = (place.settings or Settings()).llm.retention
    names = [name for name in _WHAT if getattr(retention, name) == "hash"]
    if hashed is not None:
        names = [name.strip() for name in hashed.split(",")]
        for name in names:
            if name not in _WHAT:
                raise UsageError(f"--hash: {name!r} is nothing that is hashed. {known_names(name, _WHAT)}")
    try:
        age = timedelta(days=retention.after_days) if after is None else duration(after)
    except DefinitionError as error:
        raise UsageError(f"--after: {error}") from None
    return Retention(age, "prompts" in names, "answers" in names)


def _text(report: Mapping[str, Any], rule: Retention) -> Iterator[str]:
    dry = report["dry_run"]
    for name, count in report["prompts"].items():
        yield f"{counted(count, 'prompt')} of {name} {'would become hashes' if dry else 'are hashes now'}"
    for name, count in report["answers"].items():
        yield (
            f"{counted(count, 'answer')} of {name} {'would go' if dry else 'went'}; "
            "whatever needs one again asks and pays again"
        )
    for name, count in report["repeated_in"].items():
        rows = counted(count, "row")
        yield f"{rows} of {name} that {'repeat them would go' if dry else 'repeated them went'}"
    if not any(report[what] for what in ("prompts", "answers", "repeated_in", "traces")):
        yield f"no text was stored more than {rule.after} ago"
    elif not dry:
        yield "earlier versions of the tables, and what their logs say, are gone"
