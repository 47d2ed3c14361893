"""`featurekit cache promote`: what a cache has goes down into the one at `cache.base`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.shared import Answer, DryRun, GroupOptions, answering
from featurekit_spark.cli.wording import counted, table
from featurekit_spark.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.cache.overlay import OverlayCache
    from featurekit_spark.cache.promote import Promoted
    from featurekit_spark.settings import Settings

__all__ = ["promote_command"]


@answering
def promote_command(
    options: GroupOptions,
    builder: Annotated[
        list[str] | None, typer.Option(help="Only this builder; may be given several times.")
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="Only what this run made.")] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="Also what targets were found valid with (same sources only).")
    ] = False,
    dry_run: DryRun = False,
) -> Answer:
    """Give the cache at cache.base what cache.path has and it lacks.

    Entries, and which of them are current, in one append; done again, it does nothing. Afterwards cache.base
    alone answers what both answered together. No run should write to cache.base meanwhile.

    Example: featurekit cache promote --merchant demo --market US --conf-file dev.yaml --dry-run
    """
    settings = options.settings()
    over = _overlay(settings, options.merchant, options.market)
    from featurekit_spark.cache.promote import promote

    told = promote(over.own, over.base, builders=builder or (), run_id=run_id, traces=traces, dry_run=dry_run)
    facts = {
        "status": "ok",
        "dry_run": dry_run,
        "from": settings.cache_path,
        "to": settings.cache.base,
        "builders": {name: asdict(found) for name, found in told.items()},
    }
    return Answer(facts, _told(told, settings, dry_run))


def _overlay(settings: Settings, merchant: str, market: str) -> OverlayCache:
    if settings.cache.base is None:
        raise ConfigError(
            "cache.base is not set, so there is no cache to promote to: give the path of one in the conf file or "
            "with --set cache.base=PATH."
        )
    if settings.cache.kind == "memory":
        raise UsageError(
            "cache.kind is memory, which keeps nothing after a run: there is nothing to promote."
        )
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.cache.overlay import OverlayCache

    cache = Bootstrap(settings, merchant=merchant, market=market).cache
    assert isinstance(cache, OverlayCache)  # there is a base
    return cache


def _told(told: Mapping[str, Promoted], settings: Settings, dry_run: bool) -> Iterator[str]:
    verb = "would go" if dry_run else "went"
    total = sum(found.entries + found.pointers + found.traces for found in told.values())
    places = f"from {settings.cache_path} to {settings.cache.base}"
    yield f"{counted(total, 'row')} {verb} {places}"
    if not total:
        yield "  nothing is there that cache.base lacks"
        return
    counts = (
        (f"  {name}", str(found.entries), str(found.pointers), str(found.traces))
        for name, found in told.items()
    )
    yield from table([("  builder", "entries", "pointers", "traces"), *counts])
