"""What attempts cost that led to no answer: carried to the entry, the run's record and `featurekit cost`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pydantic import BaseModel
from typer.testing import CliRunner

from featurekit_spark import Context, aio
from featurekit_spark.builder import Metered
from featurekit_spark.cache.base import ENTRY_SCHEMA, LATER_COLUMNS
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.journal import Journal
from featurekit_spark.cli import app
from featurekit_spark.errors import BuildError, FeaturekitError, ServiceError
from featurekit_spark.llm import LLMCompletion, OpenAIChat, StructuredCompletion
from featurekit_spark.llm.base import Completion
from featurekit_spark.paid.cost import Cost
from featurekit_spark.paid.prices import Price
from featurekit_spark.report.cost import paid_lots, summed
from featurekit_spark.results import Counts
from featurekit_spark.testing.chat import ChatServer, chat_reply, chat_server
from tests.batch_shop import Ids as ShopIds
from tests.batch_shop import Reply, World
from tests.letter_shop import Desk, older, run

PRICE = Price.of(3_000_000, 2_000_000)  # 7 and 3 tokens are 27 usd
NO_TEXT = chat_reply(None)
NO_CHOICES = {"error": "busy", "usage": {"prompt_tokens": 5, "completion_tokens": 0}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    monkeypatch.setattr("featurekit_spark.paid.retry.RetryPolicy.wait", lambda *_: 0.0)
    with chat_server(str.upper) as chat:
        yield chat


def model(server: ChatServer, **options: Any) -> OpenAIChat:
    return OpenAIChat(server.url, "m", api_key_env="TEST_CHAT_KEY", price=PRICE, **options)


def built(
    server: ChatServer, prompt: str = "why", builder: Any = LLMCompletion, **options: Any
) -> Metered[Any]:
    chat = model(server, **options)

    async def asked() -> Metered[Any]:
        made, context = builder(), Context(llm=chat)
        try:
            return await made.build_one({"prompt": prompt}, made.default_config(context), context)  # type: ignore[no-any-return]
        finally:
            await chat.aclose()

    return aio.run(asked())


def failed(server: ChatServer, **options: Any) -> FeaturekitError:
    with pytest.raises(FeaturekitError) as error:
        built(server, **options)
    return error.value


def test_an_answer_has_the_cost_of_the_attempts_before_it(server: ChatServer) -> None:
    server.then(200, NO_TEXT).fails(500).then(200, NO_CHOICES)
    assert built(server) == Metered("WHY", 25, 27.0 + 27.0 + 15.0, 0, 4)
    assert built(server) == Metered("WHY", 10, 27.0, 0, 1)


def test_what_nobody_reported_for_an_attempt_is_not_made_up(server: ChatServer) -> None:
    silent = {name: value for name, value in NO_TEXT.items() if name != "usage"}
    server.then(200, silent).then(200, b"no json")
    assert built(server) == Metered("WHY", 10, 27.0, 0, 3)


def test_an_error_has_the_cost_of_all_its_attempts(server: ChatServer) -> None:
    server.then(200, NO_TEXT).then(200, NO_CHOICES).then(200, NO_TEXT)
    error = failed(server, attempts=3)
    assert isinstance(error, ServiceError)
    assert (error.attempts, error.tokens, error.usd) == (3, 25, 69.0)


def test_a_refusal_that_was_counted_here_says_so(server: ChatServer) -> None:
    refusal = chat_reply(None, refusal="I will not")
    del refusal["usage"]
    server.then(200, refusal)
    error = failed(server)
    assert isinstance(error, BuildError) and error.estimated_tokens == error.tokens
    assert (error.tokens or 0) > 0


def test_an_answer_that_was_cut_off_has_its_attempts(server: ChatServer) -> None:
    server.then(200, NO_TEXT).then(200, chat_reply("lon", finish_reason="length"))
    error = failed(server)
    assert (error.attempts, error.tokens, error.usd) == (2, 20, 54.0)


class Mood(BaseModel):
    mood: Literal["calm", "loud"]


class Verdict(StructuredCompletion):
    response = Mood


def test_a_repair_adds_up(server: ChatServer) -> None:
    server.then(200, NO_TEXT).then(200, chat_reply('{"mood": "red"}')).fails(500)
    server.then(200, chat_reply('{"mood": "calm"}'))
    assert built(server, builder=Verdict) == Metered({"mood": "calm"}, 30, 81.0, 0, 4)
    server.then(200, chat_reply("red")).then(200, NO_TEXT).then(200, chat_reply("blue"))
    error = failed(server, builder=Verdict)
    assert (error.attempts, error.tokens, error.usd) == (3, 30, 81.0)
    server.then(200, chat_reply("red")).fails(400)
    error = failed(server, builder=Verdict)
    assert (error.attempts, error.tokens, error.usd) == (2, 10, 27.0)


def test_of_a_model_without_a_price_only_tokens_are_known() -> None:
    assert Completion("a", 3, 4, lost=Cost(2, None)).cost == Cost(9, None)
    assert Completion("a", 3, 4, 1.0, counted_by="estimate", lost=Cost(2, 0.5, 1)).cost == Cost(9, 1.5, 8)


def shop_run(server: ChatServer, cache: DeltaCache) -> Counts:
    from featurekit_spark.session import Session

    chat = model(server, concurrency=1)
    try:
        prompts = {"a": {"p1": "red lamp", "p2": "sofa"}}
        ran = Session(World(chat, prompts), cache, engine="local").run(Reply.over(ShopIds), shop="a")
    finally:
        aio.run(chat.aclose())
    return ran.builders["LLMCompletion"]


def test_entries_runs_and_sums_count_attempts(server: ChatServer, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    server.then(200, NO_TEXT).fails(500)
    counts = shop_run(server, cache)
    assert (counts.calls, counts.attempts, counts.failed_attempts) == (2, 4, 2)
    assert (counts.tokens, counts.usd) == (30, 81.0)
    rows = cache.history("LLMCompletion").to_pylist()
    assert sorted(row["attempts"] for row in rows) == [1, 3]
    assert {row["estimated_tokens"] for row in rows} == {None}
    (record,) = cache.runs('["a"]')
    told = record.record["builders"]["LLMCompletion"]
    assert (told["attempts"], told["failed_attempts"]) == (4, 2)
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.failed, total.attempts, total.failed_attempts) == (2, 0, 4, 2)
    cost = ["cost", "--path", cache.path]
    lines = CliRunner().invoke(app, cost).stdout.splitlines()
    assert "failed attempts" in lines[0] and "2 of 4 attempts led to no answer" in lines[2]
    facts = json.loads(CliRunner().invoke(app, [*cost, "--output", "json"]).stdout)
    assert (facts["total"]["attempts"], facts["total"]["failed_attempts"]) == (4, 2)


def test_a_refused_call_counts_as_a_failed_attempt(server: ChatServer, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    refusal = chat_reply(None, refusal="I will not")
    del refusal["usage"]
    server.fails(500).then(200, refusal)
    counts = shop_run(server, cache)
    assert (counts.calls, counts.terminal, counts.attempts, counts.failed_attempts) == (2, 1, 3, 2)
    assert counts.estimated_tokens == counts.tokens - 10 > 0
    (row,) = [row for row in cache.history("LLMCompletion").to_pylist() if row["status"] == "error"]
    assert (row["attempts"], row["estimated_tokens"]) == (2, row["tokens"])
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.failed, total.attempts, total.failed_attempts) == (2, 1, 3, 2)
    assert total.estimated_tokens == counts.estimated_tokens


def test_a_cache_of_before_is_read_and_widened(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    run(cache, Desk(refused=frozenset({"write to Ada"})))
    older(cache)
    cache = DeltaCache(cache.path)
    names = [field.name for field in DeltaTable(cache.table_path("entries")).schema().fields]
    assert not set(names) & set(LATER_COLUMNS)
    before = cache.history("Ask")
    assert before.schema.equals(ENTRY_SCHEMA) and before["attempts"].null_count == len(before) == 3
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.failed, total.attempts, total.failed_attempts) == (3, 1, 4, 2), (
        "the error's text"
    )

    desk = Desk(names={"p9": "Barbara"})
    assert run(cache, desk).builders["Ask"].calls == 1
    names = [field.name for field in DeltaTable(cache.table_path("entries")).schema().fields]
    assert set(LATER_COLUMNS) <= set(names)
    protocol = DeltaTable(cache.table_path("entries")).protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    assert sorted(map(str, cache.history("Ask")["attempts"].to_pylist())) == ["1", "None", "None", "None"]
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.attempts) == (4, 5)
    assert run(cache, Desk()).builders["Ask"].calls == 0, "what was answered before is answered"


def test_a_journal_keeps_what_was_counted_and_one_of_before_is_read(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    run(cache, Desk())
    rows = cache.history("Ask").drop(["recorded"])
    journal = Journal(Folder(str(tmp_path / "journal")), "r")
    journal.add(rows)
    ids = {entry: entry for entry in rows["entry_id"].to_pylist()}
    found = Journal(Folder(str(tmp_path / "journal")), "r").find("Ask", ids)
    assert sorted(entry.estimated_tokens or 0 for entry in found.values()) == [0, 0, 7]
    assert sorted(entry.attempts or 0 for entry in found.values()) == [1, 1, 3]

    old = Journal(Folder(str(tmp_path / "journal")), "old")
    old.begin()
    body = rows.drop(list(LATER_COLUMNS))
    with (
        pa.OSFile(str(tmp_path / "journal" / "old" / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, body.schema) as writer,
    ):
        writer.write_table(body)
    found = Journal(Folder(str(tmp_path / "journal")), "old").find("Ask", ids)
    assert len(found) == 3 and {entry.attempts for entry in found.values()} == {None}
