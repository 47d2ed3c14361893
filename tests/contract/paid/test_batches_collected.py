"""Batches that are collected: once, by whoever comes first, whatever the configuration is by then; and what is left
of them at the provider."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import aio
from featurekit_spark.budget import Budget
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.verify import verify
from featurekit_spark.deferred import take_in
from featurekit_spark.errors import AnswersPendingError, NewCallsError
from featurekit_spark.llm import OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_answers import collected
from featurekit_spark.llm.batch_beside import ChatBesideBatches
from featurekit_spark.llm.batch_records import BatchRecords
from featurekit_spark.paid.prices import Price
from featurekit_spark.report.cost import paid_lots, summed
from featurekit_spark.session import RunResult, Session
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import FAST, Ids, Reply, World, model

ROOT = Path(__file__).resolve().parents[3]
SHOPS = {
    "a": {"p1": "red lamp", "p2": "sofa", "p3": "red lamp"},
    "b": {"p1": "sofa", "p2": "desk"},
}
A = {("a", "p1"): "<RED LAMP>", ("a", "p2"): "<SOFA>", ("a", "p3"): "<RED LAMP>"}
PRICE = Price.of(3_000_000, 2_000_000)  # 7 and 3 tokens are 27 usd online


class Shop:
    """Runs over one cache."""

    def __init__(self, server: ChatServer, path: Path) -> None:
        self.server, self.path = server, path
        self.cache = DeltaCache(str(path / "cache"))
        self.folder = path / "cache" / "batches"

    def batch(self, name: str = "m", **options: Any) -> OpenAIBatch:
        if name == "m":
            return model(self.server.url, str(self.folder), **options)
        chat = OpenAIChat(self.server.url, name, api_key_env="TEST_CHAT_KEY", price=Price.of(1, 1))
        return OpenAIBatch(chat, str(self.folder), limits=FAST, **options)

    def online(self, name: str = "m", **options: Any) -> ChatBesideBatches:
        given = {"base_url": self.server.url, "model": name, "api_key_env": "TEST_CHAT_KEY", "price": PRICE}
        return ChatBesideBatches(str(self.folder), **given, **options)

    def result(self, llm: Any, shop: str = "a", **how: Any) -> RunResult:
        try:
            return Session(World(llm, SHOPS), self.cache, engine="local").run(
                Reply.over(Ids), shop=shop, **how
            )
        finally:
            aio.run(llm.aclose())

    def pending(self, llm: Any, shop: str = "a", **how: Any) -> str:
        with pytest.raises(AnswersPendingError) as stopped:
            self.result(llm, shop, **how)
        return str(stopped.value)

    def entries(self) -> list[dict[str, Any]]:
        return list(self.cache.history("LLMCompletion").to_pylist())

    def keys(self) -> list[str]:
        return sorted(json.loads(entry["key"])[0] for entry in self.entries())

    def records(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.json*"))

    def process(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.batch_shop", str(self.path / "cache"), self.server.url),
                *(arguments[0], json.dumps(SHOPS), *arguments[1:]),
            ],
            cwd=ROOT,
            env={**os.environ, "TEST_CHAT_KEY": "any"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as chat:
        yield chat


@pytest.fixture
def shop(server: ChatServer, tmp_path: Path) -> Shop:
    return Shop(server, tmp_path)


def test_a_run_that_waits_and_runs_that_begin_take_in_an_answer_once(shop: Shop) -> None:
    """Processes: two wait for the same batch, others begin when it has just ended."""
    shop.server.batches.polls = 1_000_000
    waiting = [shop.process("a", "--wait"), shop.process("b", "--wait")]
    until = time.monotonic() + 120
    while len(shop.server.batches.prompts) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    beginning = [shop.process("a"), shop.process("b")]
    shop.server.batches.polls = 0
    found = [job.communicate(timeout=300) for job in (*waiting, *beginning)]
    assert [job.returncode for job in (*waiting, *beginning)] == [0] * 4, found
    assert [json.loads(out)["p2"] for out, _ in found[:2]] == ["<SOFA>", "<DESK>"]
    assert sorted(shop.server.batches.prompts) == ["desk", "red lamp", "sofa"], "each was paid for once"
    assert shop.keys() == ["desk", "red lamp", "sofa"], "each has one entry"
    assert shop.records() == []
    assert shop.server.batches.files == {}


def test_many_that_wait_for_one_batch_take_it_in_once(shop: Shop) -> None:
    shop.server.batches.polls = 6
    outcomes: list[Any] = []

    def wait() -> None:
        try:
            world, cache = World(shop.batch(wait_s=60.0), SHOPS), DeltaCache(str(shop.path / "cache"))
            outcomes.append(
                Session(world, cache, engine="local").run(Reply.over(Ids), shop="a").values(Reply)
            )
        except Exception as error:
            outcomes.append(error)

    runs = [threading.Thread(target=wait) for _ in range(3)]
    for one in runs:
        one.start()
    for one in runs:
        one.join(120)
    assert outcomes == [A] * 3
    assert shop.keys() == ["red lamp", "sofa"]
    assert len(shop.server.batches.prompts) == 2
    assert shop.records() == []


def test_another_models_answers_are_taken_in_under_the_identity_they_were_asked_with(shop: Shop) -> None:
    shop.pending(shop.batch("old"))
    shop.server.batches.polls = 0
    shop.pending(shop.batch("new"))  # takes the old model's in, and hands in its own
    identity = f"openai:old@{shop.server.url}"
    llm = shop.batch("old")
    bound = Session(World(llm, SHOPS), shop.cache, engine="local")._prepare(
        [Reply.over(Ids)], None, {"shop": "a"}
    )
    (completion,) = (found for builder, found in bound[2].items() if builder.name == "LLMCompletion")
    assert completion.config.model == identity
    assert {entry["config_hash"] for entry in shop.entries()} == {completion.config_hash}
    assert {entry["usd"] for entry in shop.entries()} == {5e-06}, "at the old model's price, by batch"
    calls = len(shop.server.batches.prompts)
    assert shop.result(shop.batch("old")).values(Reply) == A
    assert len(shop.server.batches.prompts) == calls, "going back costs nothing"


def test_an_online_run_takes_in_what_came_of_any_model(shop: Shop) -> None:
    shop.pending(shop.batch("old"))
    shop.pending(shop.batch())
    shop.server.batches.polls = 0
    result = shop.result(shop.online())
    assert result.values(Reply) == A
    assert shop.server.requests == [], "nothing was asked online"
    assert Counter(shop.keys()) == {"red lamp": 2, "sofa": 2}
    assert (shop.records(), shop.server.batches.files) == ([], {})


def test_an_online_run_leaves_what_is_on_its_way_to_the_batch(shop: Shop) -> None:
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    said = shop.pending(shop.online())
    assert "batch_1 (in_progress, 0 of 2 done" in said and "--set llm.pending=pay" in said
    assert "sofa" not in shop.server.prompts, "it is on its way"
    shop.server.batches.polls = 0
    assert shop.result(shop.online()).values(Reply) == A
    assert shop.server.prompts == ["red lamp"]
    assert shop.keys() == ["desk", "red lamp", "sofa"]


def test_paying_again_is_counted_as_paid_twice_and_changes_no_answer_later(shop: Shop) -> None:
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    shop.server.answer = str.title
    result = shop.result(shop.online(pending="pay"))
    assert result.values(Reply)["a", "p2"] == "<Sofa>"
    assert (result.paid_twice.calls, result.paid_twice.tokens, result.paid_twice.usd) == (1, 10, 27.0)
    assert any("1 call was paid for twice" in line for line in result.warnings)
    shop.server.answer = str.upper
    shop.server.batches.polls = 0
    again = shop.result(shop.online())
    assert again.values(Reply)["a", "p2"] == "<Sofa>", "what was published stays"
    assert again.paid_twice.calls == 0
    paid = Counter((json.loads(entry["key"])[0], entry["usd"]) for entry in shop.entries())
    assert paid == {("sofa", 27.0): 1, ("red lamp", 27.0): 1, ("sofa", 13.5): 1, ("desk", 13.5): 1}
    assert shop.result(shop.online(), "b").values(Reply) == {("b", "p1"): "<Sofa>", ("b", "p2"): "<DESK>"}
    assert shop.records() == []
    assert verify(shop.cache).damage == (), "a cache that is whole has entries whose parts agree"


def test_a_plan_tells_what_is_on_its_way_before_it_costs(shop: Shop) -> None:
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    calls = len(shop.server.batches.calls)

    def estimate(llm: Any) -> Any:
        return Session(World(llm, SHOPS), shop.cache, engine="local").estimate(Reply.over(Ids), shop="a")

    for llm in (shop.batch(), shop.online()):
        found = estimate(llm)
        assert (found["LLMCompletion"].calls, found["LLMCompletion"].pending) == (1, 1)
        assert "there is one call on the way by batch, and a run waits" in found.warnings[-1]
    again = estimate(shop.online(pending="pay"))
    assert (again["LLMCompletion"].calls, again["LLMCompletion"].pending) == (2, 1)
    assert "this run would pay for them again" in again.warnings[-1]
    assert len(shop.server.batches.calls) == calls, "a plan asks nobody"
    with pytest.raises(NewCallsError, match="1 answer is on the way by batch"):
        shop.result(shop.online(), budget=Budget(no_new_calls=True))


def test_what_was_taken_in_by_a_run_that_died_before_it_said_so_is_one_entry(shop: Shop) -> None:
    shop.pending(shop.batch())
    shop.server.batches.polls = 0
    llm = shop.batch()
    for answers in collected(llm.desk, llm.chat, "killed"):
        take_in(replace(answers, done=lambda rows: None), shop.cache, None)
    assert shop.keys() == ["red lamp", "sofa"] and shop.records() != []
    assert shop.result(llm).values(Reply) == A
    assert shop.keys() == ["red lamp", "sofa"]
    assert (shop.records(), len(shop.server.batches.prompts)) == ([], 2)


def test_what_gave_no_answer_is_taken_in_once_too(shop: Shop) -> None:
    """An error, and what was paid twice: by processes that died before they said so."""
    shop.server.batches.fails = {"desk": (400, "content_filter")}
    shop.server.batches.polls = 1_000
    shop.pending(shop.batch(), "b")
    shop.result(shop.online(pending="pay"))
    shop.server.batches.polls = 0
    llm = shop.batch()
    for _ in range(2):
        for answers in collected(llm.desk, llm.chat, "killed"):
            take_in(replace(answers, done=lambda rows: None), shop.cache, None)
    aio.run(llm.aclose())
    found = Counter((json.loads(row["key"])[0], row["status"]) for row in shop.entries())
    assert found == {("sofa", "ok"): 2, ("red lamp", "ok"): 1, ("desk", "error"): 1}
    (total,) = summed(paid_lots(shop.cache), ())
    assert (total.calls, total.failed) == (4, 1)


def test_files_at_the_provider_are_removed_and_a_failure_is_tried_again(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    def no_delete(call: str) -> None:
        if call == "DELETE /files":
            raise ConnectionError

    shop.pending(shop.batch())
    assert len(shop.server.batches.files) == 1
    shop.server.batches.polls, shop.server.batches.before = 0, no_delete
    with caplog.at_level(logging.WARNING):
        assert shop.result(shop.batch()).values(Reply) == A, "it loses nothing"
    assert "may still be at the provider" in caplog.text
    assert len(shop.server.batches.files) == 2, "requests and answers"
    (left,) = shop.records()
    assert "lamp" not in (shop.folder / left).read_text(), "no text is kept for that"
    shop.server.batches.before = lambda call: None
    shop.pending(shop.batch(), "b")
    assert len(shop.server.batches.files) == 1, "those of b's own batch"
    assert left not in shop.records()


def test_a_provider_that_removes_no_files_is_asked_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    served = shop.server.batches.serve

    def kept(verb: str, path: str, *request: Any) -> tuple[int, Any]:
        return (405, {"error": {"message": "no"}}) if verb == "DELETE" else served(verb, path, *request)

    monkeypatch.setattr(shop.server.batches, "serve", kept)
    shop.pending(shop.batch())
    shop.server.batches.polls = 0
    assert shop.result(shop.batch()).values(Reply) == A
    assert shop.records() == []


def test_lines_that_are_missing_doubled_or_out_of_order_end_each_prompt_once(shop: Shop) -> None:
    def written(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [
            line for line in lines if line["response"]["body"]["choices"][0]["message"]["content"] != "SOFA"
        ]
        return [*kept, {"custom_id": "nobody's", "response": None, "error": None}, *kept]

    shop.pending(shop.batch())
    shop.server.batches.polls, shop.server.batches.written = 0, written
    result = shop.result(shop.batch())
    assert result.status == "partial" and result.values(Reply)["a", "p1"] == "<RED LAMP>"
    assert Counter((json.loads(e["key"])[0], e["status"]) for e in shop.entries()) == {
        ("red lamp", "ok"): 1,
        ("sofa", "error"): 1,
    }
    shop.server.batches.written = lambda lines: lines
    shop.pending(shop.batch())
    assert shop.result(shop.batch()).values(Reply) == A
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 2}


@pytest.mark.parametrize("end", ["expired", "cancelled", "failed"])
def test_a_batch_that_ended_early_gives_what_it_has_to_whoever_collects(shop: Shop, end: str) -> None:
    department = shop.server.batches
    if end == "expired":
        department.expires = {"sofa"}
    elif end == "failed":
        department.refuses = "invalid_request"
    shop.pending(shop.batch())
    department.polls = 0
    if end == "cancelled":
        department.batches["batch_1"]["status"] = "cancelled"
    llm = shop.batch("another")
    shop.pending(llm, "b")  # of another model: nobody will ask for these with the old one
    own = [entry for entry in shop.entries() if entry["usd"] is None or entry["usd"] > 1]
    assert sorted((json.loads(e["key"])[0], e["status"]) for e in own) == [
        ("red lamp", "ok" if end == "expired" else "error"),
        ("sofa", "error"),
    ]
    assert all(f"{end}" in entry["error"] for entry in own if entry["status"] == "error")
    department.expires, department.refuses = set(), None
    shop.pending(shop.batch())
    assert shop.result(shop.batch()).values(Reply) == A
    assert department.prompts.count("red lamp") == (1 if end == "expired" else 2)


def test_an_upload_whose_run_died_leaves_no_file_at_the_provider(shop: Shop) -> None:
    class Killed(BaseException):
        pass

    llm = shop.batch()
    put = llm.desk.records.put

    def die(submission: Any) -> None:
        if submission.stage == "creating":  # it was uploaded, and nobody has written so down
            raise Killed
        put(submission)

    llm.desk.records.put = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        shop.result(llm)
    assert len(shop.server.batches.files) == 1
    shop.server.batches.polls = 0
    shop.pending(shop.batch())
    assert len(shop.server.batches.files) == 1 and len(shop.server.batches.prompts) == 2
    assert shop.result(shop.batch()).values(Reply) == A
    assert shop.server.batches.files == {}


def test_a_run_that_needs_no_call_needs_no_key_for_what_is_on_its_way(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop.server.batches.polls = 1_000
    shop.result(shop.online())
    shop.pending(shop.batch("another"))
    monkeypatch.delenv("TEST_CHAT_KEY")
    for llm in (shop.online(), shop.batch()):
        caplog.clear()
        assert shop.result(llm).unchanged
        assert "TEST_CHAT_KEY is not set" in caplog.text


def test_a_record_holds_no_key(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", "sk-not-to-be-written")
    shop.pending(shop.batch())
    assert all("sk-not" not in (shop.folder / name).read_text() for name in shop.records())
    (submission,) = BatchRecords(str(shop.folder)).all()
    assert (submission.key, submission.requests, len(submission.askers)) == ("TEST_CHAT_KEY", 2, 1)
