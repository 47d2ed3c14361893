"""Batches of which the provider refuses to tell, or cannot: nothing is forgotten, and paid for again, on a guess."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import aio
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.folder import Folder
from featurekit_spark.errors import AnswersPendingError, BudgetError, ContextError, FeaturekitError
from featurekit_spark.llm import OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_beside import ChatBesideBatches
from featurekit_spark.llm.batch_desk import BatchDesk
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.llm.openai_batch import BatchClient
from featurekit_spark.paid.retry import Clock, RetryPolicy
from featurekit_spark.session import Session
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import FAST, Ids, Reply, World

SHOPS = {"a": {"p1": "red lamp", "p2": "sofa"}, "b": {"p1": "sofa", "p2": "desk"}}
A = {("a", "p1"): "<RED LAMP>", ("a", "p2"): "<SOFA>"}
B = {("b", "p1"): "<SOFA>", ("b", "p2"): "<DESK>"}
NO_SCOPE = (403, {"error": {"message": "missing scopes: api.batches.read"}})
NO_QUOTA = (429, {"error": {"message": "no", "code": "insufficient_quota"}})
DOWN = (503, {"error": {"message": "down"}})


class Remote(Folder):
    """One where nothing can be locked, as on an object store."""

    @property
    def local(self) -> Path | None:
        return None


class Shop:
    """Runs over one cache."""

    def __init__(self, server: ChatServer, path: Path) -> None:
        self.server, self.cache = server, DeltaCache(str(path / "cache"))
        self.folder: Folder = Folder(str(path / "cache" / "batches"))

    def batch(self, name: str = "m") -> OpenAIBatch:
        llm = OpenAIBatch(OpenAIChat(**self.chat(name)), self.folder, limits=FAST)
        llm.desk.client.policy = RetryPolicy(attempts=3, first_wait_s=0.01)
        return llm

    def online(self, name: str = "m") -> ChatBesideBatches:
        return ChatBesideBatches(self.folder, **self.chat(name))

    def chat(self, name: str) -> dict[str, Any]:
        return {"base_url": self.server.url, "model": name, "api_key_env": "TEST_CHAT_KEY"}

    def desk(self, clock: Clock | None = None) -> BatchDesk:
        return BatchDesk(
            BatchClient(OpenAIChat(**self.chat("m"))), self.records, FAST, clock=clock or Clock()
        )

    def run(self, llm: Any, shop: str = "a") -> dict[Any, Any]:
        try:
            session = Session(World(llm, SHOPS), self.cache, engine="local")
            return session.run(Reply.over(Ids), shop=shop).values(Reply)
        finally:
            aio.run(llm.aclose())

    def pending(self, llm: Any, shop: str = "a") -> str:
        with pytest.raises(AnswersPendingError) as stopped:
            self.run(llm, shop)
        return str(stopped.value)

    @property
    def records(self) -> BatchRecords:
        return BatchRecords(self.folder)

    def stages(self) -> list[str]:
        return [item.stage.value for item in self.records.all()]

    def answers(self, wanted: Callable[[str, str], tuple[int, Any] | None]) -> None:
        """The server answers calls of its batch API so, where `wanted` says anything."""
        served = type(self.server.batches).serve.__get__(self.server.batches)

        def serve(verb: str, path: str, *request: Any) -> tuple[int, Any]:
            return wanted(verb, path.partition("?")[0]) or served(verb, path, *request)

        self.server.batches.serve = serve  # type: ignore[assignment, method-assign]

    def as_always(self) -> None:
        self.answers(lambda verb, path: None)

    def killed_while_creating(self, llm: OpenAIBatch) -> None:
        """There is a batch, and nobody has written so down."""

        class Killed(BaseException):
            pass

        put = llm.desk.records.put

        def die(submission: Submission) -> None:
            if submission.stage is Stage.SUBMITTED:
                raise Killed
            put(submission)

        llm.desk.records.put = die  # type: ignore[method-assign]
        with pytest.raises(Killed):
            self.run(llm)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Shop]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as server:
        yield Shop(server, tmp_path)


@pytest.mark.parametrize("then", ["the list is refused", "the quota ends"])
def test_a_create_that_was_not_heard_of_is_not_forgotten_when_the_next_attempt_is_refused(
    shop: Shop, then: str
) -> None:
    posts: list[str] = []

    def lose(call: str) -> None:
        if call == "POST /batches":
            raise ConnectionError

    def refuse(verb: str, path: str) -> tuple[int, Any] | None:
        if path != "batches":
            return None
        posts.append(verb)
        if verb == "GET":  # the second: a list that is not up to date
            return NO_SCOPE if "list" in then else (200, {"object": "list", "data": [], "has_more": False})
        return NO_QUOTA if posts.count("POST") > 1 else None

    shop.server.batches.after = lose
    shop.answers(refuse)
    assert "may have made the batch" in shop.pending(shop.batch())
    assert (shop.stages(), len(shop.server.batches.batches)) == (["creating"], 1)
    shop.server.batches.after, shop.server.batches.polls = lambda call: None, 0
    shop.as_always()
    assert shop.run(shop.batch()) == A
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 1}


def test_a_create_that_was_refused_is_over_at_once(shop: Shop) -> None:
    """At the first attempt, or after others that were refused: there is no batch."""
    posts: list[str] = []

    def refuse(verb: str, path: str) -> tuple[int, Any] | None:
        if (verb, path) != ("POST", "batches"):
            return None
        posts.append(verb)
        return NO_QUOTA if len(posts) > 1 else (429, {"error": {"message": "slowly"}})

    shop.answers(refuse)
    with pytest.raises(BudgetError, match="no quota left"):
        shop.run(shop.batch())
    assert (len(posts), shop.stages()) == (2, ["done"]), "its file is removed later"
    shop.as_always()
    shop.pending(shop.batch())
    assert shop.stages() == ["submitted"]


@pytest.mark.parametrize(("refusal", "error"), [(NO_SCOPE, ContextError), (NO_QUOTA, BudgetError)])
def test_a_list_that_is_refused_ends_only_runs_of_the_model_whose_batch_may_be_there(
    shop: Shop,
    refusal: tuple[int, Any],
    error: type[FeaturekitError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop.killed_while_creating(shop.batch())
    shop.answers(lambda verb, path: refusal if (verb, path) == ("GET", "batches") else None)
    assert shop.run(shop.online("other"), "b") == B
    assert "was made, only its list tells" in caplog.text
    with pytest.raises(error, match="was made, only its list tells"):
        shop.run(shop.batch())
    assert shop.stages() == ["creating"]
    shop.as_always()
    shop.server.batches.polls = 0
    assert shop.run(shop.batch()) == A
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 1}


def test_a_batch_that_is_refused_for_want_of_quota_ends_only_runs_of_its_model(shop: Shop) -> None:
    shop.pending(shop.batch())
    shop.answers(lambda verb, path: NO_QUOTA if path == "batches/batch_1" else None)
    assert shop.run(shop.online("other"), "b") == B
    with pytest.raises(BudgetError):
        shop.run(shop.batch())
    assert shop.stages() == ["submitted"]


def test_a_hand_in_that_goes_on_is_left_alone_where_nothing_locks(shop: Shop) -> None:
    """Another merchant's run, online and of another model, reads what is there before the batch is made, and does
    what is to be done about it afterwards."""
    shop.folder = Remote(shop.folder.uri)
    Path(shop.folder.uri).mkdir(parents=True)
    llm, other = shop.batch(), shop.desk()
    put, there = llm.desk.records.put, []

    def meanwhile(submission: Submission) -> None:
        put(submission)
        if submission.stage is Stage.INTENDED:
            there.extend(other.records.all())
            assert "being handed in" in shop.pending(shop.online(), "b")
            assert shop.server.prompts == ["desk"], "the sofa is on its way"

    llm.desk.records.put = meanwhile  # type: ignore[method-assign]
    shop.pending(llm)
    assert [item.stage for item in there] == [Stage.INTENDED]
    other.records.all = lambda: there  # type: ignore[method-assign]
    late = Clock(wall=lambda: time.time() + 4_000)
    for clock in (Clock(), late):
        other.clock = clock
        other.look("other")
        assert shop.stages() == ["submitted"]
    aio.run(other.client.chat.aclose())
    shop.server.batches.polls = 0
    assert shop.run(shop.batch()) == A
    assert Counter(shop.server.batches.prompts) == {"red lamp": 1, "sofa": 1}


def test_a_hand_in_that_was_broken_off_is_over_after_an_hour_where_nothing_locks(shop: Shop) -> None:
    shop.folder = Remote(shop.folder.uri)
    Path(shop.folder.uri).mkdir(parents=True)
    intended = Submission("t", "openai:m", "killed", Stage.INTENDED, time.time(), requests=1)
    shop.records.intend(intended, b'{"custom_id": "c", "body": {"messages": [{"content": "q"}]}}\n')
    desk = shop.desk()
    assert desk.look("run") == [intended]
    assert desk.says == {"t": "t (being handed in)"}
    desk.clock = Clock(wall=lambda: time.time() + 3_601)
    assert (desk.look("run"), shop.stages()) == ([], [])
    aio.run(desk.client.chat.aclose())


def test_what_was_broken_off_is_not_on_its_way_where_runs_lock(shop: Shop) -> None:
    intended = Submission("t", "openai:m", "killed", Stage.INTENDED, time.time(), requests=1)
    shop.records.intend(intended, b"")
    assert shop.records.on_the_way() == []
    assert BatchRecords(Remote(shop.folder.uri)).on_the_way() == [intended]


def test_a_provider_that_is_down_is_asked_once_by_runs_that_need_nothing_of_it(shop: Shop) -> None:
    assert shop.run(shop.online()) == A
    shop.server.batches.polls = 1_000
    for name in ("x1", "x2", "x3"):
        shop.pending(shop.batch(name), "b")
    asked: list[str] = []

    def down(verb: str, path: str) -> tuple[int, Any]:
        asked.append(f"{verb} {path}")
        return DOWN

    shop.answers(down)
    assert shop.run(shop.online()) == A
    assert len(asked) == 1, asked
    asked.clear()
    shop.pending(shop.batch("x2"), "b")
    assert len(asked) == 3 and len(set(asked)) == 1, "it needs one, and asks for that one alone"
    assert shop.stages() == ["submitted"] * 3


def test_a_batch_that_can_never_be_asked_for_keeps_no_other_from_being_collected(shop: Shop) -> None:
    for name in ("x1", "x2"):
        shop.pending(shop.batch(name), "b")
    shop.server.batches.polls = 0
    shop.answers(lambda verb, path: DOWN if path == "batches/batch_1" else None)
    desk = shop.desk()
    for _ in range(30):  # by chance
        desk.look("run")
    assert sorted(shop.stages()) == ["answered", "submitted"]
    aio.run(desk.client.chat.aclose())


def test_a_list_that_always_fails_keeps_no_batch_that_is_known_from_being_collected(shop: Shop) -> None:
    shop.killed_while_creating(shop.batch())
    shop.server.batches.polls = 0
    shop.answers(lambda verb, path: DOWN if (verb, path) == ("GET", "batches") else None)
    shop.pending(shop.batch("other"), "b")
    assert shop.run(shop.batch("other"), "b") == B
    assert shop.stages() == ["creating"]
