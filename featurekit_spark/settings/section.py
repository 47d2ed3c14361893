"""What the sections of settings are made of: types with their bounds, templates with named fields, masked values.

Knows no section.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from featurekit_spark.errors import known_names
from featurekit_spark.masks import mask_password

__all__ = [
    "PROMPT_FIELDS",
    "Amount",
    "Count",
    "EnvName",
    "ImportPath",
    "Limit",
    "Seconds",
    "SecretPath",
    "Section",
    "Share",
    "Text",
    "Url",
    "template_fields",
]


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
PROMPT_FIELDS = frozenset({"title"})
"""What a prompt_template may name."""
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]


def template_fields(template: str, *, known: Set[str]) -> set[str]:
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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, mask_password(value) if isinstance(value, str) else value
