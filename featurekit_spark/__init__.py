"""Write a feature once as a small class; get it for one key in-process or for every key on Spark.

Importing this package imports nothing heavy: names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurekit_spark.budget import Budget
    from featurekit_spark.builder import (
        Dep,
        FeatureBuilder,
        Gathered,
        KeySet,
        Metered,
        Source,
        Update,
        each,
    )
    from featurekit_spark.cache.delta import DeltaCache
    from featurekit_spark.cache.memory import MemoryCache
    from featurekit_spark.context import Context, FixedClock
    from featurekit_spark.controller import Controller, Feature
    from featurekit_spark.errors import FeaturekitError
    from featurekit_spark.freshness import Freshness
    from featurekit_spark.session import Limits, RunResult, Session
    from featurekit_spark.values import codec, vector

__all__ = [
    "Budget",
    "Context",
    "Controller",
    "DeltaCache",
    "Dep",
    "Feature",
    "FeatureBuilder",
    "FeaturekitError",
    "FixedClock",
    "Freshness",
    "Gathered",
    "KeySet",
    "Limits",
    "MemoryCache",
    "Metered",
    "RunResult",
    "Session",
    "Source",
    "Update",
    "codec",
    "each",
    "vector",
]

__version__ = "0.1.0"

_HOME = {
    "budget": ("Budget",),
    "builder": ("Dep", "FeatureBuilder", "Gathered", "KeySet", "Metered", "Source", "Update", "each"),
    "cache.delta": ("DeltaCache",),
    "cache.memory": ("MemoryCache",),
    "context": ("Context", "FixedClock"),
    "controller": ("Controller", "Feature"),
    "errors": ("FeaturekitError",),
    "freshness": ("Freshness",),
    "session": ("Limits", "RunResult", "Session"),
    "values": ("codec", "vector"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
