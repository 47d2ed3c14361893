"""`featurekit invalidate` and `featurekit cache purge`: what must not answer any more, and what must not be there.

Owns arguments, the question before data goes for good, and what is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.cache_commands import cost_text
from featurekit_spark.cli.cache_place import CacheOptions, Place, builder_named
from featurekit_spark.cli.shared import Answer, DryRun, answering, aside
from featurekit_spark.cli.wording import counted
from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    from featurekit_spark.pipelines.purge import Places

__all__ = ["invalidate_command", "purge_command"]


@answering
def invalidate_command(
    options: CacheOptions,
    builder: Annotated[str, typer.Argument(help="A name, or package.module:Class.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the runs table.")],
    keys: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help='A JSON array, \'["abt","US","p1"]\', or a list of such; repeat it.'
        ),
    ] = None,
    keys_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All keys of the builder.")] = False,
    dry_run: DryRun = False,
) -> Answer:
    """Take a builder's entries out, so that the next run computes just those again.

    What lies above them is computed again only where their value changes. Refused (exit 75) while a run reads
    the cache.

    Example: featurekit invalidate LLMSuggestions --keys '["abt","US","p1"]' --reason "the parser was wrong"
    """
    if everything == bool(keys or keys_file):
        raise UsageError("say which entries: --keys KEY (or --keys-file FILE), or --all.")
    place = options.place()
    from featurekit_spark.cache.invalidate import invalidate

    report = invalidate(
        place.cache,
        builder_named(builder, place)[0],
        None if everything else keys_of(keys, keys_file),
        reason=reason,
        now=datetime.now(UTC),
        dry_run=dry_run,
        warehouse=place.warehouse,
    )
    return Answer({"status": "ok", **report}, _invalidated_text(report))


@answering
def purge_command(
    options: CacheOptions,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help='Whose data: a JSON array of key fields, \'["abt","US","p1"]\', or one field. Repeat it.',
        ),
    ] = None,
    keys_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    texts: Annotated[
        bool, typer.Option("--text", help="Also what is keyed by their texts: titles, prompts, answers.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the runs table, which does not say whose.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
) -> Answer:
    """Remove a product's or a person's data for good.

    Entries whose key or value names them, traces, matrices, earlier versions of the tables and their logs,
    recommendations of them and for them, and what run records say of them.

    An entry is theirs where all fields that you give are in its key or its value. What is published is looked at with
    the settings (--conf-file, --merchant, --market), not with --path. Refused (exit 75) while a run goes on.

    Example: featurekit cache purge --key '["abt","US","p1"]' --merchant abt --market US --text --reason "request 17"
    """
    subjects = [tuple(json.loads(key)) for key in keys_of(keys, keys_file)]
    if not subjects:
        raise UsageError("say whose data: --key KEY, or --keys-file FILE.")
    place = options.place()
    from featurekit_spark.pipelines.purge import purge

    def run(dry: bool) -> dict[str, Any]:
        now = datetime.now(UTC)
        places = _places(place)
        return purge(place.cache, subjects, places, reason=reason, now=now, texts=texts, dry_run=dry)

    if not dry_run and not yes:
        if not sys.stdin.isatty():
            raise UsageError("what is purged cannot be brought back: look with --dry-run, then give --yes.")
        aside("\n".join(_purged_text(run(True))))
        typer.confirm("Remove this for good?", abort=True, err=True)
    report = run(dry_run)
    if place.settings is None:
        report["not_looked_at"] = "matrices, sinks and run documents: --path names only the cache"
    return Answer({"status": "ok", **report}, _purged_text(report))


def _places(place: Place) -> Places:
    from featurekit_spark.cache.purge import scrubbed
    from featurekit_spark.pipelines.purge import Places
    from featurekit_spark.report.removal import remove_from_documents

    settings = place.settings
    if settings is None:
        return Places()
    from featurekit_spark.bootstrap import Bootstrap

    boot = Bootstrap(settings, merchant=place.merchant or "_", market=place.market or "_")
    merchant, market = place.merchant, place.market
    return Places(
        warehouse=settings.warehouse,
        matrices=boot.get_matrices(),
        sinks=boot.get_sinks(),
        group=(merchant, market) if merchant is not None and market is not None else None,
        logic_builders=[builder.name for builder in boot.get_logic_builders()],
        documents=lambda subjects, dry: remove_from_documents(
            settings.warehouse, lambda text: scrubbed(subjects, text), dry_run=dry
        ),
    )


def keys_of(given: list[str] | None, file: Path | None) -> list[str]:
    """Keys as canonical JSON, each once: a key, or a JSON list of keys, per option and per line of the file."""
    from featurekit_spark.cache.show import parse_key_text

    texts = list(given or ())
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the keys in {str(file)!r} cannot be read: {error}") from error
    found = []
    for text in texts:
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if isinstance(parsed, list) and parsed and all(isinstance(item, list) for item in parsed):
            found += [parse_key_text(json.dumps(item)) for item in parsed]
        else:
            found.append(parse_key_text(text))
    return list(dict.fromkeys(found))


def _invalidated_text(report: Mapping[str, Any]) -> Iterator[str]:
    verb = "would go" if report["dry_run"] else "went"
    yield (
        f"{counted(report['rows'], 'row')} of {report['builder']} for {counted(report['keys'], 'key')} {verb}, "
        f"with {counted(report['traces'], 'trace')}"
    )
    missing = report["keys_without_entries"]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        yield f"without entries: {', '.join(missing[:5])}{more}"
    if report["rows"]:
        yield f"the next run computes them again; last time that was {cost_text(report['recompute'])}"


def _purged_text(report: Mapping[str, Any]) -> Iterator[str]:
    verb = "would be removed" if report["dry_run"] else "removed"
    for name, count in report["entries"].items():
        yield f"{verb}: {counted(count, 'entry', 'entries')} of {name}"
    traces, matrices = counted(report["traces"], "trace"), counted(report["matrices"], "matrix", "matrices")
    yield f"{verb}: {traces}, {matrices}"
    for name, told in report["sinks"].items():
        if "not_looked_at" in told:
            yield f"sink {name}: not looked at; {told['not_looked_at']}"
        else:
            own = counted(told.get("rows", told.get("keys", 0)), "row")
            lists = counted(told["lists"], "list")
            yield f"{verb} from sink {name}: {own} of theirs, and them from {lists} of others"
    records = counted(report.get("run_records", 0), "run record")
    yield f"{verb} from {records} and {counted(report['run_documents'], 'run document')}"
    if report.get("batches_on_their_way"):
        batches = counted(report["batches_on_their_way"], "batch", "batches")
        yield (
            f"{batches} of calls on the way may name them, here and at the provider: purge again once a run or "
            "`featurekit batches collect` has taken the answers in"
        )
    if not (report["entries"] or report["traces"] or any(map(_found_in, report["sinks"].values()))):
        yield "nothing names them: are these the fields as `featurekit cache show` has them in a key?"
    if not report["dry_run"]:
        yield "earlier versions of these tables, and what their logs say, are gone"
    shared = report["keyed_by_their_texts"]
    if shared:
        told = ", ".join(f"{name} {count}" for name, count in shared.items())
        yield f"not covered: entries keyed by their texts, which others may share ({told}); --text takes them"
    if "not_looked_at" in report:
        yield f"not looked at: {report['not_looked_at']}"


def _found_in(sink: Mapping[str, Any]) -> bool:
    return any(sink.get(what) for what in ("not_looked_at", "rows", "keys", "lists"))
