"""`featurekit cost` tells of batches whose answers are still to come, by the group that asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.rows import run_records
from featurekit_spark.cli import app
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.report.on_the_way import batches_folder, on_the_way
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import model, run

SHOPS = {"a": {"p1": "red lamp", "p2": "sofa", "p3": "red lamp"}, "b": {"p1": "desk"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as chat:
        chat.batches.polls = 100
        yield chat


def hand_in(server: ChatServer, cache: DeltaCache, shop: str) -> None:
    with pytest.raises(AnswersPendingError):
        run(cache, model(server.url, batches_folder(cache.path)), SHOPS, shop)


def cost(cache: DeltaCache) -> tuple[list[dict[str, Any]], list[str]]:
    call = ["cost", "--path", cache.path]
    facts = json.loads(CliRunner().invoke(app, [*call, "--output", "json"]).stdout)
    return facts["on_the_way"], CliRunner().invoke(app, call).stdout.splitlines()


def test_what_is_handed_in_is_told_until_it_is_taken_in(server: ChatServer, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    hand_in(server, cache, "a")
    hand_in(server, cache, "b")
    facts, lines = cost(cache)
    name = f"openai:m@{server.url}"
    told = [(one["group"], one["model"], one["batches"], one["calls"], one["answered"]) for one in facts]
    assert told == [(["a"], name, 1, 2, 0), (["b"], name, 1, 1, 0)]
    assert lines[0] == "nothing was paid for"
    assert lines[1].startswith(f"on the way for a, not counted yet: 2 calls of {name} in 1 batch, since 20")

    server.batches.polls = 0
    run(cache, model(server.url, batches_folder(cache.path)), SHOPS, "a")
    facts, lines = cost(cache)
    assert [one["group"] for one in facts] in ([], [["b"]])
    assert lines[1].split()[:2] == ["LLMCompletion", name]


def test_stages_and_what_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    folder.mkdir()

    def record(tag: str, stage: str, requests: int, answers: int = 0) -> None:
        told = {"identity": "openai:m@redis://me:hush@h", "run_id": "r", "stage": stage, "at": 1.0}
        (folder / f"{tag}.json").write_text(json.dumps(told))
        (folder / f"{tag}.requests.jsonl").write_text("{}\n" * requests)
        if answers:
            (folder / f"{tag}.answers.jsonl").write_text("{}\n" * answers)

    record("one", "submitted", 5)
    record("two", "creating", 3)
    record("three", "answered", 9, answers=4)
    record("four", "intended", 100)
    record("five", "unheard of", 100)
    (folder / "six.json").write_text("{")
    (found,) = on_the_way(str(folder), [])
    assert (found.group, found.batches, found.calls, found.answered) == (None, 3, 12, 4)
    assert "hush" not in found.model
    assert on_the_way(str(tmp_path / "none"), run_records(DeltaCache(str(tmp_path / "cache")))) == []
