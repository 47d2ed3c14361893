"""`featurekit cost`, and what prices do to plans, limits and runs, against a model on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from featurekit_spark.cli import app
from featurekit_spark.testing.chat import ChatServer, chat_reply, chat_server, offline_answer
from tests.unit.cli.conftest import TITLES

Workplace = Any
Cost = Callable[..., dict[str, Any]]
PRICE = ("--set", "llm.price={input: 100, output: 1000}")
EACH = (7 * 100 + 3 * 1000) / 1e6  # the server counts 7 and 3 tokens


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    with chat_server(offline_answer) as chat:
        yield chat


@pytest.fixture
def model(server: ChatServer) -> tuple[str, ...]:
    settings = {"provider": "openai", "base_url": server.url, "model": "m"}
    return tuple(part for name, value in settings.items() for part in ("--set", f"llm.{name}={value}"))


@pytest.fixture
def cost(workplace: Workplace) -> Cost:
    def call(*options: str, code: int = 0) -> dict[str, Any]:
        where = ("--set", f"warehouse={workplace.warehouse}")
        done = CliRunner().invoke(app, ["cost", *options, *where, "--output", "json"])
        assert done.exit_code == code, done.output + done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    return call


def text(workplace: Workplace, *options: str) -> list[str]:
    done = CliRunner().invoke(app, ["cost", *options, "--set", f"warehouse={workplace.warehouse}"])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_what_answers_cost_is_told_by_what_one_likes(
    workplace: Workplace, server: ChatServer, model: tuple[str, ...], cost: Cost
) -> None:
    workplace.catalog({"q1": "garden chair", "q2": "sun shade"}, merchant="buy", market="NO")
    ran = workplace.run(*model, *PRICE)
    assert ran.summary["builders"]["LLMCompletion"]["usd"] == pytest.approx(6 * EACH)
    assert ran.summary["warnings"] == []
    workplace.run(*model, "--set", "llm.price={input: 1, output: 1}", merchant="buy", market="NO")

    found = cost("--by", "merchant,model")
    assert [(row["merchant"], row["model"], row["calls"], row["tokens"]) for row in found["rows"]] == [
        ("abt", f"openai:m@{server.url}", 6, 60),
        ("buy", f"openai:m@{server.url}", 2, 20),
    ]
    assert [row["usd"] for row in found["rows"]] == pytest.approx([6 * EACH, 2 * 10 / 1e6])
    assert (found["total"]["calls"], found["total"]["failed"], found["total"]["unpriced"]) == (8, 0, 0)
    today = datetime.now(UTC).date()
    assert [row["day"] for row in cost("--by", "day")["rows"]] == [today.isoformat()]
    assert cost("--by", "builder", "--since", str(today))["rows"][0]["builder"] == "LLMCompletion"
    assert cost("--until", str(today - timedelta(days=1)))["total"]["calls"] == 0
    assert text(workplace, "--until", "2026-01-01") == ["nothing was paid for"]
    lines = text(workplace, "--by", "merchant")
    assert lines[0].split() == ["merchant", "calls", "failed", "tokens", "usd", "seconds"]
    assert [line.split()[:5] for line in lines[1:]] == [
        ["abt", "6", "0", "60", "0.0222"],
        ["buy", "2", "0", "20", "0.0000"],
        ["total", "8", "0", "80", "0.0222"],
    ]


def test_a_price_that_nobody_knows_is_unknown_and_said_once_per_run(
    workplace: Workplace, model: tuple[str, ...], cost: Cost
) -> None:
    ran = workplace.run(*model)
    assert ran.summary["builders"]["LLMCompletion"]["usd"] is None
    assert ran.err.count("LLMCompletion made 6 calls whose price is not known") == 1
    again = workplace.run(*model)
    assert again.summary["unchanged"] and "price" not in again.err

    (row,) = cost()["rows"]
    assert (row["usd"], row["unpriced"], row["tokens"]) == (None, 6, 60)
    lines = text(workplace)
    assert "unknown" in lines[1] and "no answer carries a price" in lines[-1]
    workplace.catalog({**TITLES, "p7": "floor lamp"})
    workplace.run(*model, *PRICE)
    (row,) = cost()["rows"]
    assert (row["calls"], row["unpriced"], row["usd"]) == (7, 6, pytest.approx(EACH))
    lines = text(workplace)
    assert "0.0037+" in lines[1] and "what 6 calls of 7 cost, whose price nobody knows" in lines[-1]


def test_failed_attempts_are_counted(
    workplace: Workplace, server: ChatServer, model: tuple[str, ...], cost: Cost
) -> None:
    server.fails(400)
    ran = workplace.run(*model, *PRICE)
    assert ran.code == 5
    usd = ran.summary["builders"]["LLMCompletion"]["usd"]
    assert usd == pytest.approx(5 * EACH)  # what the answers cost; the failed call is told beside it
    (row,) = cost()["rows"]
    assert (row["calls"], row["failed"], row["unpriced"], row["usd"]) == (6, 1, 1, pytest.approx(5 * EACH))
    assert "(1 of all failed)" in text(workplace)[-1]
    server.then(200, chat_reply(None, refusal="I will not"))
    workplace.catalog({**TITLES, "p7": "floor lamp"})  # what was refused before is not asked again
    assert workplace.run(*model, *PRICE).code == 5
    (row,) = cost()["rows"]  # a refusal is an answer that was paid for
    assert (row["calls"], row["failed"], row["unpriced"], row["tokens"]) == (7, 2, 1, 60)
    assert row["usd"] == pytest.approx(6 * EACH)


def test_runs_that_ended_early_are_their_merchants_all_the_same(
    workplace: Workplace, server: ChatServer, model: tuple[str, ...], cost: Cost
) -> None:
    for _ in range(2):
        server.then(200, chat_reply("1. a lamp"))
    for _ in range(4):
        server.fails(429, "insufficient_quota")
    assert workplace.run(*model, *PRICE, "--set", "llm.concurrency=1").code == 6
    assert cost("--by", "merchant")["rows"][0]["calls"] >= 2
    server.script.clear()
    stopped = workplace.run(*model, *PRICE, "--max-calls", "2", market="US")
    assert stopped.code == 75
    rows = cost("--by", "merchant")["rows"]
    assert [row["merchant"] for row in rows] == ["abt"]
    path = ("--path", str(workplace.warehouse / "cache"))
    done = CliRunner().invoke(app, ["cost", "--by", "merchant", *path, "--output", "json"])
    assert {row["merchant"] for row in json.loads(done.stdout)["rows"]} == {"abt"}  # their records say so


def test_what_was_taken_out_of_the_cache_was_paid_for(
    workplace: Workplace, model: tuple[str, ...], cost: Cost
) -> None:
    workplace.run(*model, *PRICE)
    before = cost("--by", "builder,merchant,model,day")
    cache = ("--path", str(workplace.warehouse / "cache"))
    done = CliRunner().invoke(app, ["invalidate", "LLMCompletion", "--all", "--reason", "test", *cache])
    assert done.exit_code == 0, done.output + done.stderr
    after = cost("--by", "builder,merchant,model,day")
    assert after["total"]["removed"] == 6 and before["total"]["removed"] == 0
    assert after["total"]["usd"] == pytest.approx(before["total"]["usd"])
    assert {**after["rows"][0], "removed": 0, "usd": 0, "seconds": 0} == {
        **before["rows"][0],
        "removed": 0,
        "usd": 0,
        "seconds": 0,
    }
    assert "6 calls among them only by records of runs" in text(workplace)[-1]


def test_a_plan_without_entries_is_told_by_prompts_and_prices(
    workplace: Workplace, server: ChatServer, model: tuple[str, ...]
) -> None:
    options = (*model, *PRICE, "--set", "llm.answer_tokens=3")
    said = workplace.run("--dry-run", *options).summary
    completion = said["builders"]["LLMCompletion"]
    assert server.requests == []
    assert completion["expected"] and completion["calls"] == 6
    assert completion["usd"] == pytest.approx((completion["tokens"] - 18) * 100 / 1e6 + 18 * 1000 / 1e6)
    longest = workplace.run("--dry-run", *model, *PRICE).summary["builders"]["LLMCompletion"]
    assert longest["tokens"] - completion["tokens"] == 6 * (512 - 3)
    shown = workplace.run("--dry-run", *options, output="text").out
    assert f"6 paid calls (about {completion['tokens']} tokens, " in shown
    assert f"*{completion['tokens']}" in shown and "  *: expected, by the prompts' tokens" in shown

    workplace.run(*options)
    workplace.catalog({**TITLES, "p7": "floor lamp"})
    known = workplace.run("--dry-run", *options).summary["builders"]["LLMCompletion"]
    assert (known["expected"], known["calls"], known["tokens"]) == (False, 1, 10)
    assert known["usd"] == pytest.approx(EACH)
    other = workplace.run("--dry-run", *options, "--set", "llm.model=n").summary["builders"]["LLMCompletion"]
    assert other["expected"] and other["calls"] == 7  # another model has other prices


def test_a_limit_in_usd_needs_a_price_before_any_call(
    workplace: Workplace, server: ChatServer, model: tuple[str, ...]
) -> None:
    refused = workplace.run(*model, "--max-usd", "5")
    assert refused.code == 3 and "carry no price" in refused.err
    assert server.requests == []
    workplace.run(*model, "--max-calls", "2")  # entries without a price
    assert workplace.run(*model, *PRICE, "--max-usd", str(2.5 * EACH)).code == 75
    assert len(server.requests) == 2 + 2
    assert workplace.run(*model, *PRICE, "--max-usd", "5").code == 0


def test_prices_come_from_a_file(
    workplace: Workplace, model: tuple[str, ...], tmp_path: Path, cost: Cost
) -> None:
    prices = tmp_path / "prices.yaml"
    yesterday, tomorrow = (date.today() + timedelta(days=days) for days in (-2, 2))
    prices.write_text(
        f"models:\n  m*:\n    - {{from: {yesterday}, input: 100, output: 1000}}\n"
        f"    - {{from: {tomorrow}, input: 0, output: 0}}\n"
    )
    ran = workplace.run(*model, "--set", f"llm.prices={prices}", "--run-date", "2020-01-01")
    assert ran.summary["builders"]["LLMCompletion"]["usd"] == pytest.approx(6 * EACH)  # paid today
    missing = workplace.run(*model, "--set", "llm.prices=nowhere.yaml")
    assert missing.code == 3 and "llm.prices: 'nowhere.yaml' is no file" in missing.err


def test_an_answer_without_usage_is_counted_here_and_that_is_said_once(
    workplace: Workplace,
    server: ChatServer,
    model: tuple[str, ...],
    cost: Cost,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(6):
        server.then(200, {**chat_reply("1. a lamp"), "usage": None})
    assert workplace.run(*model, *PRICE).code == 0
    (row,) = cost()["rows"]
    assert row["tokens"] > 6 * 10 and row["usd"] > 0
    said = [record.getMessage() for record in caplog.records if "reports no usage" in record.getMessage()]
    assert len(said) == 1 and "tokens are counted by a rule of thumb, an estimate" in said[0]


def test_what_it_cannot_be_grouped_by(workplace: Workplace, cost: Cost) -> None:
    workplace.run()
    assert "'week'. Known: builder, day, merchant, model" in cost("--by", "week", code=2)["error"]
    assert "is after" in cost("--since", "2026-02-01", "--until", "2026-01-31", code=2)["error"]
    assert "named twice" in cost("--by", "day,day", code=2)["error"]
    assert CliRunner().invoke(app, ["cost", "--since", "yesterday"]).exit_code == 2
    (row,) = cost()["rows"]
    assert row["usd"] == 0.0 and row["unpriced"] == 0  # the stand-in costs nothing, and that is known
