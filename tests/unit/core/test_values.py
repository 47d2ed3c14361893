from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from featurekit_spark.errors import DefinitionError, ValueMismatchError
from featurekit_spark.values import NULL_HASH, codec, typed_column, value_type, vector

INSTANT = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
EAST = timezone(timedelta(hours=2))
STRUCT = pa.struct([("id", pa.string()), ("score", pa.float64())])
MAP = pa.map_(pa.string(), pa.int64())

# type, value, canonical bytes, hash: these are in people's caches, so a change here is a change of format.
PINNED: list[tuple[Any, Any, bytes, str]] = [
    (pa.string(), "Lämpchen", "Lämpchen".encode(), "d9a213077a9cd810f4528b817923b2b6"),
    (pa.string(), "", b"", "a20d9259b4265065f44e96be55e8c051"),
    (pa.int64(), -7, b"-7", "3972ddcf37baecee993a6ede1aebc61b"),
    (pa.float64(), 0.1, b"0.1", "9db16b2870cb537cf1232c7a9f9d47a0"),
    (pa.bool_(), True, b"true", "4026e0ec651f149cd7e4c2133c1e3af3"),
    (pa.binary(), b"\x00\xff", b"\x00\xff", "61f3a5dbd1992b226405551452989e85"),
    (pa.date32(), date(2026, 1, 31), b"2026-01-31", "35b44cdce64456f5a542279c6575f78e"),
    (pa.timestamp("us", tz="UTC"), INSTANT, b"1769860800123456", "c3d27a08c4804dc537d7862f1cb8b9fc"),
    (
        pa.timestamp("us"),
        INSTANT.replace(tzinfo=None),
        b"1769860800123456",
        "c3d27a08c4804dc537d7862f1cb8b9fc",
    ),
    (pa.decimal128(10, 2), Decimal("1.50"), b"1.50", "29cc09f33e4ebd1f76fbd6da27102e47"),
    (pa.list_(pa.string()), ["b", "a", None], b'["b","a",null]', "d55d9b70cf00c9562a7f582f2cd4c443"),
    (
        pa.list_(pa.timestamp("us", tz="UTC")),
        [INSTANT, None],
        b"[1769860800123456,null]",
        "f905ab713f52c28c4aca2564da5ae8f1",
    ),
    (pa.list_(pa.binary()), [b"\x00"], b'["AA=="]', "6f70fc3836cf5e0b16d0be3e565ddb7a"),
    (STRUCT, {"id": "p", "score": 0.5}, b'{"id":"p","score":0.5}', "3b8bfa1331855efae0c7fd796c2bcacc"),
    (
        pa.list_(STRUCT),
        [{"id": "p", "score": None}],
        b'[{"id":"p","score":null}]',
        "4df5bcbeb04e26999b8ae7724f788557",
    ),
    (MAP, [("b", 1), ("a", None)], b'[["a",null],["b",1]]', "b015ed4362419a155392cad23caec8c3"),
    (
        vector(2),
        np.array([0.5, -1], np.float32),
        b"\x00\x00\x00\x3f\x00\x00\x80\xbf",
        "7479f9c251e7acb795d45b3b2dba9bcf",
    ),
    (
        codec(lambda v: v.upper().encode(), bytes.decode, name="upper"),
        "ab",
        b"AB",
        "7f1fa63819c0cd115397f577705a72ab",
    ),
]


@pytest.mark.parametrize(("spec", "value", "payload", "digest"), PINNED, ids=lambda v: str(v)[:30])
def test_canonical_bytes_and_hashes_are_pinned(spec: Any, value: Any, payload: bytes, digest: str) -> None:
    kind = value_type(spec)
    checked = kind.checked(value)
    assert kind.encode(checked) == payload
    assert kind.hash(checked) == kind.hash(checked, payload) == digest


@pytest.mark.parametrize(("spec", "value"), [row[:2] for row in PINNED[:-2]], ids=lambda v: str(v)[:30])
def test_a_value_comes_back_equal(spec: Any, value: Any) -> None:
    kind = value_type(spec)
    checked = kind.checked(value)
    back = kind.decode(kind.encode(checked))
    assert kind.encode(kind.checked(back)) == kind.encode(checked)
    if spec is not MAP:  # a map has no order, its canonical form is sorted
        assert back == checked


def test_spark_sql_can_compute_the_hash_of_text() -> None:
    """`substr(sha2(concat('string:', column), 256), 1, 32)`."""
    import hashlib

    assert value_type(str).hash("lamp") == hashlib.sha256(b"string:lamp").hexdigest()[:32]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pd.NaT, pd.NA])
def test_missing_values_are_null(missing: Any) -> None:
    for spec in (pa.string(), pa.float64(), pa.int64(), pa.timestamp("us", tz="UTC"), vector(2)):
        kind = value_type(spec)
        assert kind.checked(missing) is None
        assert kind.hash(None) == NULL_HASH


def test_null_hash_is_pinned_and_no_values_hash() -> None:
    assert NULL_HASH == "7be31336ced708544a056707c63267f2"
    assert value_type(str).hash("") != NULL_HASH
    assert value_type(bytes).hash(b"") != NULL_HASH


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (pa.string(), 7, "7 (int) is not a string: text is expected; convert it in build"),
        (pa.string(), b"x", "b'x' (bytes) is not a string: text is expected"),
        (pa.string(), "\ud800", "(str) is not a string: 'utf-8' codec can't encode"),
        (pa.int64(), "7", "'7' (str) is not a int64"),
        (pa.int64(), 2.5, "2.5 (float) is not a int64: its fraction would be lost"),
        (pa.int64(), True, "True (bool) is not a int64: a boolean is no number here"),
        (pa.float64(), True, "a boolean is no number here"),
        (pa.int8(), 300, "300 (int) is not a int8"),
        (pa.bool_(), 1, "1 (int) is not a bool"),
        (pa.list_(pa.int64()), [1, 2.5], "its fraction would be lost"),
        (pa.list_(pa.list_(pa.string())), ["ab"], "a list is expected, one item for each element"),
        (pa.list_(STRUCT), [{"id": "p", "rank": 1}], "'rank' is none of its fields ('id', 'score')"),
        (pa.list_(pa.string()), "abc", "'abc' (str) is not a list<item: string>"),
        (pa.list_(pa.string()), ["a", 1], "['a', 1] (list) is not a list<item: string>"),
        (STRUCT, {"id": 7, "score": 0.5}, "is not a struct<id: string, score: double>"),
        (vector(3), [1.0, 2.0], "a vector of shape (2,) is not a float32[3]"),
        (vector(), [[1.0], [2.0]], "a vector of shape (2, 1) is not a float32[None]"),
        (
            vector(2),
            [1.0, float("inf")],
            "a vector with NaN or infinite numbers cannot be stored or searched",
        ),
        (vector(2), [1.0, float("nan")], "a vector with NaN or infinite numbers"),
        (vector(2), "ab", "'ab' (str) is not a float32[2]@1e-06"),
    ],
)
def test_a_value_that_does_not_fit_says_so(spec: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueMismatchError) as error:
        value_type(spec).checked(value)
    assert message in str(error.value)


def test_a_long_value_is_cut_in_its_error() -> None:
    with pytest.raises(ValueMismatchError) as error:
        value_type(pa.int64()).checked("x" * 1_000)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "spec", [dict, "string", pa.timestamp("ns"), pa.null(), pa.list_(pa.null()), object()]
)
def test_an_unsupported_type_names_the_ways_out(spec: Any) -> None:
    with pytest.raises(DefinitionError) as error:
        value_type(spec)
    text = str(error.value)
    assert (
        "codec(encode, decode)" in text and "pa.list_(pa.string())" in text
    ) or "pa.timestamp('us'" in text


def test_equal_instants_and_numbers_have_one_form() -> None:
    kind = value_type(pa.timestamp("us", tz="UTC"))
    assert kind.hash(kind.checked(INSTANT)) == kind.hash(kind.checked(INSTANT.astimezone(EAST)))
    number = value_type(pa.float64())
    assert number.encode(number.checked(-0.0)) == number.encode(number.checked(0.0)) == b"0.0"
    nested = value_type(pa.list_(pa.float64()))
    assert nested.encode(nested.checked([-0.0])) == b"[0.0]"
    assert number.hash(number.checked(np.float64(0.5))) == number.hash(0.5)


def test_struct_fields_come_in_the_declared_order() -> None:
    kind = value_type(STRUCT)
    assert kind.encode(kind.checked({"score": 1.0, "id": "p"})) == b'{"id":"p","score":1.0}'
    assert kind.encode(kind.checked({"id": "p"})) == b'{"id":"p","score":null}'


def test_maps_of_any_order_are_one_value() -> None:
    kind = value_type(MAP)
    assert kind.hash(kind.checked({"a": 1, "b": 2})) == kind.hash(kind.checked([("b", 2), ("a", 1)]))


def test_kinds_keep_hashes_apart() -> None:
    specs = [(str, "1"), (bytes, b"1"), (int, 1), (pa.list_(pa.int64()), [1])]
    assert len({value_type(spec).hash(value) for spec, value in specs}) == len(specs)


def test_integers_of_any_width_hash_alike() -> None:
    """Widening a column is no new value."""
    assert value_type(pa.int32()).hash(7) == value_type(pa.int64()).hash(7)


def test_a_vector_takes_its_dimension_from_the_config() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        dim: int = 3

    with pytest.raises(ValueMismatchError, match=r"not a float32\[3\]"):
        value_type(vector(), Config()).checked([1.0])
    assert value_type(vector(), Config()).checked([1, 2, 3]).dtype == np.float32


def test_the_last_bits_of_a_vector_decide_nothing() -> None:
    kind = value_type(vector(2))
    one, other = np.array([0.1, 0.2], np.float32), np.array([0.1, 0.2], np.float32) + np.float32(3e-8)
    assert kind.hash(one) == kind.hash(other)
    assert kind.encode(one) != kind.encode(other)  # stored as it is
    assert kind.hash(one) != kind.hash(one + np.float32(1e-5))


def test_a_codec_must_return_bytes() -> None:
    kind = value_type(codec(lambda v: "text", bytes.decode, name="mine"))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueMismatchError, match="codec 'mine' returned str, not bytes"):
        kind.encode("x")


def test_typed_columns() -> None:
    assert typed_column([["a"], None], value_type(pa.list_(pa.string()))).to_pylist() == [["a"], None]
    vectors = typed_column([np.ones(2, np.float32), None], value_type(vector(2)))
    assert vectors.type == pa.list_(pa.float32())
    assert vectors.to_pylist() == [[1.0, 1.0], None]
    upper = value_type(codec(str.encode, bytes.decode))
    assert typed_column(["ab", None], upper).to_pylist() == [b"ab", None]


def test_json_is_read_back_as_written() -> None:
    kind = value_type(pa.list_(pa.string()))
    texts = ['"', "\\", "\n", "\u2028", "é", ""]
    assert json.loads(kind.encode(texts)) == texts
