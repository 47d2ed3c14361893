"""The settings of a run: which keys exist, their types, defaults and meaning.

Owns the models (their defaults are the built-in base) and the origin that every value remembers. It must
not know files, environment or command line (`config` reads those), nor what the settings are used for
(bootstrap builds the real adapters from them).
"""

from __future__ import annotations

from featurekit_spark.masks import mask_password
from featurekit_spark.settings.paid import (
    EmbedderSettings,
    LLMSettings,
    PriceSettings,
    RetentionSettings,
    TracingSettings,
)
from featurekit_spark.settings.root import (
    DEFAULT_ORIGIN,
    EngineSettings,
    Leaf,
    RunSettings,
    Settings,
    leaf_paths,
    origin_of,
)
from featurekit_spark.settings.searched import SearchSettings, VectorIndexSettings
from featurekit_spark.settings.stored import (
    CacheSettings,
    DeltaSinkSettings,
    InteractionDBSettings,
    ProductDBSettings,
    PublishGateSettings,
    RedisSinkSettings,
    SinkSettings,
)

__all__ = [
    "DEFAULT_ORIGIN",
    "CacheSettings",
    "DeltaSinkSettings",
    "EmbedderSettings",
    "EngineSettings",
    "InteractionDBSettings",
    "LLMSettings",
    "Leaf",
    "PriceSettings",
    "ProductDBSettings",
    "PublishGateSettings",
    "RedisSinkSettings",
    "RetentionSettings",
    "RunSettings",
    "SearchSettings",
    "Settings",
    "SinkSettings",
    "TracingSettings",
    "VectorIndexSettings",
    "leaf_paths",
    "mask_password",
    "origin_of",
]
