"""Answers with fields, against a chat server on loopback: what is sent, checked, repaired, paid and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import pyarrow as pa
import pytest
from pydantic import BaseModel, Field, field_validator

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, bind
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.show import show
from featurekit_spark.cache.verify import verify
from featurekit_spark.context import Context
from featurekit_spark.controller import Controller
from featurekit_spark.costs import pricing_of
from featurekit_spark.errors import DefinitionError
from featurekit_spark.llm import OfflineLLM, OpenAIChat, StructuredCompletion
from featurekit_spark.testing.fakes import CountingLLM


class Verdict(BaseModel):
    """What somebody thinks of a product."""

    mood: Literal["calm", "loud"]
    reasons: list[str] = Field(max_length=3)

    @field_validator("reasons")
    @classmethod
    def _no_shouting(cls, reasons: list[str]) -> list[str]:
        if "BUG" in reasons:
            raise TypeError("a bug of the validator")
        if any(reason.isupper() for reason in reasons):
            raise ValueError("do not shout")
        return reasons


class ProductVerdict(StructuredCompletion):
    response = Verdict
    system = "You judge products."


GOOD = '{"mood": "calm", "reasons": ["soft light"]}'
VALUE = {"mood": "calm", "reasons": ["soft light"]}
BAD = '{"mood": "angry", "reasons": []}'


_opened: list[OpenAIChat] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _opened:
        aio.run(_opened.pop().aclose())


def controller(server: Any, cache: Any = None, **options: Any) -> Controller:
    chat = OpenAIChat(server.url, "m", api_key_env="TEST_CHAT_KEY", **options)
    _opened.append(chat)
    return Controller(Context(llm=chat), MemoryCache() if cache is None else cache)


def ask(own: Controller, *prompts: str) -> list[Any]:
    return own.get_many(ProductVerdict, [(prompt,) for prompt in prompts])


def rows(cache: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cache.history("ProductVerdict").to_pylist()
    return found


def test_the_value_is_the_model_s_fields(server: Any) -> None:
    server.answer = lambda prompt: GOOD
    own = controller(server)
    (first, again, other) = ask(own, "a lamp", "a lamp", "a chair")
    assert [first.value, again.value, other.value] == [VALUE] * 3
    assert sorted(server.prompts) == ["a chair", "a lamp"]
    assert ask(own, "a lamp")[0].value == VALUE
    assert len(server.requests) == 2
    assert own.cache.read(ProductVerdict)["value"].type == pa.struct(
        [("mood", pa.string()), ("reasons", pa.list_(pa.string()))]
    )
    assert Verdict.model_validate(first.value).mood == "calm"


def test_the_schema_goes_with_the_request(server: Any) -> None:
    server.answer = lambda prompt: GOOD
    ask(controller(server), "a lamp")
    assert server.requests == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "You judge products."},
                {"role": "user", "content": "a lamp"},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "Verdict",
                    "strict": True,
                    "schema": {
                        "description": "What somebody thinks of a product.",
                        "type": "object",
                        "properties": {
                            "mood": {"type": "string", "enum": ["calm", "loud"]},
                            "reasons": {"type": "array", "maxItems": 3, "items": {"type": "string"}},
                        },
                        "required": ["mood", "reasons"],
                        "additionalProperties": False,
                    },
                },
            },
        }
    ]


def test_an_answer_that_does_not_fit_is_repaired_once(server: Any, reply: Any) -> None:
    cache = MemoryCache()
    server.then(200, reply(BAD)).then(200, reply(GOOD))
    (feature,) = ask(controller(server, cache), "a lamp")
    assert feature.value == VALUE
    first, second = server.requests
    assert second["messages"][:3] == [*first["messages"], {"role": "assistant", "content": BAD}]
    assert second["response_format"] == first["response_format"]
    complaint = second["messages"][3]
    assert complaint["role"] == "user"
    assert "mood: Input should be 'calm' or 'loud', found 'angry'" in complaint["content"]
    assert '"additionalProperties": false' in complaint["content"]
    (row,) = rows(cache)
    assert (row["status"], row["tokens"]) == ("ok", 20)  # of both calls


def test_a_user_s_validator_is_part_of_the_check(server: Any, reply: Any) -> None:
    server.then(200, reply('{"mood": "calm", "reasons": ["LOUD"]}')).then(200, reply(GOOD))
    assert ask(controller(server), "a lamp")[0].value == VALUE
    assert "reasons: Value error, do not shout" in server.prompts[1]


@pytest.mark.parametrize("kind", ["memory", "delta"])
def test_what_cannot_be_repaired_is_an_error_with_its_text_beside_it(
    server: Any, reply: Any, tmp_path: Path, kind: str
) -> None:
    cache = MemoryCache() if kind == "memory" else DeltaCache(str(tmp_path / "cache"))
    server.answer = lambda prompt: GOOD if prompt == "a chair" else f"No: {BAD} \u00fc"
    own = controller(server, cache)
    bad, good = ask(own, "a lamp", "a chair")
    assert good.value == VALUE
    assert (bad.status, bad.value) == ("error", None)
    assert 'ProductVerdict["a lamp"]: [terminal, 2 attempts] two answers did not fit Verdict, ' in bad.error
    assert len(server.requests) == 3
    row = next(row for row in rows(cache) if row["status"] == "error")
    assert (row["tokens"], row["value_hash"]) == (20, None)
    assert row["value"].decode() == f"No: {BAD} \u00fc"
    assert "\u00fc" not in row["error"]
    assert cache.read(ProductVerdict)["prompt"].to_pylist() == ["a chair"]
    # The text answers nothing: who asks again asks the model.
    server.then(200, reply(GOOD))
    assert ask(own, "a lamp")[0].error == bad.error
    assert len(server.requests) == 3
    again = Controller(own.context, cache, retry_errors="terminal")
    assert ask(again, "a lamp")[0].value == VALUE
    if isinstance(cache, DeltaCache):
        entries = show(cache, "ProductVerdict", '["a lamp"]', ProductVerdict)["entries"]
        assert [entry["value"] for entry in entries] == [VALUE, f"No: {BAD} \u00fc"]
        assert verify(cache, {"ProductVerdict": ProductVerdict}).damage == ()


def test_a_reader_of_a_failed_answer_fails_with_it(server: Any) -> None:
    server.answer = lambda prompt: "no JSON"

    class Prompt(FeatureBuilder[str]):
        key = ("product_id",)
        value = pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return f"judge {inputs['product_id']}"

    class Mood(FeatureBuilder[str]):
        key = ("product_id",)
        deps = (ProductVerdict.on(prompt=Prompt),)
        value = pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return str(inputs["ProductVerdict"]["mood"])

    own = controller(server)
    assert "two answers did not fit" in (own.get(Mood, ("p1",)).error or "")
    server.answer = lambda prompt: GOOD
    assert own.get(Mood, ("p2",)).value == "calm"


def test_an_answer_that_was_cut_off_is_not_asked_for_again(server: Any, reply: Any) -> None:
    cache = MemoryCache()
    server.then(200, reply('{"mood": "calm", "rea', finish_reason="length"))
    (feature,) = ask(controller(server, cache), "a lamp")
    assert "cut off before it was a whole Verdict" in feature.error
    assert len(server.requests) == 1
    assert rows(cache)[0]["value"] == b'{"mood": "calm", "rea'
    # All of it may be there nevertheless.
    server.then(200, reply(f"{GOOD}\n\n\n", finish_reason="length"))
    assert ask(controller(server), "a lamp")[0].value == VALUE


def test_a_bug_in_a_validator_is_not_the_model_s_to_repair(server: Any) -> None:
    server.answer = lambda prompt: '{"mood": "calm", "reasons": ["BUG"]}'
    cache = MemoryCache()
    (feature,) = ask(controller(server, cache), "a lamp")
    assert "a validator of Verdict failed with TypeError: a bug of the validator" in feature.error
    assert len(server.requests) == 1
    assert rows(cache)[0]["tokens"] == 10


def test_a_repair_that_gets_no_answer_counts_the_first_call(server: Any, reply: Any) -> None:
    cache = MemoryCache()
    server.then(200, reply(BAD)).fails(400, "invalid_request")
    (feature,) = ask(controller(server, cache), "a lamp")
    assert "status 400" in feature.error
    (row,) = rows(cache)
    assert (row["status"], row["tokens"], row["value"]) == ("error", 10, BAD.encode())


def test_a_refusal_is_terminal_and_no_other_call_is_made(server: Any, reply: Any) -> None:
    server.then(200, reply(None, refusal="I will not"))
    (feature,) = ask(controller(server), "a lamp")
    assert "refused: I will not" in feature.error
    assert len(server.requests) == 1


class Plain(BaseModel):
    mood: str


class Described(BaseModel):
    mood: str = Field(description="One word.")


def test_all_that_is_sent_is_part_of_the_identity() -> None:
    context = Context()

    def hashed(made: type[BaseModel], own: Context = context, text: str | None = None, **changes: Any) -> str:
        class Asked(StructuredCompletion):
            response = made
            system = text

        return bind(Asked, own, {Asked: changes}).config_hash

    class Other(BaseModel):
        mood: str

    same = hashed(Plain)
    assert same == hashed(Plain)
    others = {
        hashed(Described),
        hashed(Other),  # its name goes with the request
        hashed(Plain, text="s"),
        hashed(Plain, max_tokens=7),
        hashed(Plain, temperature=0.5),
        hashed(Plain, replace(context, llm=OfflineLLM(9))),
    }
    assert len(others | {same}) == 7


def test_the_order_of_fields_is_part_of_the_identity() -> None:
    """A model answers in this order: reasons before a verdict make another verdict."""

    class Ordered(BaseModel):
        a: str
        b: str

    class Reversed(BaseModel):
        b: str
        a: str

    Reversed.__name__ = "Ordered"

    class One(StructuredCompletion):
        response = Ordered

    class Two(StructuredCompletion):
        response = Reversed

    forms = [bind(cls, Context()).config.response_format for cls in (One, Two)]
    schemas = [json.loads(form)["json_schema"]["schema"]["properties"] for form in forms]
    assert schemas[0] == schemas[1]
    assert forms[0] != forms[1]


def test_wrong_declarations_are_told_where_they_are() -> None:
    class Loose(BaseModel):
        tags: dict[str, int]

    with pytest.raises(DefinitionError, match=r"Loose\.tags is declared as dict\[str, int\]"):

        class OfLoose(StructuredCompletion):
            response = Loose

    with pytest.raises(
        DefinitionError, match=r"OfDict: response must be a pydantic model, found <class 'dict'>"
    ):

        class OfDict(StructuredCompletion):
            response = dict  # type: ignore[assignment]

    with pytest.raises(DefinitionError, match=r"key is \('prompt',\), found \('product_id',\)"):

        class OfProducts(StructuredCompletion):
            response = Verdict
            key = ("product_id",)


def test_the_stand_in_needs_no_server() -> None:
    feature = Controller(Context(), MemoryCache()).get(ProductVerdict, ("a red lamp with a shade",))
    assert feature.value["mood"] in ("calm", "loud")
    assert len(feature.value["reasons"]) == 3
    assert set(feature.value["reasons"][0].split()) < {"a", "red", "lamp", "with", "shade"}


def test_a_model_of_a_user_s_own_is_asked_with_the_schema() -> None:
    model = CountingLLM({"a lamp": BAD}, usd_per_call=0.25)
    cache = MemoryCache()
    feature = Controller(Context(llm=model), cache).get(ProductVerdict, ("a lamp",))
    assert feature.status == "error"
    assert sum(model.calls.values()) == 2
    assert rows(cache)[0]["usd"] == 0.5


def test_what_calls_will_take_is_told_beforehand() -> None:
    bound = bind(ProductVerdict, Context())
    pricing = pricing_of(bound, Context())
    assert pricing is not None and pricing.priced
    told = pricing.expected({"prompt": "a lamp"}).tokens
    assert told is not None and told > len(bound.config.response_format) / 4
    assert pricing_of(bind(ProductVerdict, Context(llm=CountingLLM())), Context(llm=CountingLLM())) is None


def test_the_builder_travels_to_workers() -> None:
    class Local(BaseModel):
        mood: Literal["calm"]

    class Travelling(StructuredCompletion):
        response = Local

    again = cloudpickle.loads(cloudpickle.dumps(Travelling))
    feature = Controller(Context(), MemoryCache()).get(again, ("x",))
    assert feature.value == {"mood": "calm"}
