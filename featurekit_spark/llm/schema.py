"""What a pydantic model is to a chat model and to the cache: a JSON Schema that strict servers take, and an Arrow type.

Owns which fields have both, and how an answer becomes a value. Must not know who asks for it, nor builders.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, RootModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from featurekit_spark.errors import DefinitionError, ValueMismatchError
from featurekit_spark.values import ValueType

__all__ = ["MisfitError", "arrow_type", "read_answer", "strict_schema"]

_LEAVES: Final[dict[Any, pa.DataType]] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    date: pa.date32(),
    datetime: pa.timestamp("us", tz="UTC"),
    AwareDatetime: pa.timestamp("us", tz="UTC"),
}
_SUPPORTED: Final = (
    "Fields may be str, int, float, bool, date, datetime, Decimal, Literal, Enum, lists of these, other models, "
    "and any of them or None."
)
# What servers compile into their grammar; every other limit is told to the model in words, and checked afterwards.
_KEPT: Final = (
    "type",
    "enum",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
)
_TOLD: Final = ("minLength", "maxLength", "pattern", "uniqueItems")
_FORMATS: Final = frozenset({"date-time", "date"})
_FENCE: Final = re.compile(r"^\s*```\w*\s*\{", re.MULTILINE)
_DECODER: Final = json.JSONDecoder()
_MOST_PROBLEMS: Final = 8
_LONGEST_INPUT: Final = 60


class MisfitError(ValueMismatchError):
    """An answer that does not fit its model; the message lists what is wrong, field by field."""


def arrow_type(model: type[BaseModel]) -> pa.StructType:
    """The type of the model's values, a struct of its fields by their names in Python.

    Raises DefinitionError, naming the field, for what has no Arrow type here.
    """
    return _struct(model, model.__name__, ())


def strict_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON Schema in the subset that strict servers take: every property required, none besides, no
    references; limits that the subset lacks stand in the description."""
    found = model.model_json_schema(schema_generator=_Generator)
    return _strict(found, found.get("$defs", {}))


def read_answer(model: type[BaseModel], kind: ValueType, text: str) -> Any:
    """A model's answer as a checked value of `kind`, which is of `arrow_type(model)`.

    JSON in a code block or after some words is found, too. Raises MisfitError; what a user's validator raises besides
    ValueError goes through.
    """
    try:
        return kind.checked(_plain(model.model_validate_json(_json_in(text))))
    except ValidationError as error:
        raise MisfitError(_told(error)) from error
    except ValueMismatchError as error:
        raise MisfitError(str(error)) from error


def _struct(model: type[BaseModel], path: str, above: tuple[type, ...]) -> pa.StructType:
    if issubclass(model, RootModel) or not model.model_fields:
        raise DefinitionError(
            f"{path} has no named fields; strict servers answer with an object that has some"
        )
    if model in above:
        raise DefinitionError(
            f"{path} contains {model.__name__} again; a value's type needs an end. Spell out as many levels as you need"
        )
    return pa.struct(
        [
            (name, _arrow(info.annotation, info.metadata, f"{path}.{name}", (*above, model)))
            for name, info in model.model_fields.items()
        ]
    )


def _arrow(annotation: Any, metadata: Sequence[Any], path: str, above: tuple[type, ...]) -> pa.DataType:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _arrow(arguments[0], [*metadata, *arguments[1:]], path, above)
    if hasattr(annotation, "__value__"):  # type Name = ...
        return _arrow(annotation.__value__, metadata, path, above)
    if hasattr(annotation, "__supertype__"):  # NewType
        return _arrow(annotation.__supertype__, metadata, path, above)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return _arrow(inner[0], metadata, path, above)
        raise _refused(path, annotation, "it may be one of several types")
    if origin is Literal:
        return _of_choices(arguments, path, annotation)
    if origin is list:
        return pa.list_(_arrow(arguments[0], (), f"{path}[]", above))
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return _struct(annotation, path, above)
        if issubclass(annotation, Enum):
            return _of_choices(list(annotation), path, annotation)
        if annotation is Decimal:
            return _decimal(metadata, path)
    try:
        return _LEAVES[annotation]
    except (KeyError, TypeError):
        raise _refused(path, annotation, "it has no Arrow type here") from None


def _of_choices(choices: Iterable[Any], path: str, annotation: Any) -> pa.DataType:
    values = [choice.value if isinstance(choice, Enum) else choice for choice in choices]
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and (kind := kinds.pop()) in (str, int, bool):
        return _LEAVES[kind]
    raise _refused(path, annotation, "its choices are not all of one type among str, int and bool")


def _decimal(metadata: Sequence[Any], path: str) -> pa.DataType:
    inner = [part for item in metadata if isinstance(item, FieldInfo) for part in item.metadata]
    found: dict[str, int] = {}
    for item in (*metadata, *inner):
        for name in ("max_digits", "decimal_places"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    if len(found) < 2:
        raise _refused(path, "Decimal", "its size is open; give it Field(max_digits=..., decimal_places=...)")
    try:
        return pa.decimal128(found["max_digits"], found["decimal_places"])
    except (ValueError, pa.ArrowException) as error:
        raise _refused(path, "Decimal", str(error)) from error


def _refused(path: str, annotation: Any, why: str) -> DefinitionError:
    shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return DefinitionError(f"{path} is declared as {shown}: {why}. {_SUPPORTED}")


class _Generator(GenerateJsonSchema):
    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        """A number while a float holds all its digits, else text: pydantic's own pattern is not taken everywhere."""
        digits, places = schema.get("max_digits") or 0, schema.get("decimal_places") or 0
        limits = {
            keyword: float(schema[name])
            for name, keyword in _DECIMAL_LIMITS.items()
            if schema.get(name) is not None
        }
        told = [f"at most {places} digits after the point"]
        if digits > _FLOAT_DIGITS:
            told += [f"{keyword}: {number}" for keyword, number in limits.items()]
            return {"type": "string", "limits": ["a decimal number", *told]}
        if not {"maximum", "exclusiveMaximum"} & set(limits):
            limits["exclusiveMaximum"] = float(10 ** (digits - places))
        if not {"minimum", "exclusiveMinimum"} & set(limits):
            limits["exclusiveMinimum"] = -float(10 ** (digits - places))
        return {"type": "number", "limits": told, **limits}


_FLOAT_DIGITS: Final = 15
_DECIMAL_LIMITS: Final = {
    "multiple_of": "multipleOf",
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def _strict(node: Mapping[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without references; `title`, `default` and the like dropped: they change with pydantic's versions."""
    while "$ref" in node:
        beside = {name: value for name, value in node.items() if name != "$ref"}
        node = {**defs[node["$ref"].rpartition("/")[2]], **beside}
    made: dict[str, Any] = {}
    told = [*node.get("limits", ()), *(f"{name}: {node[name]}" for name in _TOLD if name in node)]
    if "format" in node and node["format"] not in _FORMATS:
        told.append(f"format: {node['format']}")
    text = inspect.cleandoc(node.get("description", ""))
    if text or told:
        made["description"] = " ".join(filter(None, [text, f"({'; '.join(told)})" if told else ""]))
    for name in _KEPT:
        if name in node:
            made[name] = node[name]
    if node.get("format") in _FORMATS:
        made["format"] = node["format"]
    if "const" in node:
        made["enum"] = [node["const"]]
    choices = node.get("anyOf", node.get("oneOf"))
    if choices is not None:
        made["anyOf"] = [_strict(choice, defs) for choice in choices]
    if "items" in node:
        made["items"] = _strict(node["items"], defs)
    if "properties" in node:
        made["properties"] = {name: _strict(item, defs) for name, item in node["properties"].items()}
        made["required"] = list(node["properties"])
        made["additionalProperties"] = False
    return made


def _json_in(text: str) -> str:
    """The JSON object in a text; the text itself where there is none, so that the error is about it.

    Only the first object, or that of a code block: one inside another that was cut off is no answer.
    """
    fence = _FENCE.search(text)
    for start in (fence.end() - 1 if fence else -1, text.find("{")):
        if start >= 0:
            with suppress(ValueError, RecursionError):
                return text[start : _DECODER.raw_decode(text, start)[1]]
    return text


def _plain(value: Any) -> Any:
    """A validated model as what its Arrow type takes."""
    match value:
        case BaseModel():
            return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
        case Enum():
            return value.value
        case list():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            raise MisfitError(f"found {value!r}, which is no number that JSON has")
        case _:
            return value


def _told(error: ValidationError) -> str:
    problems = []
    for found in error.errors(include_url=False, include_context=False):
        where = ".".join(map(str, found["loc"]))
        given = repr(found["input"])
        given = given if len(given) <= _LONGEST_INPUT else f"{given[: _LONGEST_INPUT - 3]}..."
        problems.append(
            f"{where}: {found['msg']}, found {given}" if where else f"{found['msg']}, found {given}"
        )
    more = len(problems) - _MOST_PROBLEMS
    return "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
