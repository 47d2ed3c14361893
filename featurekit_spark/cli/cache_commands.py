"""`featurekit cache`: care for the cache."""

from __future__ import annotations

from featurekit_spark.cli.shared import command_app

__all__ = ["cache_app"]

cache_app = command_app("cache", "Look at the cache, and care for it.")
