"""`featurekit batches`, and what runs and plans say of calls on their way, against a provider on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from featurekit_spark.cli import app
from featurekit_spark.testing.chat import ChatServer, chat_server, offline_answer
from tests.unit.cli.conftest import Ran

Workplace = Any
Featurekit = Callable[..., Ran]
BATCH = ("--set", "llm.mode=batch")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    with chat_server(offline_answer) as chat:
        yield chat


@pytest.fixture
def featurekit(workplace: Workplace, server: ChatServer, capfd: pytest.CaptureFixture[str]) -> Featurekit:
    llm = {"provider": "openai", "base_url": server.url, "model": "m", "price": "{input: 1, output: 1}"}

    def call(command: str, *options: str, output: str = "json", group: bool = True) -> Ran:
        capfd.readouterr()
        given = [
            *command.split(),
            *(("--merchant", "abt", "--market", "US") if group else ()),
            *("--output", output, "--set", f"warehouse={workplace.warehouse}"),
            *("--set", f"product_db.path={workplace.catalogs}", "--set", "engine.kind=local"),
            *(part for name, value in llm.items() for part in ("--set", f"llm.{name}={value}")),
            *options,
        ]
        with pytest.raises(SystemExit) as done:
            app(given, prog_name="featurekit")
        return Ran(int(done.value.code or 0), *capfd.readouterr())

    return call


def test_what_is_on_its_way_is_listed_and_collected(featurekit: Featurekit, server: ChatServer) -> None:
    assert featurekit("batches list", output="text", group=False).out == "no calls are on their way\n"
    assert featurekit("run", *BATCH).code == 75
    (batch,) = featurekit("batches list", group=False).summary["batches"]
    assert (batch["batch"], batch["stage"], batch["requests"], batch["builders"]) == (
        "batch_1",
        "submitted",
        6,
        ["LLMCompletion"],
    )
    assert batch["state"].startswith("in_progress, 0 of 6 done, until ")
    text = featurekit("batches list", output="text").out
    assert "batch_1" in text and "completed, 6 of 6 done" in text and "openai:m@" in text
    collected = featurekit("batches collect", "--set", "llm.model=another", group=False)
    assert (collected.code, collected.summary["entries"], collected.summary["on_the_way"]) == (0, 6, [])
    assert server.batches.files == {}
    assert featurekit("batches collect", output="text").out == "nothing came that was not taken in before\n"
    ran = featurekit("run")
    assert (ran.code, ran.calls, server.requests) == (0, 0, [])


def test_an_online_run_says_what_it_waits_for_and_what_to_do(
    featurekit: Featurekit, server: ChatServer
) -> None:
    server.batches.polls = 1_000
    featurekit("run", *BATCH)
    planned = featurekit("plan")
    assert planned.summary["calls"] == 0
    assert planned.summary["builders"]["LLMCompletion"]["pending"] == 6
    assert "warning: there are 6 calls on the way by batch, and a run waits" in planned.err
    waiting = featurekit("run")
    assert (waiting.code, waiting.summary["status"]) == (75, "stopped")
    assert "6 answers of openai:m@" in waiting.err and "--set llm.pending=pay" in waiting.err
    assert server.requests == []
    pay = ("--set", "llm.pending=pay")
    assert "would pay for them again" in featurekit("plan", *pay).err
    paid = featurekit("run", *pay)
    assert (paid.code, paid.calls) == (0, 6)
    assert "6 calls were paid for twice" in paid.err
    server.batches.polls = 0
    assert featurekit("batches collect").summary["entries"] == 6
    assert featurekit("cost").summary["total"]["calls"] == 12, "all that was paid for"
    assert featurekit("run").calls == 0


def test_a_batch_is_cancelled_by_name(featurekit: Featurekit, server: ChatServer) -> None:
    server.batches.polls = 1_000
    featurekit("run", *BATCH)
    assert featurekit("batches cancel").code == 2
    unknown = featurekit("batches cancel batch_7")
    assert unknown.code == 2 and "'batch_7' is no batch that is on its way. Known: batch_1." in unknown.err
    dry = featurekit("batches cancel batch_1", "--dry-run").summary["batches"]
    assert "would be cancelled, 6 requests of openai:m@" in dry[0]["said"]
    assert server.batches.batches["batch_1"]["status"] == "validating"
    told = featurekit("batches cancel --all").summary["batches"]
    assert [one["cancelled"] for one in told] == [True]
    collected = featurekit("batches collect", output="text")
    assert "6 entries from 1 batch taken in" in collected.out, "errors of their keys"
    server.batches.polls = 0
    assert featurekit("run", *BATCH).code == 75
    assert featurekit("run", *BATCH).code == 0
    assert len(server.batches.prompts) == 12


def test_a_batch_that_the_provider_lost_is_forgotten_when_that_is_asked_for(
    featurekit: Featurekit, server: ChatServer
) -> None:
    featurekit("run", *BATCH)
    server.batches.batches.clear()
    listed = featurekit("batches list")
    assert listed.code == 0 and "warning: the batch API refused" in listed.err
    refused = featurekit("batches cancel batch_1")
    assert refused.code == 3 and "--forget" in refused.err
    assert "forgotten, 6 requests" in featurekit("batches cancel batch_1", "--forget", output="text").out
    assert featurekit("batches list").summary["batches"] == []


@pytest.mark.parametrize("refusal", [401, 403, 404, 405])
def test_a_refusal_forgets_no_batch(
    featurekit: Featurekit, server: ChatServer, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """Of a key that is wrong, or of an address at which nothing is."""
    featurekit("run", *BATCH)
    with monkeypatch.context() as patched:
        patched.setattr(
            server.batches, "serve", lambda *request: (refusal, {"error": {"message": "no", "code": ""}})
        )
        refused = featurekit("batches cancel --all", "--forget")
    assert refused.code == 3 and f"{refusal}" in refused.err and "gone for good" not in refused.err
    assert [one["stage"] for one in featurekit("batches list").summary["batches"]] == ["submitted"]
    featurekit("run", *BATCH)
    assert (featurekit("run", *BATCH).code, len(server.batches.prompts)) == (0, 6)


def test_a_batch_that_ended_before_it_is_cancelled_is_collected(
    featurekit: Featurekit, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = server.batches.serve

    def serve(verb: str, path: str, *request: Any) -> tuple[int, Any]:
        too_late = (400, {"error": {"message": "it is completed", "code": ""}})
        return too_late if path.endswith("/cancel") else served(verb, path, *request)

    monkeypatch.setattr(server.batches, "serve", serve)
    featurekit("run", *BATCH)
    refused = featurekit("batches cancel batch_1", "--forget")
    assert refused.code == 3 and "it is completed" in refused.err, (
        "it goes on, and the provider will not end it"
    )
    (told,) = featurekit("batches cancel batch_1", "--forget").summary["batches"]
    assert not told["cancelled"] and "had ended, and is collected as always" in told["said"]
    assert featurekit("batches collect").summary["entries"] == 6


def test_without_a_provider_batches_are_listed_and_not_asked_for(
    featurekit: Featurekit, server: ChatServer
) -> None:
    featurekit("run", *BATCH)
    offline = ("--set", "llm.provider=offline")
    calls = len(server.batches.calls)
    (batch,) = featurekit("batches list", *offline).summary["batches"]
    assert batch["state"] == "on its way"
    refused = featurekit("batches collect", *offline)
    assert refused.code == 2 and "name no provider" in refused.err
    assert len(server.batches.calls) == calls
    assert featurekit("batches list", "--set", "cache.kind=memory").code == 2


def test_purge_and_retain_say_what_is_on_its_way(featurekit: Featurekit) -> None:
    featurekit("run", *BATCH)
    told = featurekit("cache purge", "--key", "abt/US/p1", "--reason", "asked", "--dry-run", output="text")
    assert "1 batch of calls on the way" in told.out + told.err
    retain = ("--hash", "prompts", "--after", "1d")
    kept = featurekit("cache retain", *retain, output="text")
    assert (kept.code, "1 batch of calls on the way: prompts are kept" in kept.out) == (0, True)
    assert featurekit("batches collect").summary["entries"] == 0, "it is on its way"
    assert featurekit("batches collect").summary["entries"] == 6
    assert featurekit("cache retain", *retain).summary["batches_on_their_way"] == 0
