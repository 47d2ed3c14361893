"""`featurekit cache`: look at the cache, and care for it. What takes people's data out is in `removal_commands`.

Owns arguments and what is printed; what is done is in `cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from featurekit_spark.cli.cache_place import CacheOptions, builder_named
from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import Answer, DryRun, answering, command_app
from featurekit_spark.cli.wording import counted, shown_seconds, shown_size, table
from featurekit_spark.errors import DefinitionError, UsageError, known_names

__all__ = ["cache_app", "cost_text"]

cache_app = command_app("cache", "Look at the cache, and care for it.")

_SHOWN_DAMAGE = 20


@cache_app.command("stats")
@answering
def stats_command(
    options: CacheOptions,
    time: Annotated[bool, typer.Option(help="Time look-ups against builds.")] = True,
) -> Answer:
    """What each builder's entries take, cost and save.

    Entries, size, what they cost to build and save when they are hit, and whether looking one up is quicker than
    building it.

    Example: featurekit cache stats --conf-file conf/dev.yaml
    """
    place = options.place()
    from featurekit_spark.cache.stats import cache_stats

    found = cache_stats(place.cache, timed=time)
    return Answer({"status": "ok", **found}, _stats_text(found))


@cache_app.command("gc")
@answering
def gc_command(
    options: CacheOptions,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was stored longer ago: 30d, 12h, 2w.")
    ] = None,
    stale_configs: Annotated[
        bool, typer.Option("--stale-configs", help="Entries of configs that no group's newest run had.")
    ] = False,
    max_mb: Annotated[int | None, typer.Option(min=0, help="The oldest, until entries take this.")] = None,
    include_paid: Annotated[
        bool, typer.Option("--include-paid/--keep-paid", help="Also what has tokens or a price.")
    ] = False,
    include_current: Annotated[
        bool, typer.Option("--include-current", help="Also what is some key's answer now.")
    ] = False,
    dry_run: DryRun = False,
) -> Answer:
    """Take out entries that nothing current needs.

    Says what computing them again would cost, and deletes files that no commit names. Without an option only rows
    that repeat others go. Refused (exit 75) while a run reads the cache.

    Example: featurekit cache gc --older-than 30d --stale-configs --dry-run
    """
    place = options.place()
    from featurekit_spark.cache.gc import GcOptions, collect
    from featurekit_spark.freshness import duration

    try:
        age = None if older_than is None else duration(older_than)
    except DefinitionError as error:
        raise UsageError(f"--older-than: {error}") from None
    chosen = GcOptions(
        older_than=age,
        stale_configs=stale_configs,
        max_bytes=None if max_mb is None else max_mb * 1_000_000,
        include_paid=include_paid,
        include_current=include_current,
    )
    report = collect(place.cache, chosen, now=datetime.now(UTC), dry_run=dry_run, warehouse=place.warehouse)
    asked = older_than is not None or stale_configs or max_mb is not None
    return Answer({"status": "ok", **report}, _gc_text(report, asked=asked))


@cache_app.command("optimize")
@answering
def optimize_command(
    options: CacheOptions,
    z_order: Annotated[
        bool, typer.Option("--z-order", help="Sort by key as well: fewer files per key.")
    ] = False,
    retention_hours: Annotated[
        int, typer.Option(min=24, help="Keep files that left the tables since; readers may still need them.")
    ] = 168,
) -> Answer:
    """Merge small files into large ones.

    Those that left the tables a week ago are deleted. Runs may go on.

    Example: featurekit cache optimize --conf-file conf/dev.yaml
    """
    place = options.place()
    from featurekit_spark.cache.files import TABLES
    from featurekit_spark.cache.upkeep import compact, vacuum

    tables = {}
    for name in TABLES:
        done = compact(place.cache, name, z_order=z_order)
        tables[name] = {**done, "vacuumed_files": vacuum(place.cache, name, hours=retention_hours)}
    return Answer({"status": "ok", "tables": tables}, _optimized_text(tables))


@cache_app.command("verify")
@answering
def verify_command(
    options: CacheOptions,
    builder: Annotated[
        str | None, typer.Argument(help="Only this builder: a name, or package.module:Class.")
    ] = None,
) -> Answer:
    """Hash every entry again and report what is damaged.

    With file, builder and key. Exit code 4 where there is any damage.

    Example: featurekit cache verify --conf-file conf/dev.yaml
    """
    place = options.place()
    from featurekit_spark.cache.invalidate import known_builders
    from featurekit_spark.cache.verify import verify

    name, cls = (None, None) if builder is None else builder_named(builder, place)
    found = verify(place.cache, {name: cls} if name is not None and cls is not None else None, only=name)
    if name is not None and not found.rows and not found.damage:
        known = known_names(name, known_builders(place.cache))
        raise UsageError(f"builder {name!r} has no entries in {place.cache.path}. {known}")
    return Answer(
        {"status": "damaged" if found.damage else "ok", **found.to_json()},
        _verify_text(found),
        code=ExitCode.DATA if found.damage else ExitCode.OK,
    )


@cache_app.command("export")
@answering
def export_command(
    options: CacheOptions,
    builder: Annotated[str, typer.Argument(help="A name, or package.module:Class.")],
    to: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.parquet, FILE.csv or FILE.jsonl.")],
) -> Answer:
    """Write a builder's current values to a file.

    One row per key: its key fields, value, ts, hashes and run.

    Example: featurekit cache export LLMCompletion answers.parquet --conf-file conf/dev.yaml
    """
    place = options.place()
    from featurekit_spark.cache.show import export

    name, cls = builder_named(builder, place)
    rows = export(place.cache, name, to, cls)
    facts = {"status": "ok", "builder": name, "rows": rows, "file": str(to), "typed": cls is not None}
    untyped = "" if cls is not None else " (without its class: keys and values as they are recorded)"
    return Answer(facts, [f"{counted(rows, 'current value')} of {name} written to {to}{untyped}"])


@cache_app.command("show")
@answering
def show_command(
    options: CacheOptions,
    builder: Annotated[str, typer.Argument(help="A name, or package.module:Class.")],
    key: Annotated[str, typer.Argument(help='A JSON array: \'["abt","US","p1"]\'; one field may go bare.')],
) -> Answer:
    """Everything that the cache has of one key.

    Values, when and by which run, cost, identity, and what is current.

    Example: featurekit cache show LLMLogic '["demo","US","demo-000001"]' --conf-file conf/dev.yaml
    """
    place = options.place()
    from featurekit_spark.cache.show import parse_key_text, show

    name, cls = builder_named(builder, place)
    found = show(place.cache, name, parse_key_text(key), cls)
    return Answer({"status": "ok", **found}, _show_text(found))


def cost_text(cost: Mapping[str, Any]) -> str:
    """What a number of entries took, in words."""
    tokens = f", {counted(cost['tokens'], 'token')}" if cost["tokens"] else ""
    usd = "" if not cost["usd"] else f", {cost['usd']:.4g} usd"
    return f"{counted(cost['entries'], 'entry', 'entries')}, {shown_seconds(cost['seconds'])}{tokens}{usd}"


def _stats_text(found: Mapping[str, Any]) -> Iterator[str]:
    builders = found["builders"]
    rows: list[tuple[str, ...]] = [
        (
            *("builder", "entries", "keys", "size", "errors", "configs"),
            *("cost", "tokens", "usd", "saves", "look-up", "build"),
        )
    ]
    for name, facts in builders.items():
        timed, cost = facts.get("time") or {}, facts["cost"]
        counts = (
            facts["entries"],
            facts["keys"],
            shown_size(facts["bytes"]),
            facts["errors"],
            facts["configs"],
        )
        rows.append(
            (
                name,
                *map(str, counts),
                shown_seconds(cost["seconds"]),
                str(cost["tokens"]),
                "-" if cost["usd"] is None else f"{cost['usd']:.4g}",
                shown_seconds(facts["saves"]["seconds"]),
                *(shown_seconds(timed[what]) if timed.get(what) else "-" for what in ("lookup", "build")),
            )
        )
    yield from table(rows)
    yield "cost: of all entries; saves: a run that finds all current ones; look-up, build: per key, in a batch"
    for name, facts in found["tables"].items():
        size = shown_size(facts["bytes"])
        yield f"{name}: {counted(facts['rows'], 'row')}, {counted(facts['files'], 'file')}, {size}"
    quick = [name for name, facts in builders.items() if (facts.get("time") or {}).get("better_inline")]
    if quick:
        yield (
            f"Quicker to build than to look up, in batches: {', '.join(quick)}. `inline = True` on such a "
            "builder keeps it out of the cache."
        )


def _gc_text(report: Mapping[str, Any], *, asked: bool) -> Iterator[str]:
    verb = "would go" if report["dry_run"] else "went"
    why = ", ".join(
        f"{count} {_REASONS.get(name, name)}" for name, count in report["reasons"].items() if count
    )
    yield (
        f"{counted(report['rows'], 'row')} of entries {verb}, {shown_size(report['bytes'])}"
        f"{f' ({why})' if why else ''}, and {counted(report['traces'], 'trace')}"
    )
    for name, facts in report["builders"].items():
        size = shown_size(facts["bytes"])
        yield f"  {name}: {counted(facts['rows'], 'row')}, {size}; again {cost_text(facts)}"
    if report["rows"]:
        yield f"computing them again: {cost_text(report['recompute'])}"
    if report["kept_paid"]["entries"]:
        yield f"kept because they were paid for: {cost_text(report['kept_paid'])} (--include-paid takes them)"
    if report["still_over"]:
        yield f"still above --max-mb: {shown_size(report['bytes_left'])} are current or paid for"
    if report["unused_files"] or report["vacuumed_files"]:
        yield (
            f"{counted(report['unused_files'], 'file')} that no commit names {verb}; "
            f"{report['vacuumed_files']} that left the tables a week ago were deleted"
        )
    if not asked:
        yield "only rows that repeat others were looked for: --older-than, --stale-configs and --max-mb take more"


_REASONS = {
    "repeated": "repeat others",
    "stale_config": "of a config that is no longer current",
    "age": "too old",
    "size": "for --max-mb",
}


def _optimized_text(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max(map(len, tables))
    for name, facts in tables.items():
        yield (
            f"{name:<{width}}  {facts['files_before']} -> {counted(facts['files'], 'file')}, "
            f"{shown_size(facts['bytes_before'])} -> {shown_size(facts['bytes'])}, "
            f"{counted(facts['vacuumed_files'], 'old file')} deleted"
        )
        if facts["skipped"]:
            yield f"  left as they are, because Spark wrote their folder: {', '.join(facts['skipped'])}"


def _verify_text(found: Any) -> Iterator[str]:
    for damage in found.damage[:_SHOWN_DAMAGE]:
        yield f"{damage.builder} {damage.key or '(whole file)'}: {damage.what}\n  in {damage.file}"
    if len(found.damage) > _SHOWN_DAMAGE:
        yield f"and {len(found.damage) - _SHOWN_DAMAGE} more; --output json lists all"
    typed = f", {found.untyped} of unknown type were not" if found.untyped else ""
    yield (
        f"{counted(found.rows, 'row')}, {counted(found.values, 'value')} hashed again{typed}; "
        f"{len(found.damage) or 'none'} damaged"
    )
    if found.dangling:
        yield (
            f"{counted(found.dangling, 'trace names', 'traces name')} no entry: harmless, "
            "what they stand for is computed again"
        )


def _show_text(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['builder']} {found['key']}"
    for entry in found["entries"]:
        state = "current" if entry["current"] else "earlier" if entry["status"] == "ok" else entry["status"]
        yield f"- {state}, {entry['ts']:%Y-%m-%d %H:%M:%S} UTC, run {entry['run_id']}"
        if entry["error"] is not None:
            yield f"    error        {entry['error']}"
        else:
            yield f"    value        {entry['value']!r}"
        usd = f", {entry['usd']:.4g} usd" if entry["usd"] else ""
        tokens = f", {counted(entry['tokens'], 'token')}" if entry["tokens"] else ""
        yield f"    cost         {shown_seconds(entry['seconds'] or 0)}{tokens}{usd}"
        for name in ("config_hash", "inputs_hash", "value_hash", "entry_id"):
            yield f"    {name:<12} {entry[name]}"
