"""A small filter over the payload of an index: equality, one of, range, and, or.

Owns its meaning, the check against the declared fields, and the form that is typed on a command line. How a store says
the same in its own language is the store's affair; one that cannot refuses.

A field that is null meets no condition. Text is compared by code points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias, assert_never

from featurekit_spark.errors import UsageError, known_names

__all__ = [
    "And",
    "Equals",
    "FieldKind",
    "Filter",
    "In",
    "Or",
    "Range",
    "Scalar",
    "checked_filter",
    "checked_value",
    "matches",
    "parse_filter",
]

FieldKind = Literal["str", "int", "float", "bool"]
Scalar: TypeAlias = str | int | float | bool
LARGEST_INT = 2**53
"""JSON readers and float64 comparisons keep integers up to here."""


@dataclass(frozen=True)
class Equals:
    """The field has this value."""

    field: str
    value: Scalar


@dataclass(frozen=True)
class In:
    """The field has one of these values."""

    field: str
    values: tuple[Scalar, ...]

    def __init__(self, field: str, values: Sequence[Scalar]) -> None:
        object.__setattr__(self, "field", field)
        object.__setattr__(self, "values", tuple(values))


@dataclass(frozen=True)
class Range:
    """The field lies between the bounds that are given."""

    field: str
    _: KW_ONLY
    gt: Scalar | None = None
    gte: Scalar | None = None
    lt: Scalar | None = None
    lte: Scalar | None = None

    @property
    def bounds(self) -> dict[str, Scalar]:
        """By name, those that are given."""
        named = {"gt": self.gt, "gte": self.gte, "lt": self.lt, "lte": self.lte}
        return {name: bound for name, bound in named.items() if bound is not None}


@dataclass(frozen=True)
class And:
    """All parts are met; without parts, everything is."""

    parts: tuple[Filter, ...]

    def __init__(self, *parts: Filter) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Or:
    """At least one part is met; without parts, nothing is."""

    parts: tuple[Filter, ...]

    def __init__(self, *parts: Filter) -> None:
        object.__setattr__(self, "parts", parts)


Filter: TypeAlias = Equals | In | Range | And | Or


def checked_filter(wanted: Filter | None, fields: Mapping[str, FieldKind]) -> Filter | bool:
    """The same filter with values of the fields' own types and without parts that decide nothing; True where everything
    meets it, False where nothing can. So no store meets an empty list, whose meaning differs from store to store.

    Raises UsageError for a field that is not declared, a value of another type, or what is no filter.
    """
    match wanted:
        case None:
            return True
        case Equals(name, value):
            return Equals(name, checked_value(name, value, _kind(name, fields), "filter"))
        case In(name, values):
            kind = _kind(name, fields)
            found = tuple(dict.fromkeys(checked_value(name, value, kind, "filter") for value in values))
            return In(name, found) if found else False
        case Range(name):
            kind = _kind(name, fields)
            if kind == "bool":
                raise UsageError(
                    f"filter: field {name!r} is a bool, which has no range; use Equals({name!r}, True)"
                )
            if not wanted.bounds:
                raise UsageError(f"filter: the range of {name!r} has no bound; give gt, gte, lt or lte")
            bounds = {
                side: checked_value(name, bound, kind, "filter") for side, bound in wanted.bounds.items()
            }
            return Range(name, **bounds)
        case And(parts) | Or(parts):
            decides = isinstance(wanted, Or)  # True decides an Or, False an And
            found_parts = [checked_filter(part, fields) for part in parts]
            if decides in [part for part in found_parts if isinstance(part, bool)]:
                return decides
            left = [part for part in found_parts if not isinstance(part, bool)]
            if not left:
                return not decides
            return left[0] if len(left) == 1 else type(wanted)(*left)
    raise UsageError(f"{wanted!r} is no filter; give Equals, In, Range, And or Or")


def checked_value(name: str, value: Any, kind: FieldKind, what: str) -> Any:
    """`value` as the field's own type. Raises UsageError, which begins with `what`, where it is of another."""
    match kind:
        case "bool" if isinstance(value, bool):
            return value
        case "str" if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{what}: {name!r} is {value!r}, which is no Unicode text: {error.reason}"
                ) from None
            return value
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > LARGEST_INT:
                raise UsageError(
                    f"{what}: {name!r} is {value!r}; integers go up to 2**53, as stores keep those exactly"
                )
            return value
        case "float" if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UsageError(f"{what}: {name!r} is {value!r}, which is not finite; leave the field out")
            return float(value) + 0.0  # no -0.0
    raise UsageError(f"{what}: field {name!r} is declared {kind}, found {value!r} ({type(value).__name__})")


def matches(wanted: Filter, payload: Mapping[str, Any]) -> bool:
    """Whether a row with this payload meets a checked filter."""
    match wanted:
        case Equals(name, value):
            return payload.get(name) is not None and bool(payload[name] == value)
        case In(name, values):
            return payload.get(name) is not None and payload[name] in values
        case Range(name):
            found: Any = payload.get(name)
            return found is not None and (
                (wanted.gt is None or found > wanted.gt)
                and (wanted.gte is None or found >= wanted.gte)
                and (wanted.lt is None or found < wanted.lt)
                and (wanted.lte is None or found <= wanted.lte)
            )
        case And(parts):
            return all(matches(part, payload) for part in parts)
        case Or(parts):
            return any(matches(part, payload) for part in parts)
    assert_never(wanted)


_CONDITION = re.compile(
    r"\s*(?P<field>[A-Za-z_]\w*)\s*(?P<sign><=|>=|<|>|=|\bin\b)\s*(?P<value>.*?)\s*", re.DOTALL
)
_SIDES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


def parse_filter(texts: Sequence[str], fields: Mapping[str, FieldKind]) -> Filter | None:
    """Conditions as they are typed, all of which must be met: `brand=Sony`, `brand in Sony,LG`, `price<=99.5`."""
    parts: list[Filter] = []
    for text in texts:
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise UsageError(f"{text!r} is no condition; write FIELD=VALUE, FIELD<=VALUE or 'FIELD in A,B'")
        name, sign, value = found["field"], found["sign"], found["value"]
        kind = _kind(name, fields)
        if sign == "in":
            parts.append(In(name, [_parsed(name, item.strip(), kind) for item in value.split(",")]))
        elif sign == "=":
            parts.append(Equals(name, _parsed(name, value, kind)))
        else:
            parts.append(Range(name, **{_SIDES[sign]: _parsed(name, value, kind)}))
    return And(*parts) if parts else None


def _parsed(name: str, text: str, kind: FieldKind) -> Scalar:
    try:
        match kind:
            case "str":
                return text
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "bool":
                return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise UsageError(f"filter: field {name!r} is declared {kind}, and {text!r} is none") from None
    assert_never(kind)


def _kind(name: str, fields: Mapping[str, FieldKind]) -> FieldKind:
    if name not in fields:
        raise UsageError(f"filter: the index has no field {name!r}. {known_names(name, fields)}")
    return fields[name]
