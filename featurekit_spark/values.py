"""Value types: what a builder's value may be, its canonical bytes, and its hash.

A value is Arrow-typed or goes through the user's own codec; never a pickle, which would run code on read and
change with every library version. Knows nothing of builders and caches.

    value = pa.string()                      text, numbers, dates, lists, structs, maps
    value = vector()                         float32[dim], dim from the config's field `dim`
    value = codec(encode=..., decode=...)    anything else: bytes by two functions of yours

Canonical bytes: text as UTF-8, numbers and times as decimal text, vectors as little-endian float32, nested
types as JSON; so a value can be read with `CAST(value AS STRING)` wherever it is not a vector.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from featurekit_spark.errors import DefinitionError, ValueMismatchError
from featurekit_spark.fingerprint import payload_hash, quote

__all__ = ["NULL_HASH", "Codec", "ValueType", "Vector", "codec", "value_type", "vector"]

NULL_HASH = payload_hash("null", b"")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_DECODER = json.JSONDecoder()
_PYTHON_TYPES: dict[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}


@dataclass(frozen=True)
class Vector:
    """float32[dim]. `dim` None takes the dimension from the config's field of that name; values are hashed
    on a grid, so that the last bits of a float decide nothing."""

    dim: int | None = None
    grid: float = 1e-6


def vector(dim: int | None = None, *, grid: float = 1e-6) -> Vector:
    """A value that is a float32 vector. Non-finite numbers and other dimensions are refused."""
    return Vector(dim, grid)


@dataclass(frozen=True)
class Codec:
    """Two functions of the user's that turn a value into bytes and back."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    name: str


def codec(encode: Callable[[Any], bytes], decode: Callable[[bytes], Any], *, name: str = "") -> Codec:
    """A value that Arrow cannot type, as bytes and back by two functions; equal values need equal bytes."""
    return Codec(encode, decode, name or getattr(encode, "__qualname__", "codec"))


@dataclass(frozen=True)
class ValueType:
    """How values of one builder are checked, encoded, decoded and hashed.

    `kind` tags the hash; `text` describes the type in config hashes and run records; `arrow` is the column
    type of a typed read-back.
    """

    kind: str
    text: str
    arrow: pa.DataType
    check: Callable[[Any], Any]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    grid: float | None = None
    check_batch: Callable[[Sequence[Any]], list[Any]] | None = None

    def hash(self, value: Any, payload: bytes | None = None) -> str:
        """value_hash of a checked value; `payload` saves encoding it twice."""
        if value is None:
            return NULL_HASH
        if self.grid is not None:
            steps = np.rint(np.asarray(value, dtype=np.float64) / self.grid).astype("<i8")
            return payload_hash(self.kind, steps.tobytes())
        return payload_hash(self.kind, self.encode(value) if payload is None else payload)

    def hash_many(self, values: Sequence[Any], payloads: Sequence[bytes | None]) -> list[str]:
        """`hash` of a batch; vectors are put on their grid all at once."""
        if self.grid is not None and values and all(value is not None for value in values):
            steps = np.rint(np.stack(values).astype(np.float64) / self.grid).astype("<i8")
            return [payload_hash(self.kind, row.tobytes()) for row in steps]
        return [self.hash(value, payload) for value, payload in zip(values, payloads, strict=True)]

    def checked_many(self, values: Sequence[Any]) -> list[Any] | None:
        """`checked` of a batch in one go, or None where one by one finds who is at fault."""
        if any(value is None or _is_missing(value) for value in values) or self.check_batch is None:
            return None
        try:
            return self.check_batch(values)
        except (ValueError, TypeError, pa.ArrowException, ValueMismatchError):
            return None

    def checked(self, value: Any) -> Any:
        """The value in its canonical Python form, None for missing; raises ValueMismatchError."""
        if value is None or _is_missing(value):
            return None
        try:
            return self.check(value)
        except ValueMismatchError:
            raise
        except Exception as error:
            raise ValueMismatchError(
                f"{_short(value)} ({type(value).__name__}) is not a {self.text}: {_short(error)}"
            ) from error


def value_type(spec: Any, config: Any = None) -> ValueType:
    """The ValueType for what a builder declares as `value`; `config` gives a vector its dimension.

    Raises DefinitionError for a type that has no canonical bytes, naming both ways out.
    """
    match spec:
        case ValueType():
            return spec
        case Vector():
            return _vector_type(spec, config)
        case Codec():
            return ValueType(
                "codec", f"codec<{spec.name}>", pa.binary(), lambda v: v, _bytes_only(spec), spec.decode
            )
    if isinstance(spec, type) and spec in _PYTHON_TYPES:
        spec = _PYTHON_TYPES[spec]
    if not isinstance(spec, pa.DataType):
        raise DefinitionError(_unsupported(spec))
    if pt.is_string(spec) or pt.is_large_string(spec):
        return ValueType("string", "string", pa.string(), _text, str.encode, bytes.decode, check_batch=_texts)
    if pt.is_binary(spec) or pt.is_large_binary(spec):
        return ValueType("binary", "binary", pa.binary(), _via_arrow(spec), bytes, bytes)
    to_json, from_json = _json_leaf(spec)
    if pt.is_nested(spec):
        return ValueType(
            "json",
            str(spec),
            spec,
            _via_arrow(spec),
            lambda v: _dumps(to_json(v)).encode(),
            _loads if from_json is _same else lambda b: from_json(_loads(b)),
            check_batch=_batch_via_arrow(spec),
        )
    kind = "int" if pt.is_integer(spec) else str(spec).split("[")[0].split("(")[0]
    return ValueType(
        kind,
        str(spec),
        spec,
        _via_arrow(spec),
        lambda v: str(_dumps(to_json(v))).strip('"').encode(),
        lambda b: from_json(_scalar(spec, b)),
    )


def _vector_type(spec: Vector, config: Any) -> ValueType:
    dim = spec.dim if spec.dim is not None else getattr(config, "dim", None)

    def check(value: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        row = np.ascontiguousarray(value, dtype=np.float32)
        if row.ndim != 1 or (dim is not None and len(row) != dim):
            raise ValueMismatchError(f"a vector of shape {row.shape} is not a float32[{dim}]")
        if not math.isfinite(float(row.sum())) and not np.isfinite(row).all():
            raise ValueMismatchError("a vector with NaN or infinite numbers cannot be stored or searched")
        return row

    def check_batch(values: Sequence[Any]) -> list[Any]:
        rows = np.ascontiguousarray(np.stack(values), dtype=np.float32)
        if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim) or not np.isfinite(rows).all():
            raise ValueMismatchError("one of these vectors does not fit")
        return list(rows)

    return ValueType(
        "vector",
        f"float32[{'config' if dim is None else dim}]@{spec.grid!r}",
        pa.list_(pa.float32()),
        check,
        lambda v: np.ascontiguousarray(v, dtype="<f4").tobytes(),
        lambda b: np.frombuffer(b, dtype="<f4"),
        spec.grid,
        check_batch,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("text is expected; convert it in build")
    value.encode()
    return str(value)


def _texts(values: Sequence[Any]) -> list[Any]:
    if not all(type(value) is str for value in values):
        raise TypeError("text is expected")
    "".join(values).encode()
    return list(values)


def _batch_via_arrow(spec: pa.DataType) -> Callable[[Sequence[Any]], list[Any]]:
    def check(values: Sequence[Any]) -> list[Any]:
        array = pa.array(values, type=spec)
        found: list[Any] = array.to_pylist()
        if any((np.signbit(leaf) & (leaf == 0.0)).any() for leaf in _float_leaves(array)):
            return [_canonical(value) for value in found]
        return found

    return check


def _float_leaves(array: pa.Array) -> Iterator[np.ndarray[Any, Any]]:
    """Every floating column inside a nested array."""
    if pt.is_floating(array.type):
        yield array.to_numpy(zero_copy_only=False)
    elif pt.is_struct(array.type):
        for i in range(array.type.num_fields):
            yield from _float_leaves(array.field(i))
    elif pt.is_map(array.type):
        yield from _float_leaves(array.keys)
        yield from _float_leaves(array.items)
    elif pt.is_nested(array.type):
        yield from _float_leaves(array.flatten())


def _via_arrow(spec: pa.DataType) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, bool) and (pt.is_integer(spec) or pt.is_floating(spec)):
            raise TypeError("a boolean is no number here")
        _refuse_loss(value, spec)
        return _canonical(pa.scalar(value, type=spec).as_py())

    if spec == pa.list_(pa.string()):

        def check_texts(value: Any) -> Any:
            if type(value) is list and all(type(item) is str for item in value):
                return value
            return check(value)

        return check_texts
    return check


def _refuse_loss(value: Any, spec: pa.DataType) -> None:
    """What Arrow would convert without a word: 2.5 to 2, a text to its letters, a struct to fewer fields."""
    if isinstance(value, float) and pt.is_integer(spec) and not value.is_integer():
        raise TypeError("its fraction would be lost")
    if pt.is_list(spec) or pt.is_large_list(spec) or pt.is_fixed_size_list(spec):
        if isinstance(value, str | bytes):
            raise TypeError("a list is expected, one item for each element")
        if not (pt.is_string(spec.value_type) or pt.is_floating(spec.value_type)):
            for item in value if isinstance(value, list | tuple) else ():
                _refuse_loss(item, spec.value_type)
    elif pt.is_struct(spec) and isinstance(value, dict):
        fields = {spec.field(i).name: spec.field(i).type for i in range(spec.num_fields)}
        for name, item in value.items():
            if name not in fields:
                raise TypeError(f"{name!r} is none of its fields {tuple(fields)!r}")
            _refuse_loss(item, fields[name])


def _canonical(value: Any) -> Any:
    """One form for -0.0 and for instants of any zone, at any depth."""
    match value:
        case float():
            return value + 0.0
        case datetime() if value.tzinfo is not None:
            return value.astimezone(UTC)
        case list():
            return [_canonical(item) for item in value]
        case tuple():
            return tuple(_canonical(item) for item in value)
        case dict():
            return {name: _canonical(item) for name, item in value.items()}
        case _:
            return value


def _bytes_only(spec: Codec) -> Callable[[Any], bytes]:
    def encode(value: Any) -> bytes:
        payload = spec.encode(value)
        if not isinstance(payload, bytes):
            raise ValueMismatchError(f"codec {spec.name!r} returned {type(payload).__name__}, not bytes")
        return payload

    return encode


def _dumps(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    if type(value) is list and value and all(type(item) is str for item in value):
        return f"[{','.join(map(quote, value))}]"
    return _ENCODER.encode(value)


def _loads(payload: bytes) -> Any:
    return _DECODER.decode(payload.decode())


def _scalar(spec: pa.DataType, payload: bytes) -> Any:
    text = payload.decode()
    return json.loads(text) if pt.is_integer(spec) or pt.is_floating(spec) or pt.is_boolean(spec) else text


def _json_leaf(spec: pa.DataType) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions between a canonical Python value and what JSON can say, by Arrow type."""
    if pt.is_integer(spec) or pt.is_floating(spec) or pt.is_boolean(spec) or pt.is_string(spec):
        return _same, _same
    if pt.is_large_string(spec):
        return _same, _same
    if pt.is_binary(spec) or pt.is_large_binary(spec):
        return lambda v: base64.b64encode(v).decode(), base64.b64decode
    if pt.is_timestamp(spec):
        if spec.unit == "ns":
            raise DefinitionError("timestamps keep microseconds here; declare pa.timestamp('us', tz='UTC')")
        if spec.tz is None:
            zero = _EPOCH.replace(tzinfo=None)
            return (
                lambda v: (v - zero) // timedelta(microseconds=1),
                lambda n: zero + timedelta(microseconds=int(n)),
            )
        return (
            lambda v: (v - _EPOCH) // timedelta(microseconds=1),
            lambda n: _EPOCH + timedelta(microseconds=int(n)),
        )
    if pt.is_date32(spec):
        return date.isoformat, date.fromisoformat
    if pt.is_decimal(spec):
        return str, Decimal
    if pt.is_list(spec) or pt.is_large_list(spec) or pt.is_fixed_size_list(spec):
        to_item, from_item = _json_leaf(spec.value_type)
        if to_item is _same:
            return _same, _same
        return (
            lambda v: [None if item is None else to_item(item) for item in v],
            lambda v: [None if item is None else from_item(item) for item in v],
        )
    if pt.is_struct(spec):
        leaves = [(spec.field(i).name, *_json_leaf(spec.field(i).type)) for i in range(spec.num_fields)]
        if all(to is _same for _, to, _ in leaves):  # a checked value has its fields in this order already
            return _same, _same
        return (
            lambda v: {name: None if v[name] is None else to(v[name]) for name, to, _ in leaves},
            lambda v: {name: None if v[name] is None else back(v[name]) for name, _, back in leaves},
        )
    if pt.is_map(spec):
        (to_key, from_key), (to_item, from_item) = _json_leaf(spec.key_type), _json_leaf(spec.item_type)
        return (
            lambda v: sorted(
                ([to_key(k), None if i is None else to_item(i)] for k, i in v), key=lambda p: str(p[0])
            ),
            lambda v: [(from_key(k), None if i is None else from_item(i)) for k, i in v],
        )
    raise DefinitionError(_unsupported(spec))


def _same(value: Any) -> Any:
    return value


def _unsupported(spec: Any) -> str:
    return (
        f"value = {spec!r} has no canonical bytes. Two ways out: an Arrow type made of text, numbers, "
        "booleans, binary, dates, timestamps, decimals, lists, structs or maps (such as "
        "pa.list_(pa.string())), or codec(encode, decode), two functions of yours between value and bytes."
    )


def _is_missing(value: Any) -> bool:
    """pandas writes a missing number as NaN and a missing instant as NaT; both mean no value here."""
    return (isinstance(value, float | np.floating) and value != value) or type(value).__name__ in (
        "NaTType",
        "NAType",
    )


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def typed_column(values: Sequence[Any], kind: ValueType) -> pa.Array:
    """Checked values as one Arrow column of the builder's type."""
    if isinstance(kind.arrow, pa.ListType) and kind.kind == "vector":
        return pa.array([None if v is None else np.asarray(v) for v in values], type=kind.arrow)
    if kind.kind == "codec":
        return pa.array([None if v is None else kind.encode(v) for v in values], type=kind.arrow)
    return pa.array(values, type=kind.arrow)
