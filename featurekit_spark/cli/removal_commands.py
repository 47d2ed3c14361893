"""`featurekit invalidate`: entries that must not answer any more, for a reason that is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from featurekit_spark.cli.cache_commands import DryRun, cost_text
from featurekit_spark.cli.cache_place import AnyMarket, AnyMerchant, CachePath, builder_named, place_of
from featurekit_spark.cli.shared import ConfFile, Output, OutputOption, Overrides, guarded, print_json
from featurekit_spark.errors import UsageError

__all__ = ["invalidate_command"]


def invalidate_command(
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
    path: CachePath = None,
    merchant: AnyMerchant = None,
    market: AnyMarket = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Take a builder's entries out, so that the next run computes just those again.

    What lies above them is computed again only where their value changes. Refused (exit 75) while a run reads
    the cache.

    Example: featurekit invalidate LLMSuggestions --keys '["abt","US","p1"]' --reason "the parser was wrong"
    """
    with guarded(output):
        if everything == bool(keys or keys_file):
            raise UsageError("say which entries: --keys KEY (or --keys-file FILE), or --all.")
        place = place_of(path, merchant, market, conf_file, overrides)
        from featurekit_spark.cache.invalidate import invalidate

        chosen = None if everything else keys_of(keys, keys_file)
        report = invalidate(
            place.cache,
            builder_named(builder, place)[0],
            chosen,
            reason=reason,
            now=datetime.now(UTC),
            dry_run=dry_run,
            warehouse=place.warehouse,
        )
        if output is Output.JSON:
            print_json({"status": "ok", **report})
        else:
            print("\n".join(_invalidated_text(report)))


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
        f"{report['rows']} rows of {report['builder']} for {report['keys']} keys {verb}, "
        f"with {report['traces']} traces"
    )
    missing = report["keys_without_entries"]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        yield f"without entries: {', '.join(missing[:5])}{more}"
    yield f"the next run computes them again: {cost_text(report['recompute'])} last time"
