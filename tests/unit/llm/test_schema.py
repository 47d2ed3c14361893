"""What a pydantic model becomes: an Arrow type, a schema for strict servers, a value from an answer."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NewType, Optional

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel, Field, PositiveInt, RootModel, create_model

from featurekit_spark.errors import DefinitionError
from featurekit_spark.fingerprint import digest
from featurekit_spark.llm import OfflineLLM
from featurekit_spark.llm.schema import MisfitError, arrow_type, read_answer, strict_schema
from featurekit_spark.values import value_type

Grams = NewType("Grams", int)


class Mood(Enum):
    """How it feels."""

    CALM = "calm"
    LOUD = "loud"


class Rank(IntEnum):
    LOW = 1
    HIGH = 2


class Part(BaseModel):
    title: str
    weight: Grams | None = None


class Product(BaseModel):
    """A product,
    as a catalog has it."""

    name: str = Field(description="Its name.", min_length=2, max_length=200)
    stars: int = Field(ge=1, le=5)
    score: float
    new: bool
    day: date
    at: datetime
    instant: AwareDatetime | None
    price: Decimal = Field(max_digits=8, decimal_places=2, ge=0)
    mood: Mood
    rank: Rank
    size: Literal["s", "m", None]
    fixed: Literal[7] = 7
    parts: list[Part] = Field(max_length=3)
    prices: list[Annotated[Decimal, Field(max_digits=5, decimal_places=1)]]
    maybe: Optional[list[str]] = None  # noqa: UP045 - as users write it
    count: PositiveInt = 3


INSTANT = pa.timestamp("us", tz="UTC")
TYPE = pa.struct(
    [
        ("name", pa.string()),
        ("stars", pa.int64()),
        ("score", pa.float64()),
        ("new", pa.bool_()),
        ("day", pa.date32()),
        ("at", INSTANT),
        ("instant", INSTANT),
        ("price", pa.decimal128(8, 2)),
        ("mood", pa.string()),
        ("rank", pa.int64()),
        ("size", pa.string()),
        ("fixed", pa.int64()),
        ("parts", pa.list_(pa.struct([("title", pa.string()), ("weight", pa.int64())]))),
        ("prices", pa.list_(pa.decimal128(5, 1))),
        ("maybe", pa.list_(pa.string())),
        ("count", pa.int64()),
    ]
)
ANSWER = {
    "name": "Lämp",
    "stars": 4,
    "score": -0.0,
    "new": False,
    "day": "2026-01-31",
    "at": "2026-01-31T12:00:00+01:00",
    "instant": None,
    "price": 12.34,
    "mood": "calm",
    "rank": 2,
    "size": None,
    "fixed": 7,
    "parts": [{"title": "foot", "weight": None}],
    "prices": ["1.5", 2],
    "maybe": None,
    "count": 1,
}
VALUE = {
    **ANSWER,
    "score": 0.0,
    "day": date(2026, 1, 31),
    "at": datetime(2026, 1, 31, 11, tzinfo=UTC),
    "price": Decimal("12.34"),
    "prices": [Decimal("1.5"), Decimal("2.0")],
}


def read(model: type[BaseModel], text: str) -> Any:
    return read_answer(model, value_type(arrow_type(model)), text)


def test_a_model_has_an_arrow_type() -> None:
    assert arrow_type(Product) == TYPE


def test_an_answer_becomes_a_value_that_comes_back_from_the_cache() -> None:
    kind = value_type(arrow_type(Product))
    value = read(Product, json.dumps(ANSWER))
    assert value == VALUE
    assert kind.decode(kind.encode(value)) == value
    assert Product.model_validate(value).mood is Mood.CALM


@pytest.mark.parametrize(
    "text",
    [
        '{"title": "a", "weight": 1}',
        ' {"title": "a", "weight": 1}\n\nThat is it.',
        'Here you are: {"title": "a", "weight": 1}',
        'With {braces} before:\n```json\n{"title": "a", "weight": 1}\n```\nDone.',
        '{"title": "a", "weight": "1"}',
    ],
)
def test_json_is_found_in_an_answer(text: str) -> None:
    assert read(Part, text) == {"title": "a", "weight": 1}


class Defaults(BaseModel):
    inner: list[Part] = []
    weight: int = 0
    score: float = 0.0


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "Invalid JSON"),
        ("no idea", "Invalid JSON"),
        ("[]", "valid dictionary or instance of Defaults|Input should be an object"),
        ('{"weight": "much"}', "weight: Input should be a valid integer.*found 'much'"),
        ('{"inner": [{"title": 1}]}', r"inner\.0\.title: "),
        # Cut off: what is whole inside it is no answer.
        ('{"inner": [{"title": "a"}, {"title": ', "Invalid JSON"),
        ('{"score": NaN}', "no number that JSON has"),
        ('{"weight": 9223372036854775808}', "is not a struct"),
    ],
)
def test_what_does_not_fit_is_told(text: str, wrong: str) -> None:
    with pytest.raises(MisfitError, match=wrong):
        read(Defaults, text)


def test_many_problems_are_told_shortly() -> None:
    answer = json.dumps({"inner": [{"title": "x" * 1000, "weight": "y" * 1000}] * 50})
    with pytest.raises(MisfitError, match="and 42 more$") as caught:
        read(Defaults, answer)
    assert len(str(caught.value)) < 1500


class Node(BaseModel):
    children: list[Node]


class Empty(BaseModel):
    pass


class Letters(RootModel[list[str]]):
    pass


def one(annotation: Any, **options: Any) -> type[BaseModel]:
    return create_model("M", x=(annotation, Field(**options)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (one(dict[str, int]), r"M\.x is declared as dict\[str, int\]: it has no Arrow type"),
        (one(Any), r"M\.x is declared as"),
        (one(int | str), r"M\.x .*several types"),
        (one(Part | Empty | None), r"M\.x .*several types"),
        (one(list), r"M\.x is declared as list"),
        (one(set[str]), r"M\.x is declared as set\[str\]"),
        (one(list[bytes]), r"M\.x\[\] is declared as bytes"),
        (one(list[bytes | None]), r"M\.x\[\] is declared as bytes"),
        (one(Decimal), r"M\.x is declared as Decimal: its size is open.*max_digits"),
        (one(Decimal, max_digits=50, decimal_places=2), r"M\.x is declared as Decimal"),
        (one(Literal["a", 1]), r"M\.x .*not all of one type"),
        (one(Empty), r"M\.x has no named fields"),
        (Empty, "Empty has no named fields"),
        (Letters, "Letters has no named fields"),
        (Node, r"Node\.children\[\] contains Node again"),
    ],
)
def test_what_has_no_type_is_refused_by_name(model: type[BaseModel], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        arrow_type(model)


def test_the_schema_is_strict() -> None:
    schema = strict_schema(Product)
    assert schema["description"] == "A product,\nas a catalog has it."
    assert schema["required"] == list(Product.model_fields) == list(schema["properties"])
    found = schema["properties"]
    assert found["name"] == {"description": "Its name. (minLength: 2; maxLength: 200)", "type": "string"}
    assert found["stars"] == {"type": "integer", "minimum": 1, "maximum": 5}
    assert found["instant"] == {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]}
    assert found["price"] == {
        "description": "(at most 2 digits after the point)",
        "type": "number",
        "minimum": 0.0,
        "exclusiveMaximum": 1_000_000.0,
    }
    assert found["mood"] == {"description": "How it feels.", "type": "string", "enum": ["calm", "loud"]}
    assert found["fixed"] == {"type": "integer", "enum": [7]}
    assert found["parts"] == {
        "type": "array",
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "title": {"type": "string"},  # a field of that name, not a title of the schema
                "weight": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
            "required": ["title", "weight"],
            "additionalProperties": False,
        },
    }
    for node in objects(schema):
        assert node["additionalProperties"] is False and node["required"] == list(node["properties"])
    assert "$ref" not in json.dumps(schema) and "default" not in json.dumps(schema)


def objects(node: Any) -> Any:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield node
        for item in node.values():
            yield from objects(item)
    elif isinstance(node, list):
        for item in node:
            yield from objects(item)


def test_the_schema_does_not_move_with_versions_of_pydantic() -> None:
    """It is part of what a paid answer is kept under: another text pays again."""
    text = json.dumps(strict_schema(Product), ensure_ascii=False)
    assert digest("schema", text) == "a55247c2d9064de996eba83594cea7f7", text


def test_large_decimals_are_sent_as_text() -> None:
    model = one(Decimal, max_digits=30, decimal_places=4, ge=0)
    assert strict_schema(model)["properties"]["x"] == {
        "description": "(a decimal number; at most 4 digits after the point; minimum: 0.0)",
        "type": "string",
    }
    assert read(model, '{"x": "12345678901234567890.1234"}') == {"x": Decimal("12345678901234567890.1234")}


_NAMES = st.text("abcdefghij_", min_size=1, max_size=6).filter(
    lambda name: not name.startswith("_") and name[-1] != "_"
)
_LEAVES = st.sampled_from(
    [
        str,
        int,
        float,
        bool,
        date,
        datetime,
        AwareDatetime,
        Mood,
        Rank,
        Literal["a", "b"],
        Literal[1, 2, 3],
        Literal[True],
        Annotated[int, Field(ge=3, lt=5)],
        Annotated[int, Field(gt=-5, le=-2)],
        Annotated[int, Field(lt=-20)],
        Annotated[int, Field(multiple_of=7)],
        Annotated[float, Field(gt=0, lt=1)],
        Annotated[float, Field(ge=10)],
        Annotated[Decimal, Field(max_digits=3, decimal_places=2)],
        Annotated[Decimal, Field(max_digits=6, decimal_places=0, gt=500)],
        Grams,
    ]
)


def _wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        inner.map(lambda kind: list[kind]),
        inner.map(lambda kind: kind | None if isinstance(kind, type) else Optional[kind]),  # noqa: UP045
        inner.map(lambda kind: Annotated[list[kind], Field(min_length=1, max_length=2)]),
        st.dictionaries(_NAMES, inner, min_size=1, max_size=3).map(
            lambda fields: create_model("Inner", **{name: (kind, ...) for name, kind in fields.items()})
        ),
    )


@given(
    st.dictionaries(_NAMES, st.recursive(_LEAVES, _wider, max_leaves=4), min_size=1, max_size=4),
    st.text(min_size=1, max_size=30),
)
def test_the_stand_in_answers_every_schema(fields: dict[str, Any], prompt: str) -> None:
    model = create_model("Made", **{name: (kind, ...) for name, kind in fields.items()})
    form = {
        "type": "json_schema",
        "json_schema": {"name": "Made", "schema": strict_schema(model), "strict": True},
    }
    answers = [asyncio.run(OfflineLLM().complete(prompt, response_format=form)) for _ in range(2)]
    assert answers[0] == answers[1]
    value = read(model, answers[0].text)
    kind = value_type(arrow_type(model))
    assert kind.decode(kind.encode(value)) == value
