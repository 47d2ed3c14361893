"""Where the cache is that a command cares for, and which class a builder's name means. Imports nothing slow."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import OpenOptions
from featurekit_spark.errors import ConfigError, FeaturekitError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.builder import FeatureBuilder
    from featurekit_spark.cache.delta import DeltaCache
    from featurekit_spark.settings import Settings

__all__ = ["CacheOptions", "Place", "builder_named"]


@dataclass(frozen=True)
class Place:
    """A cache, the warehouse whose runs read it (None: the folder it is in), and the settings that named it."""

    cache: DeltaCache
    warehouse: str | None
    settings: Settings | None
    merchant: str | None
    market: str | None


@dataclass(frozen=True, kw_only=True)
class CacheOptions(OpenOptions):
    """Of a command about a cache: the one of the settings, or any."""

    path: Annotated[
        str | None, typer.Option(metavar="CACHE", help="The cache itself, in place of settings.")
    ] = None

    def place(self) -> Place:
        """The cache at `path`, else the one of the settings. Raises ConfigError where there is none."""
        from featurekit_spark.cache.delta import DeltaCache

        if self.path is not None:
            if self.conf_file is not None or self.overrides or self.merchant or self.market:
                raise UsageError(
                    "--path names the cache itself; leave it out, or --conf-file, --set and --merchant."
                )
            place = Place(DeltaCache(self.path), None, None, None, None)
            hint = "check --path"
        else:
            self.both_or_neither()
            settings = self.settings()
            if settings.cache.kind == "memory":
                raise UsageError(
                    "cache.kind is memory, which keeps nothing after a run: there is nothing there."
                )
            place = Place(
                DeltaCache(settings.cache_path, storage_options=settings.cache.storage_options),
                settings.warehouse,
                settings,
                self.merchant,
                self.market,
            )
            hint = f"cache.path is from {settings.origin('cache.path')}; give --path, --conf-file or --set"
        if not place.cache.exists():
            raise ConfigError(f"{place.cache.path!r} holds no cache: {hint}.")
        return place


def builder_named(name: str, place: Place) -> tuple[str, type[FeatureBuilder[Any]] | None]:
    """(name, class) for `package.module:Class` or a name that the logic builders' graph has; no class for another."""
    from featurekit_spark.builder import load_builder
    from featurekit_spark.graph import Graph
    from featurekit_spark.settings import Settings

    if ":" in name:
        found = load_builder(name)
        return found.name, found
    settings = place.settings or Settings()
    with suppress(FeaturekitError):  # the types in run records will do
        paths = [*settings.logic_builders, settings.logic_keys]
        for builder in Graph([load_builder(path) for path in paths]):
            if builder.name == name:
                return name, builder
    return name, None
