"""All settings of a run, and the origin that every value remembers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator
from pydantic_core import PydanticCustomError

from featurekit_spark.errors import ConfigError
from featurekit_spark.masks import mask_password
from featurekit_spark.settings.paid import EmbedderSettings, LLMSettings
from featurekit_spark.settings.searched import SearchSettings, VectorIndexSettings
from featurekit_spark.settings.section import (
    PROMPT_FIELDS,
    Count,
    ImportPath,
    Limit,
    Section,
    Text,
    template_fields,
)
from featurekit_spark.settings.stored import (
    CacheSettings,
    DeltaSinkSettings,
    InteractionDBSettings,
    ProductDBSettings,
    PublishGateSettings,
    SinkSettings,
)

__all__ = ["DEFAULT_ORIGIN", "EngineSettings", "Leaf", "RunSettings", "Settings", "leaf_paths", "origin_of"]

DEFAULT_ORIGIN = "default"


class EngineSettings(Section):
    """Up to `in_process_keys` keys run without Spark; up to `collect_mb` of a stage come to the driver."""

    kind: Literal["spark", "local"] = "spark"
    in_process_keys: Limit = 2000
    collect_mb: Limit = 256
    batch_rows: Count = 2048
    partitions: Count | None = None


class RunSettings(Section):
    """What one run may pay; null is no limit."""

    max_calls: Limit | None = None
    no_new_calls: bool = False
    max_usd: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Leaf:
    """One value as `config show` prints it: its key path, the value, and where it came from."""

    key: str
    value: object
    origin: str


class Settings(Section):
    """All settings of a run for one merchant and market; relative paths start at the working folder."""

    warehouse: Text = "warehouse"
    cache: CacheSettings = CacheSettings()
    product_db: ProductDBSettings = ProductDBSettings()
    interaction_data_db: InteractionDBSettings = InteractionDBSettings()
    embedder: EmbedderSettings = EmbedderSettings()
    llm: LLMSettings = LLMSettings()
    search: SearchSettings = SearchSettings()
    vector_index: VectorIndexSettings = VectorIndexSettings()
    template_engine: Literal["fields", "jinja"] = "fields"
    prompt_template: Annotated[Text, Field(validate_default=True)] = "get recommendations for {title}"
    logic_builders: Annotated[tuple[ImportPath, ...], Field(min_length=1)] = (
        "featurekit_spark.apps.product_recs:LLMLogic",
    )
    logic_keys: ImportPath = "featurekit_spark.apps.product_recs:ProductIds"
    engine: EngineSettings = EngineSettings()
    run: RunSettings = RunSettings()
    sinks: tuple[Annotated[SinkSettings, Field(discriminator="kind")], ...] = (DeltaSinkSettings(),)
    publish_gate: PublishGateSettings = PublishGateSettings()

    _origins: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)

    @field_validator("prompt_template")
    @classmethod
    def _prompt_fields(cls, template: str, info: Any) -> str:
        if info.data.get("template_engine") == "jinja":
            from featurekit_spark.llm.templates import check_template

            try:
                check_template(template, PROMPT_FIELDS)
            except ConfigError as error:
                raise PydanticCustomError("template", "is refused: {why}", {"why": str(error)}) from None
        else:
            template_fields(template, known=PROMPT_FIELDS)
        return template

    @field_validator("logic_builders")
    @classmethod
    def _no_builder_twice(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if paths.count(path) > 1:
                raise PydanticCustomError("twice", "names {path} twice", {"path": path})
        return paths

    @property
    def cache_path(self) -> str:
        """Where the cache's tables are."""
        return self.cache.path or _below(self.warehouse, "cache")

    def sink_path(self, sink: DeltaSinkSettings) -> str:
        """Where a Delta sink's table is."""
        return sink.path or _below(self.warehouse, "recommendations")

    def origin(self, key: str) -> str:
        """Where the value at `key` (such as `llm.model`) came from: file, variable, `--set` or `default`."""
        return origin_of(self._origins, tuple(key.split(".")))

    def leaves(self) -> list[Leaf]:
        """Every value with its origin, sections in declared order; passwords in URLs are masked."""
        dumped = self.model_dump(mode="json")
        return [
            Leaf(".".join(path), _shown(value), origin_of(self._origins, path))
            for path, value in leaf_paths(dumped)
        ]


def leaf_paths(data: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Key paths and values, depth first; a list or an empty map is one leaf."""
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaf_paths(value, (*path, key))
        else:
            yield (*path, key), value


def origin_of(origins: Mapping[tuple[str, ...], str], path: tuple[str, ...]) -> str:
    """The origin of `path`, of what contains it, or (for a section) of the first value inside it."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return next((origin for known, origin in origins.items() if known[: len(path)] == path), DEFAULT_ORIGIN)


def _shown(value: object) -> object:
    if isinstance(value, str):
        return mask_password(value)
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return value


def _below(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
