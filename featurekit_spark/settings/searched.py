"""Settings of vector search: of the matrix and how it is searched, and of an index outside."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from featurekit_spark.settings.section import (
    Count,
    EnvName,
    Limit,
    Seconds,
    Section,
    Text,
    Url,
    template_fields,
)

__all__ = ["SearchSettings", "VectorIndexSettings"]

_OF_A_GROUP = frozenset({"merchant", "market"})


class SearchSettings(Section):
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


class VectorIndexSettings(Section):
    """Where `featurekit vectors` exports to: a folder (of LanceDB also an address such as s3://bucket/path), or a
    Qdrant server, whose key is in the variable `api_key_env`. `name` is a template: each merchant and market has an
    index of its own; null is `{merchant}-{market}`. `fields` are attributes of products, with their types: what can be
    filtered on."""

    kind: Literal["none", "qdrant", "lancedb"] = "none"
    path: Text | None = None
    url: Url | None = None
    api_key_env: EnvName | None = None
    name: Text | None = None
    fields: dict[Text, Literal["str", "int", "float", "bool"]] = Field(default_factory=dict)
    exact: Annotated[bool, Field(strict=True)] = True
    timeout_s: Seconds = 60.0

    @field_validator("name")
    @classmethod
    def _is_of_a_group(cls, name: str | None) -> str | None:
        if name is None:
            return None
        # Merchant and market come without - and . (`stores.names`), so that no two groups share a name.
        between = re.findall(r"\}([^{}]*)\{", name)
        named = template_fields(name, known=_OF_A_GROUP)
        if named < _OF_A_GROUP or not all(re.search(r"[-.]", text) for text in between):
            raise PydanticCustomError(
                "template",
                "names one index for several merchants or markets, which would replace each other's products; use "
                "{both} in it, with - or . between them: {example}",
                {"both": "{merchant} and {market}", "example": "shop-{merchant}-{market}"},
            )
        return name

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
