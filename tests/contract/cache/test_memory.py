from __future__ import annotations

from pathlib import Path

from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.testing.behaviour import CacheBehaviour


class TestMemoryCache(CacheBehaviour):
    durable = False

    def make_cache(self, folder: Path) -> MemoryCache:
        return MemoryCache()
