"""Answers of batches that were paid for stay until somebody has taken them in: whatever the builders need, ask at once
or fail at, and whatever the answers hold."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cli import app
from featurekit_spark.context import FixedClock
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.freshness import Freshness
from featurekit_spark.llm import LLMCompletion
from featurekit_spark.llm.batch_desk import BatchDesk
from featurekit_spark.llm.completion import LIST_INSTRUCTION
from featurekit_spark.session import RunResult, Session
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import Ids, Prompt, Reply, World
from tests.contract.paid.test_batches_collected import SHOPS, A, Shop


@dataclass
class Wider(World):
    suffix: str = "!"
    clock: Any = None


class Suffixed(FeatureBuilder[str]):
    """Needs more than the model."""

    key, value, paid, needs = ("prompt",), pa.string(), True, ("llm", "suffix")

    async def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        answer = await context.llm.complete(inputs["prompt"])
        return f"{answer.text}{context.suffix}"


class Two(FeatureBuilder[str]):
    """Asks two things at once."""

    key, value, paid, needs = ("prompt",), pa.string(), True, ("llm",)

    async def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        prompt = inputs["prompt"]
        answers = await asyncio.gather(
            context.llm.complete(prompt), context.llm.complete(prompt, system="again")
        )
        return " ".join(answer.text for answer in answers)


class Week(LLMCompletion):
    freshness = Freshness(ttl=timedelta(days=7))


def said_by(asked: type[FeatureBuilder[Any]]) -> type[FeatureBuilder[str]]:
    class Said(FeatureBuilder[str]):
        key, deps, value, version = ("shop", "id"), (asked.on(prompt=Prompt),), pa.string(), "1"

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return f"<{inputs[asked.name]}>"

    return Said


def result(shop: Shop, llm: Any, target: type[FeatureBuilder[Any]], of: str = "a", **more: Any) -> RunResult:
    try:
        session = Session(Wider(llm, SHOPS, **more), shop.cache, engine="local")
        return session.run(target.over(Ids), shop=of)
    finally:
        aio.run(llm.aclose())


def pending(shop: Shop, llm: Any, target: type[FeatureBuilder[Any]], of: str = "a", **more: Any) -> None:
    with pytest.raises(AnswersPendingError):
        result(shop, llm, target, of, **more)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as chat:
        yield chat


@pytest.fixture
def shop(server: ChatServer, tmp_path: Path) -> Shop:
    return Shop(server, tmp_path)


def collect(shop: Shop, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    llm = {"provider": "openai", "base_url": shop.server.url, "model": "m", "api_key_env": "TEST_CHAT_KEY"}
    settings = {"cache.path": shop.path / "cache", **{f"llm.{name}": value for name, value in llm.items()}}
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with pytest.raises(SystemExit) as done:
        app(["batches", "collect", "--output", "text", *given], prog_name="featurekit")
    assert not done.value.code
    return capsys.readouterr().out


def test_what_a_collector_cannot_read_waits_for_a_run_that_can(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_by(Suffixed)
    pending(shop, shop.batch(), said)
    shop.server.batches.polls = 0
    told = collect(shop, capsys)
    assert "nothing came that was not taken in before" in told
    assert "batch_1: some answers wait for a run of Suffixed, which alone can read them" in told
    assert not len(shop.cache.history("Suffixed")) and len(shop.records()) == 3
    shop.result(shop.online())  # whose context has no suffix either
    assert not len(shop.cache.history("Suffixed"))
    assert result(shop, shop.batch(), said).values(said)["a", "p2"] == "<SOFA!>"
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 1}
    assert shop.records() == []


def test_an_answer_is_kept_where_another_that_was_asked_with_it_failed(shop: Shop) -> None:
    said = said_by(Two)
    pending(shop, shop.batch(), said)
    shop.server.batches.polls = 0

    def written(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        at = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines].index("SOFA")
        return [line for place, line in enumerate(lines) if place != at]

    shop.server.batches.written = written
    first = result(shop, shop.batch(), said)
    assert first.status == "partial" and first.values(said)["a", "p1"] == "<RED LAMP RED LAMP>"
    shop.server.batches.written = lambda lines: lines
    pending(shop, shop.batch(), said)
    assert result(shop, shop.batch(), said).values(said)["a", "p2"] == "<SOFA SOFA>"
    assert Counter(shop.server.batches.prompts) == {"red lamp": 2, "sofa": 3}, "what failed, once more"
    assert shop.records() == []


def test_an_answer_is_kept_where_another_that_was_asked_with_it_is_still_to_come(shop: Shop) -> None:
    """They are in two batches, of which one is answered."""
    said = said_by(Two)
    llm = shop.batch()
    llm.limits = type(llm.limits)(requests=1, unsure_s=0.0, poll_s=0.01)
    pending(shop, llm, said, "b")
    batches: Any = shop.server.batches
    assert len(batches.batches) == 4
    batches.polls = 0
    states = {name: dict(batch) for name, batch in batches.batches.items()}
    served = batches.serve

    def slow(verb: str, path: str, *request: Any) -> tuple[int, Any]:
        if path in ("batches/batch_2", "batches/batch_3") and verb == "GET":
            status, answer = served(verb, path, *request)
            return status, {**answer, "status": "in_progress", "output_file_id": None}
        answered: tuple[int, Any] = served(verb, path, *request)
        return answered

    batches.serve = slow
    for _ in range(2):
        pending(shop, shop.batch(), said, "b")
    batches.serve = served
    assert result(shop, shop.batch(), said, "b").values(said)["b", "p2"] == "<DESK DESK>"
    assert len(batches.prompts) == len(states), "each was paid for once"


def test_half_of_a_character_is_its_keys_own_error(shop: Shop) -> None:
    def written(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for line in lines:
            message = line["response"]["body"]["choices"][0]["message"]
            if message["content"] == "SOFA":
                message["content"] = "SOFA \ud83d"
        return lines

    shop.pending(shop.batch())
    shop.server.batches.polls, shop.server.batches.written = 0, written
    found = shop.result(shop.batch())
    assert found.values(Reply) == {**A, ("a", "p2"): None}
    (error,) = (entry for entry in shop.entries() if entry["status"] == "error")
    assert "half of a character" in error["error"] and error["tokens"] == 10, "it was paid for"
    assert shop.records() == []


def test_half_of_a_character_in_an_error_can_be_told(shop: Shop) -> None:
    shop.pending(shop.batch())
    shop.server.batches.polls = 0
    shop.server.batches.written = lambda lines: [
        {**line, "response": {"status_code": 500, "body": {"error": {"message": "no \ud83d"}}}}
        for line in lines
    ]
    assert shop.result(shop.batch()).values(Reply) == dict.fromkeys(A)
    assert all("no ?" in entry["error"] for entry in shop.entries())


@pytest.mark.parametrize(
    "odd",
    [
        {"response": {"status_code": "500"}},
        {"custom_id": ["a"]},
        {"response": "x"},
        {"response": {"body": 3}},
    ],
)
def test_a_line_of_another_shape_costs_only_its_own(shop: Shop, odd: dict[str, Any]) -> None:
    def written(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]
        return [
            {**line, **odd} if text == "SOFA" else line for line, text in zip(lines, answers, strict=True)
        ]

    shop.pending(shop.batch())
    shop.server.batches.polls, shop.server.batches.written = 0, written
    assert shop.result(shop.batch()).values(Reply) == {**A, ("a", "p2"): None}


def test_one_batch_that_cannot_be_taken_in_keeps_no_other_from_it(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop.pending(shop.batch("other"))
    shop.pending(shop.batch())
    shop.server.batches.polls = 0
    asked, append = BatchDesk._asked, DeltaCache.append

    def looked(self: BatchDesk, item: Any, *more: Any) -> Any:
        if item.model == "other":
            raise RuntimeError("what nobody thought of")
        return asked(self, item, *more)

    monkeypatch.setattr(BatchDesk, "_asked", looked)
    with caplog.at_level(logging.WARNING):
        assert shop.result(shop.batch()).values(Reply) == A
    assert "batch batch_1 cannot be taken in, and stays: RuntimeError: what nobody thought of" in caplog.text
    monkeypatch.setattr(BatchDesk, "_asked", asked)

    def fails(self: DeltaCache, entries: Any = None, traces: Any = ()) -> None:
        if entries is not None and "LLMCompletion" in entries["builder"].to_pylist():
            raise RuntimeError("nor of this")
        append(self, entries, traces)

    monkeypatch.setattr(DeltaCache, "append", fails)
    with caplog.at_level(logging.WARNING):
        assert shop.result(shop.batch()).values(Reply) == A
    assert "cannot be taken in, and stays: RuntimeError: nor of this" in caplog.text
    monkeypatch.setattr(DeltaCache, "append", append)
    assert len(shop.records()) == 3, "it is still there"
    shop.result(shop.batch(), "a", retry_errors="all")
    assert len(shop.entries()) == 4 and shop.records() == []


def test_a_single_request_does_not_wait_for_a_batch_after_a_run_did(shop: Shop) -> None:
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    llm = shop.online()
    session = Session(World(llm, SHOPS), shop.cache, engine="local")
    for _ in range(2):
        with pytest.raises(AnswersPendingError):
            session.run(Reply.over(Ids), shop="a")
    assert "sofa" not in shop.server.prompts
    assert session.get(LLMCompletion, ("sofa",)).value == "SOFA"
    aio.run(llm.aclose())


def test_what_a_run_waits_for_travels_to_its_workers_and_outlives_no_run(shop: Shop) -> None:
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    llm = shop.online()
    with llm.collecting("one") as came:
        list(came)

    def asked_elsewhere() -> str:
        try:
            model = pickle.loads(pickle.dumps(llm))
            return str(aio.run(model.complete("sofa", system=LIST_INSTRUCTION)).text)
        except AnswersPendingError:
            return "waits"

    with llm.opened("one"):
        with llm.opened("another, at the same time"):
            pass
        assert asked_elsewhere() == "waits"
    assert asked_elsewhere() == "SOFA"


def test_what_a_backfill_collects_is_as_old_as_it_is(shop: Shop) -> None:
    said = said_by(Week)
    pending(shop, shop.batch(), said)
    shop.server.batches.polls = 0
    before = datetime.now(UTC)
    pending(shop, shop.batch(), said, "b", clock=FixedClock(datetime(2026, 1, 1, 12, tzinfo=UTC)))
    assert all(entry["ts"] >= before for entry in shop.cache.history("Week").to_pylist())
    assert result(shop, shop.batch(), said).values(said)["a", "p2"] == "<SOFA>"
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 1, "desk": 1}
