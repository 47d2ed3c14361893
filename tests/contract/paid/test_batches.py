"""Calls by batch, against a server on loopback that speaks the batch protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel

from featurekit_spark import aio
from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.errors import AnswersPendingError, BudgetError, ContextError, NewCallsError
from featurekit_spark.llm import StructuredCompletion
from featurekit_spark.llm.batch_desk import BatchLimits
from featurekit_spark.paid.retry import RetryPolicy
from featurekit_spark.session import RunResult, Session
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import FAST, Ids, Prompt, Reply, World, model, run

ROOT = Path(__file__).resolve().parents[3]
SHOPS = {
    "a": {"p1": "red lamp", "p2": "sofa", "p3": "red lamp"},
    "b": {"p1": "sofa", "p2": "desk"},
}
A = {("a", "p1"): "<RED LAMP>", ("a", "p2"): "<SOFA>", ("a", "p3"): "<RED LAMP>"}
B = {("b", "p1"): "<SOFA>", ("b", "p2"): "<DESK>"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as chat:
        yield chat


class Shop:
    """Runs over one cache."""

    def __init__(self, server: ChatServer, path: Path) -> None:
        self.server, self.path = server, path
        self.cache = DeltaCache(str(path / "cache"))
        self.folder = path / "cache" / "batches"

    def run(self, shop: str = "a", *, how: dict[str, Any] | None = None, **options: Any) -> dict[Any, Any]:
        return run(self.cache, self.model(**options), SHOPS, shop, **(how or {})).values(Reply)

    def pending(self, shop: str = "a", **options: Any) -> str:
        with pytest.raises(AnswersPendingError) as stopped:
            self.run(shop, **options)
        return str(stopped.value)

    def model(self, **options: Any) -> Any:
        return model(self.server.url, str(self.folder), **options)

    def records(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.json*"))

    def entries(self) -> list[dict[str, Any]]:
        return list(self.cache.history("LLMCompletion").to_pylist())


@pytest.fixture
def shop(server: ChatServer, tmp_path: Path) -> Shop:
    return Shop(server, tmp_path)


def test_a_run_hands_in_and_a_later_one_collects(shop: Shop) -> None:
    shop.server.batches.polls = 1  # a run asks when it begins
    assert "waiting for batch batch_1 (validating, 0 of 2 done" in shop.pending()
    assert sorted(shop.server.batches.prompts) == ["red lamp", "sofa"], "equal prompts are one line"
    assert "batch_1 (in_progress" in shop.pending()
    assert shop.run() == A
    assert len(shop.server.batches.batches) == 1
    assert shop.server.requests == [], "nothing was asked online"
    assert shop.records() == []


def test_a_run_may_wait_for_its_answers(shop: Shop) -> None:
    shop.server.batches.polls = 3
    assert shop.run(wait_s=20.0) == A
    assert shop.records() == []
    assert len(shop.server.batches.batches) == 1


def test_what_is_to_come_is_not_handed_in_again_by_anybody(shop: Shop) -> None:
    shop.server.batches.polls = 100
    shop.pending("a")
    shop.pending("b")
    shop.pending("a")
    assert sorted(shop.server.batches.prompts) == ["desk", "red lamp", "sofa"]


def test_another_shops_run_takes_in_what_came(shop: Shop) -> None:
    shop.pending("a")
    shop.server.batches.polls = 0
    shop.pending("b")  # collects a's batch, and hands in its own
    assert sorted(entry["key"] for entry in shop.entries()) == ['["red lamp"]', '["sofa"]']
    first = {run.run_id for run in shop.cache.runs('["a"]')}
    assert {entry["run_id"] for entry in shop.entries()} == first, "they are the calls of the run that asked"
    assert shop.run("b") == B
    calls = len(shop.server.batches.calls)
    assert shop.run("a") == A
    assert len(shop.server.batches.calls) == calls, "everything of a was in the cache"


def test_entries_have_tokens_and_the_price_of_a_batch(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.polls = 0
    shop.run()
    assert [(entry["tokens"], entry["usd"], entry["status"]) for entry in shop.entries()] == [
        (10, 13.5, "ok")
    ] * 2


def test_a_batch_online_and_a_batch_are_one_ledger(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.polls = 0
    shop.run()
    online = shop.model().chat
    assert run(shop.cache, online, SHOPS, "a").values(Reply) == A  # type: ignore[arg-type]
    assert shop.server.requests == []


def test_files_are_split_by_lines_and_by_bytes(shop: Shop) -> None:
    shop.server.batches.polls = 2
    shop.pending(limits=BatchLimits(requests=1, unsure_s=0.0))
    assert len(shop.server.batches.batches) == 2
    message = shop.pending("b", limits=BatchLimits(bytes=10, unsure_s=0.0))
    assert len(shop.server.batches.batches) == 3
    assert message.startswith("waiting for batches batch_")
    assert message.count("(") == 3
    shop.server.batches.polls = 0
    assert (shop.run("a"), shop.run("b")) == (A, B)


def test_lines_that_failed_are_told_apart(shop: Shop) -> None:
    shop.server.batches.fails = {"red lamp": (400, "context_length_exceeded")}
    shop.server.batches.expires = {"sofa"}
    shop.pending()
    shop.server.batches.polls = 0
    result = run(shop.cache, shop.model(), SHOPS, "a")
    assert result.status == "partial"
    errors = {entry["key"]: entry["error"] for entry in shop.entries() if entry["status"] == "error"}
    assert "status 400: no" in errors['["red lamp"]']
    assert "batch_expired: This request could not be executed in time." in errors['["sofa"]']
    assert shop.records() == [], "what was told once is not told again"


def test_a_line_that_expired_is_handed_in_by_the_next_run(shop: Shop) -> None:
    shop.server.batches.expires = {"sofa"}
    shop.pending()
    shop.server.batches.polls = 0
    assert run(shop.cache, shop.model(), SHOPS, "a").status == "partial"
    shop.server.batches.expires = set()
    shop.pending()
    assert shop.server.batches.prompts.count("sofa") == 2
    assert shop.server.batches.prompts.count("red lamp") == 1
    assert shop.run() == A


def test_a_batch_that_is_refused_for_want_of_money_ends_the_run_once(shop: Shop) -> None:
    shop.server.batches.refuses = "billing_hard_limit_reached"
    shop.pending()
    shop.server.batches.polls = 0
    with pytest.raises(BudgetError, match="billing_hard_limit_reached"):
        shop.run()
    shop.server.batches.refuses = None
    shop.pending()
    assert shop.run() == A


def test_no_quota_to_hand_in_with_leaves_no_error_with_any_key(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = shop.server.batches.serve

    def unpaid(verb: str, *request: Any) -> tuple[int, Any]:
        error = {"message": "no", "type": "t", "code": "insufficient_quota"}
        return (429, {"error": error}) if verb == "POST" else served(verb, *request)

    with monkeypatch.context() as patched:
        patched.setattr(shop.server.batches, "serve", unpaid)
        with pytest.raises(BudgetError, match="no quota left"):
            shop.run()
    assert not shop.cache.has("LLMCompletion") or shop.entries() == []
    assert (shop.records(), shop.server.batches.files) == ([], {})
    shop.pending()
    shop.server.batches.polls = 0
    assert shop.run() == A


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_line_that_blames_the_key_is_handed_in_again(shop: Shop, status: int) -> None:
    shop.server.batches.fails = {"red lamp": (status, "")}
    shop.pending()
    shop.server.batches.polls = 0
    assert run(shop.cache, shop.model(), SHOPS, "a").builders["LLMCompletion"].retryable == 1
    shop.server.batches.fails = {}
    shop.pending()
    assert shop.run() == A
    assert sorted(shop.server.batches.prompts) == ["red lamp", "red lamp", "sofa"]


def test_a_limit_on_calls_limits_what_is_handed_in(shop: Shop) -> None:
    one = {"budget": Budget(max_calls=1)}
    shop.pending(how=one)
    assert len(shop.server.batches.prompts) == 1
    shop.server.batches.polls = 0
    shop.pending(how=one)  # what came is in the cache, and the rest is asked
    assert len(shop.server.batches.prompts) == 2
    assert shop.run(how=one) == A
    with pytest.raises(NewCallsError):
        shop.run("b", how={"budget": Budget(no_new_calls=True)})
    assert len(shop.server.batches.prompts) == 2


def test_no_new_calls_answers_from_what_was_handed_in_before(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.polls = 0
    assert shop.run(how={"budget": Budget(no_new_calls=True)}) == A


def test_a_server_without_batches_is_told_before_anything_is_paid(shop: Shop) -> None:
    shop.server.batches.available = False
    with pytest.raises(
        ContextError, match=r"has no batch API \(POST /files answered 404\). Use llm.mode: online"
    ):
        shop.run()
    assert shop.records() == []
    assert shop.server.requests == []


def test_a_single_request_is_made_online_at_the_full_price(shop: Shop) -> None:
    async def ask() -> Any:
        llm = shop.model()
        try:
            return await llm.complete("now")
        finally:
            await llm.aclose()

    answer = asyncio.run(ask())
    assert (answer.text, answer.usd) == ("NOW", 27.0)
    assert shop.server.batches.calls == []


def test_a_create_whose_answer_is_lost_is_not_made_twice(shop: Shop) -> None:
    lost = []

    def lose(call: str) -> None:
        if call == "POST /batches" and not lost:
            lost.append(call)
            raise ConnectionError

    shop.server.batches.after = lose
    shop.pending()
    assert len(shop.server.batches.batches) == 1
    shop.server.batches.polls = 0
    assert shop.run() == A


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "step",
    ["POST /files", "POST /batches", "GET /batches", "GET /files"],
    ids=["upload", "create", "poll", "fetch"],
)
def test_kill_9_at_any_step_pays_nothing_twice(shop: Shop, when: str, step: str) -> None:
    """The server kills the run when it gets, or has carried out, a call of it."""
    department = shop.server.batches
    department.polls = 0
    killed: list[int] = []

    def once(call: str) -> None:
        if call == step and not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            raise ConnectionError

    setattr(department, when, once)
    for _ in range(6):
        with _started(shop) as process:
            out, err = process.communicate(timeout=120)
        if out and out != "pending\n":
            break
    assert killed
    assert process.returncode == 0, err
    assert {("a", key): value for key, value in json.loads(out).items()} == A
    assert sorted(department.prompts) == ["red lamp", "sofa"], "each prompt was in one batch"
    assert shop.records() == []


def test_a_batch_that_may_have_been_made_is_waited_for(shop: Shop) -> None:
    """A killed run asked for a batch; the provider does not list it yet, and makes it later."""
    killed: list[int] = []

    def once(call: str) -> None:
        if call == "POST /batches" and not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            raise ConnectionError

    shop.server.batches.before = once
    with _started(shop) as process:
        process.communicate(timeout=120)
    careful = BatchLimits(unsure_s=300.0, poll_s=FAST.poll_s)
    assert "(not known to the provider yet)" in shop.pending(limits=careful)
    assert shop.server.batches.prompts == []
    assert "batch_1" in shop.pending(limits=FAST)  # five minutes later, say
    assert len(shop.server.batches.prompts) == 2


def _started(shop: Shop, name: str = "a", *more: str) -> subprocess.Popen[str]:
    arguments = [str(shop.path / "cache"), shop.server.url, name, json.dumps(SHOPS), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.batch_shop", *arguments],
        cwd=ROOT,
        env={**os.environ, "TEST_CHAT_KEY": "any"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Mood(BaseModel):
    mood: str


class Moods(StructuredCompletion):
    response = Mood


class Verdict(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (Moods.on(prompt=Prompt),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Moods"]["mood"])


def test_an_answer_that_does_not_fit_is_repaired_in_a_second_batch(shop: Shop) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return '{"mood": "calm"}' if prompt == "sofa" or "does not fit" in prompt else "calm, I'd say"

    def found() -> Any:
        llm = shop.model()
        try:
            session = Session(World(llm, SHOPS), shop.cache, engine="local")
            return session.run(Verdict.over(Ids), shop="a").values(Verdict)
        finally:
            aio.run(llm.aclose())

    shop.server.answer = answer
    shop.server.batches.polls = 0
    for _ in range(2):  # the second hands the repair in, and keeps the first answer for it
        with pytest.raises(AnswersPendingError):
            found()
    assert found() == dict.fromkeys(A, "calm")
    assert len(asked) == 3, "each request was paid for once"
    assert shop.records() == []
    rows = shop.cache.history("Moods").to_pylist()
    assert {row["key"]: row["usd"] for row in rows} == {'["red lamp"]': 27.0, '["sofa"]': 13.5}


def test_a_run_that_waits_for_what_was_on_its_way_pays_for_nothing_twice(shop: Shop) -> None:
    shop.server.answer = lambda prompt: '{"mood": "calm"}' if "does not fit" in prompt else "calm, I'd say"
    shop.server.batches.polls = 1

    def found(**options: Any) -> RunResult:
        llm = shop.model(**options)
        try:
            return Session(World(llm, SHOPS), shop.cache, engine="local").run(Verdict.over(Ids), shop="a")
        finally:
            aio.run(llm.aclose())

    with pytest.raises(AnswersPendingError):
        found()
    result = found(wait_s=20.0)
    assert len(shop.server.batches.prompts) == 4, "each of two prompts and its repair"
    assert result.paid_twice == PaidTwice() and not result.warnings


def test_two_jobs_at_once_hand_a_prompt_in_once(shop: Shop) -> None:
    shop.server.batches.polls = 1000
    jobs = [_started(shop, name) for name in ("a", "b", "a", "b")]
    outs = [job.communicate(timeout=120) for job in jobs]
    assert [out for out, _ in outs] == ["pending\n"] * 4, outs
    assert sorted(shop.server.batches.prompts) == ["desk", "red lamp", "sofa"]


class Slow(DeltaCache):
    """Keeps its folder's lock longer: what another run does meanwhile is not left to chance."""

    def append(self, entries: Any, pointers: Any) -> Any:
        time.sleep(0.7)
        return super().append(entries, pointers)


def test_two_runs_that_collect_at_once_take_an_answer_in_once(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.polls = 0
    outcomes: list[Any] = []

    def collect() -> None:
        try:
            outcomes.append(run(Slow(str(shop.path / "cache")), shop.model(), SHOPS, "a").values(Reply))
        except Exception as error:
            outcomes.append(error)

    runs = [threading.Thread(target=collect) for _ in range(2)]
    for one in runs:
        one.start()
        time.sleep(0.1)
    for one in runs:
        one.join(60)
    assert outcomes == [A, A]
    assert sorted(entry["key"] for entry in shop.entries()) == ['["red lamp"]', '["sofa"]']
    assert shop.records() == []


def test_answers_that_somebody_removed_meanwhile_end_no_run(shop: Shop) -> None:
    """As where there are no locks."""
    shop.pending()
    shop.server.batches.polls = 0
    first, other = shop.model(), shop.model()
    (submission,) = first.desk.look("first")
    names = first.desk.ids(submission.tag)
    assert len(names) == 2
    assert [item.tag for item in other.desk.look("other")] == [submission.tag]
    first.desk.done(submission, names, "first")
    other.desk.done(submission, names, "other")
    assert other.desk.ended(submission.tag)
    assert shop.records() == []
    for client in (first, other):
        aio.run(client.aclose())


def test_a_refused_prompt_is_not_handed_in_again(shop: Shop) -> None:
    shop.server.batches.fails = {"red lamp": (400, "content_policy_violation")}
    shop.pending()
    shop.server.batches.polls = 0
    for _ in range(2):
        assert run(shop.cache, shop.model(), SHOPS, "a").status == "partial"
    assert shop.server.batches.prompts.count("red lamp") == 1


def test_a_provider_that_is_down_leaves_everything_as_it_is(shop: Shop) -> None:
    def down(call: str) -> None:
        raise ConnectionError

    def hasty() -> Any:
        llm = shop.model()
        llm.desk.client.policy = RetryPolicy(attempts=2, first_wait_s=0.01)
        return run(shop.cache, llm, SHOPS, "a").values(Reply)

    shop.server.batches.before = down
    with pytest.raises(AnswersPendingError, match="could not be handed in: POST /files"):
        hasty()
    (left,) = shop.records()
    assert '"stage": "done"' in (shop.folder / left).read_text(), "there is no batch; a file may have come"
    shop.server.batches.before = lambda call: None
    shop.pending()
    assert left not in shop.records(), "it was looked for"
    shop.server.batches.before = down
    with pytest.raises(AnswersPendingError, match="the provider does not answer"):
        hasty()
    shop.server.batches.before = lambda call: None
    shop.server.batches.polls = 0
    assert hasty() == A
    assert len(shop.server.batches.prompts) == 2


def test_a_batch_that_the_provider_lost_is_not_paid_for_again_unasked(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.batches.clear()
    with pytest.raises(ContextError, match="gone for good, `featurekit batches cancel batch_1 --forget`"):
        shop.run()
    desk = shop.model().desk
    desk.drop(*desk.records.all())
    shop.pending()
    assert len(shop.server.batches.prompts) == 4


def test_a_limit_in_usd_hands_one_in_to_learn_the_price(shop: Shop) -> None:
    limit = {"budget": Budget(max_usd=30.0)}
    shop.pending(how=limit)
    assert len(shop.server.batches.prompts) == 1
    shop.server.batches.polls = 0
    shop.pending(how=limit)
    assert len(shop.server.batches.prompts) == 2
    assert shop.run(how=limit) == A


def test_control_c_while_waiting_ends_the_run_at_once(shop: Shop) -> None:
    shop.server.batches.polls = 1000
    waiting = threading.Event()
    shop.server.batches.after = lambda call: waiting.set() if call == "GET /batches" else None
    with _started(shop, "a", "--wait") as process:
        assert waiting.wait(60)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    shop.server.batches.polls = 0
    assert shop.run() == A
    assert len(shop.server.batches.prompts) == 2


def test_a_word_of_a_providers_own_is_no_end(shop: Shop) -> None:
    shop.pending()
    batch = shop.server.batches.batches["batch_1"]

    def queued(call: str) -> None:
        batch["status"] = "queued_for_gpu"

    shop.server.batches.polls, shop.server.batches.after = 100, queued
    assert "batch_1 (in_progress" in shop.pending()
    shop.server.batches.polls, shop.server.batches.after = 0, lambda call: None
    assert shop.run() == A


def test_a_batch_that_somebody_cancelled_gives_what_it_has(shop: Shop) -> None:
    shop.pending()
    shop.server.batches.batches["batch_1"]["status"] = "cancelled"
    assert run(shop.cache, shop.model(), SHOPS, "a").status == "partial"
    errors = {entry["key"]: entry["error"] for entry in shop.entries()}
    assert all("batch batch_1 cancelled" in error for error in errors.values()), errors
    shop.server.batches.polls = 0
    shop.pending()
    assert shop.run() == A
