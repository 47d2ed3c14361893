"""`featurekit cache`: look at the cache, and care for it. What takes people's data out is in `removal_commands`.

Owns arguments and what is printed; what is done is in `cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from featurekit_spark.cli.cache_place import (
    AnyMarket,
    AnyMerchant,
    CachePath,
    builder_named,
    place_of,
    shown_size,
)
from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import (
    ConfFile,
    Output,
    OutputOption,
    Overrides,
    command_app,
    guarded,
    print_json,
)

__all__ = ["cache_app", "cost_text"]

cache_app = command_app("cache", "Look at the cache, and care for it.")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
_SHOWN_DAMAGE = 20


@cache_app.command("stats")
def stats_command(
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    time: Annotated[bool, typer.Option(help="Time look-ups against builds.")] = True,
    output: OutputOption = Output.TEXT,
) -> None:
    """What each builder's entries take, cost and save.

    Entries, size, what they cost to build and save when they are hit, and whether looking one up is quicker than
    building it.

    Example: featurekit cache stats --conf-file conf/dev.yaml
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.stats import cache_stats

        found = cache_stats(place.cache, timed=time)
        if output is Output.JSON:
            print_json({"status": "ok", **found})
        else:
            print("\n".join(_stats_text(found)))


@cache_app.command("gc")
def gc_command(
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
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
    output: OutputOption = Output.TEXT,
) -> None:
    """Take out entries that nothing current needs.

    Says what computing them again would cost, and deletes files that no commit names. Without an option only rows
    that repeat others go. Refused (exit 75) while a run reads the cache.

    Example: featurekit cache gc --older-than 30d --stale-configs --dry-run
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.gc import GcOptions, collect
        from featurekit_spark.freshness import duration

        options = GcOptions(
            older_than=None if older_than is None else duration(older_than),
            stale_configs=stale_configs,
            max_bytes=None if max_mb is None else max_mb * 1_000_000,
            include_paid=include_paid,
            include_current=include_current,
        )
        report = collect(
            place.cache, options, now=datetime.now(UTC), dry_run=dry_run, warehouse=place.warehouse
        )
        if output is Output.JSON:
            print_json({"status": "ok", **report})
        else:
            print("\n".join(_gc_text(report)))


@cache_app.command("optimize")
def optimize_command(
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    z_order: Annotated[
        bool, typer.Option("--z-order", help="Sort by key as well: fewer files per key.")
    ] = False,
    retention_hours: Annotated[
        int, typer.Option(min=24, help="Keep files that left the tables since; readers may still need them.")
    ] = 168,
    output: OutputOption = Output.TEXT,
) -> None:
    """Merge small files into large ones.

    Those that left the tables a week ago are deleted. Runs may go on.

    Example: featurekit cache optimize --conf-file conf/dev.yaml
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.files import TABLES
        from featurekit_spark.cache.upkeep import compact, vacuum

        report = {}
        for name in TABLES:
            done = compact(place.cache, name, z_order=z_order)
            report[name] = {**done, "vacuumed_files": vacuum(place.cache, name, hours=retention_hours)}
        if output is Output.JSON:
            print_json({"status": "ok", "tables": report})
            return
        for name, facts in report.items():
            print(
                f"{name:<8} {facts['files_before']} -> {facts['files']} files, "
                f"{shown_size(facts['bytes_before'])} -> {shown_size(facts['bytes'])}, "
                f"{facts['vacuumed_files']} old files deleted"
            )
            if facts["skipped"]:
                print(f"  left as they are, because Spark wrote their folder: {', '.join(facts['skipped'])}")


@cache_app.command("verify")
def verify_command(
    builder: Annotated[
        str | None, typer.Argument(help="Only this builder: a name, or package.module:Class.")
    ] = None,
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Hash every entry again and report what is damaged.

    With file, builder and key. Exit code 4 where there is any damage.

    Example: featurekit cache verify --conf-file conf/dev.yaml
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.verify import verify

        name, cls = (None, None) if builder is None else builder_named(builder, place)
        found = verify(place.cache, {name: cls} if name is not None and cls is not None else None, only=name)
        if output is Output.JSON:
            print_json({"status": "damaged" if found.damage else "ok", **found.to_json()})
        else:
            print("\n".join(_verify_text(found)))
        if found.damage:
            raise typer.Exit(ExitCode.DATA)


@cache_app.command("export")
def export_command(
    builder: Annotated[str, typer.Argument(help="A name, or package.module:Class.")],
    to: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.parquet, FILE.csv or FILE.jsonl.")],
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write a builder's current values to a file.

    One row per key: its key fields, value, ts, hashes and run.

    Example: featurekit cache export LLMCompletion answers.parquet --conf-file conf/dev.yaml
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.show import export

        name, cls = builder_named(builder, place)
        rows = export(place.cache, name, to, cls)
        facts = {"status": "ok", "builder": name, "rows": rows, "file": str(to), "typed": cls is not None}
        if output is Output.JSON:
            print_json(facts)
        else:
            untyped = "" if cls is not None else " (without its class: keys and values as they are recorded)"
            print(f"{rows} current values of {name} in {to}{untyped}")


@cache_app.command("show")
def show_command(
    builder: Annotated[str, typer.Argument(help="A name, or package.module:Class.")],
    key: Annotated[str, typer.Argument(help='A JSON array: \'["abt","US","p1"]\'; one field may go bare.')],
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Everything that the cache has of one key.

    Values, when and by which run, cost, identity, and what is current.

    Example: featurekit cache show LLMLogic '["demo","US","demo-000001"]' --conf-file conf/dev.yaml
    """
    with guarded(output):
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.show import parse_key_text, show

        name, cls = builder_named(builder, place)
        found = show(place.cache, name, parse_key_text(key), cls)
        if output is Output.JSON:
            print_json({"status": "ok", **found})
        else:
            print("\n".join(_show_text(found)))


def cost_text(cost: Mapping[str, Any]) -> str:
    """What a number of entries took, in words."""
    usd = "" if cost["usd"] is None else f", {cost['usd']:.4g} usd"
    return f"{cost['entries']} entries, {cost['seconds']:.3g} s, {cost['tokens']} tokens{usd}"


def _stats_text(found: Mapping[str, Any]) -> Iterator[str]:
    builders = found["builders"]
    width = max([len(name) for name in builders] + [7])
    yield (
        f"{'builder':<{width}} {'entries':>9} {'keys':>9} {'size':>9} {'errors':>7} {'configs':>7} "
        f"{'cost s':>9} {'tokens':>9} {'usd':>9} {'saves s':>9} {'look-up':>9} {'build':>9}"
    )
    for name, facts in builders.items():
        timed, cost = facts.get("time"), facts["cost"]
        usd = "-" if cost["usd"] is None else f"{cost['usd']:.4g}"
        yield (
            f"{name:<{width}} {facts['entries']:>9} {facts['keys']:>9} {shown_size(facts['bytes']):>9} "
            f"{facts['errors']:>7} {facts['configs']:>7} {cost['seconds']:>9.3g} {cost['tokens']:>9} {usd:>9} "
            f"{facts['saves']['seconds']:>9.3g} {_micros(timed and timed['lookup']):>9} "
            f"{_micros(timed and timed['build']):>9}"
        )
    for name, table in found["tables"].items():
        yield f"{name}: {table['rows']} rows, {table['files']} files, {shown_size(table['bytes'])}"
    quick = [name for name, facts in builders.items() if (facts.get("time") or {}).get("better_inline")]
    if quick:
        yield (
            f"Quicker to build than to look up, in batches: {', '.join(quick)}. `inline = True` on such a "
            "builder keeps it out of the cache."
        )


def _micros(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.0f} us" if seconds < 1 else f"{seconds:.1f} s"


def _gc_text(report: Mapping[str, Any]) -> Iterator[str]:
    verb = "would go" if report["dry_run"] else "went"
    why = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report["reasons"].items() if count)
    yield (
        f"{report['rows']} rows of entries {verb}, {shown_size(report['bytes'])}"
        f"{f' ({why})' if why else ''}, and {report['traces']} traces"
    )
    for name, facts in report["builders"].items():
        yield f"  {name}: {facts['rows']} rows, {shown_size(facts['bytes'])}; again {cost_text(facts)}"
    yield f"computing them again: {cost_text(report['recompute'])}"
    if report["kept_paid"]["entries"]:
        yield f"kept because they were paid for: {cost_text(report['kept_paid'])} (--include-paid takes them)"
    if report["still_over"]:
        yield f"still above --max-mb: {shown_size(report['bytes_left'])} are current or paid for"
    yield (
        f"{report['unused_files']} files that no commit names {verb}; "
        f"{report['vacuumed_files']} that left the tables a week ago were deleted"
    )


def _verify_text(found: Any) -> Iterator[str]:
    for damage in found.damage[:_SHOWN_DAMAGE]:
        yield f"{damage.builder} {damage.key or '(whole file)'}: {damage.what}\n  in {damage.file}"
    if len(found.damage) > _SHOWN_DAMAGE:
        yield f"and {len(found.damage) - _SHOWN_DAMAGE} more; --output json lists all"
    typed = f", {found.untyped} of unknown type were not" if found.untyped else ""
    yield f"{found.rows} rows, {found.values} values hashed again{typed}; {len(found.damage)} damaged"
    if found.dangling:
        yield f"{found.dangling} traces name no entry: harmless, their keys are computed again"


def _show_text(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['builder']} {found['key']}"
    for entry in found["entries"]:
        yield f"- {'current' if entry['current'] else entry['status']}, {entry['ts']}, run {entry['run_id']}"
        if entry["error"] is not None:
            yield f"    error        {entry['error']}"
        else:
            yield f"    value        {entry['value']!r}"
        usd = "" if entry["usd"] is None else f", {entry['usd']} usd"
        yield f"    cost         {entry['seconds'] or 0:.6f} s, {entry['tokens'] or 0} tokens{usd}"
        for name in ("config_hash", "inputs_hash", "value_hash", "entry_id"):
            yield f"    {name:<12} {entry[name]}"
