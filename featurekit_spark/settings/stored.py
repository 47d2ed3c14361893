"""Settings of what is read and written: cache, catalogs, interactions, sinks, and what a publication must hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from featurekit_spark.cache.storage import check_options
from featurekit_spark.errors import ConfigError
from featurekit_spark.settings.section import Count, Seconds, Section, Share, Text, template_fields

__all__ = [
    "CacheSettings",
    "DeltaSinkSettings",
    "InteractionDBSettings",
    "ProductDBSettings",
    "PublishGateSettings",
    "RedisSinkSettings",
    "SinkSettings",
]


class CacheSettings(Section):
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


class ProductDBSettings(Section):
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


class InteractionDBSettings(Section):
    kind: Literal["files", "delta", "none"] = "none"
    path: Text | None = None

    @model_validator(mode="after")
    def _has_path(self) -> InteractionDBSettings:
        if self.kind != "none" and self.path is None:
            raise PydanticCustomError("needs", "needs a path when kind is {kind}", {"kind": repr(self.kind)})
        return self


class DeltaSinkSettings(Section):
    """`path` null means `{warehouse}/recommendations`; ask `Settings.sink_path`."""

    kind: Literal["delta"] = "delta"
    path: Text | None = None


_KEY_FIELDS = {"merchant", "market", "product_id", "logic_builder"}


class RedisSinkSettings(Section):
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
        fields = template_fields(template, known=_KEY_FIELDS)
        for name in needed:
            if name not in fields:
                raise PydanticCustomError(
                    "template", "lacks {field}, so that different keys would overwrite one another",
                    {"field": "{" + name + "}"},
                )  # fmt: skip
        return template


SinkSettings = DeltaSinkSettings | RedisSinkSettings


class PublishGateSettings(Section):
    """The largest share by which rows or coverage may fall and still be published; null turns it off."""

    max_row_drop: Share | None = 0.5
    max_coverage_drop: Share | None = 0.5
