"""`featurekit retry`, and what runs and plans say of failed paid calls, against a model on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from featurekit_spark.cli import app
from featurekit_spark.testing.chat import chat_reply, offline_answer
from featurekit_spark.testing.loopback import JsonHandler, served
from tests.unit.cli.conftest import Ran

Workplace = Any
Featurekit = Callable[..., Ran]


@dataclass
class Model:
    """A model that refuses some prompts and is too busy for others."""

    url: str = ""
    refuses: str = "-"
    busy_for: str = "-"
    quota: bool = True
    prompts: list[str] = field(default_factory=list)

    def answer(self, prompt: str) -> tuple[int, dict[str, Any]]:
        self.prompts.append(prompt)
        if not self.quota:
            return 429, {"error": {"code": "insufficient_quota", "message": "pay first"}}
        if self.refuses in prompt:
            return 200, chat_reply(None, refusal="I would rather not")
        if self.busy_for in prompt:
            return 503, {"error": {"message": "too busy"}}
        return 200, chat_reply(offline_answer(prompt))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    own = Model()

    class Handler(JsonHandler):
        def do_POST(self) -> None:
            status, body = own.answer(self.body()["messages"][-1]["content"])
            self.reply(status, {}, body)

    with served(Handler) as url:
        own.url = f"{url}/v1"
        yield own


@pytest.fixture
def featurekit(workplace: Workplace, model: Model, capfd: pytest.CaptureFixture[str]) -> Featurekit:
    llm = {"provider": "openai", "base_url": model.url, "model": "m", "attempts": "2"}

    def call(command: str, *options: str, output: str = "json") -> Ran:
        capfd.readouterr()
        arguments = [
            *(command, "--merchant", "abt", "--market", "US", "--engine", "local", "--output", output),
            *("--set", f"product_db.path={workplace.catalogs}", "--set", f"warehouse={workplace.warehouse}"),
            *(part for name, value in llm.items() for part in ("--set", f"llm.{name}={value}")),
            *options,
        ]
        with pytest.raises(SystemExit) as done:
            app(arguments, prog_name="featurekit")
        return Ran(int(done.value.code or 0), *capfd.readouterr())

    return call


NONE = {"retryable": 0, "terminal": 0, "quota": 0, "remembered": 0}


def test_errors_are_told_apart_and_asked_again_on_demand(featurekit: Featurekit, model: Model) -> None:
    model.refuses, model.busy_for = "espresso", "green"
    first = featurekit("run")
    assert (first.code, first.calls) == (5, 6)
    assert first.summary["failures"] == {**NONE, "retryable": 1, "terminal": 2}
    assert first.summary["builders"]["LLMCompletion"]["failures"] == first.summary["failures"]
    assert "failures" not in first.summary["builders"]["LLMLogic"]

    listed = featurekit("retry", "--errors", "all", "--dry-run").summary
    assert (listed["status"], listed["keys"], listed["dry_run"]) == ("ok", 3, True)
    assert [(line["builder"], line["kind"], line["keys"], line["attempts"]) for line in listed["failed"]] == [
        ("LLMCompletion", "retryable", 1, 2),
        ("LLMCompletion", "terminal", 2, 2),
    ]
    assert "I would rather not" in listed["failed"][1]["example"]
    text = featurekit("retry", "--errors", "terminal", "--dry-run", output="text")
    assert text.out.startswith("abt US: 2 keys with terminal errors would be asked again\n")
    assert "LLMCompletion  terminal     2         2  LLMCompletion[" in text.out

    asked = len(model.prompts)
    model.busy_for = "-"
    again = featurekit("retry")
    assert (again.code, again.calls, len(model.prompts)) == (5, 1, asked + 1)
    assert again.summary["failures"] == {**NONE, "terminal": 2, "remembered": 2}

    nothing = featurekit("retry", output="text")
    assert (nothing.code, nothing.err) == (0, "")
    assert nothing.out == ("abt US: no retryable errors of paid builders to ask again for; nothing was run\n")
    model.refuses = "-"
    assert featurekit("run").summary["failures"] == {**NONE, "terminal": 2, "remembered": 2}
    healed = featurekit("retry", "--errors", "terminal", "--builder", "LLMCompletion")
    assert (healed.code, healed.calls, healed.summary["failures"]) == (0, 2, NONE)
    assert (
        len(model.prompts) == len(set(model.prompts)) + 1 + 1 + 2
    )  # the busy one's attempt and retry, two refused
    assert featurekit("run").summary["unchanged"]


def test_a_spent_quota_ends_the_run_and_keeps_what_was_answered(
    featurekit: Featurekit, model: Model, workplace: Workplace
) -> None:
    featurekit("run")
    workplace.catalog({"p1": "red table lamp", "p7": "floor lamp", "p8": "wall clock"})
    model.quota = False
    ended = featurekit("run")
    assert (ended.code, ended.summary["status"]) == (6, "failed")
    assert "no quota left" in ended.summary["error"]
    assert ended.summary["failures"]["quota"] == 2
    (line,) = featurekit("retry", "--errors", "quota", "--dry-run").summary["failed"]
    assert (line["kind"], line["keys"]) == ("quota", 2)
    model.quota = True
    assert featurekit("retry", "--errors", "quota").calls == 2


def test_nobody_is_asked_once_the_quota_is_spent(featurekit: Featurekit, model: Model) -> None:
    model.quota = False
    ended = featurekit("run", "--set", "llm.concurrency=1")
    assert (ended.code, ended.calls, len(model.prompts)) == (6, 1, 1)
    assert ended.summary["failures"] == {**NONE, "quota": 1}, "keys that were not asked have no error"
    assert "no quota left" in ended.err and "not asked" not in ended.err


def test_a_run_says_in_words_what_asks_again(featurekit: Featurekit, model: Model) -> None:
    model.refuses, model.busy_for = "espresso", "green"
    ran = featurekit("run", output="text")
    assert "  1 paid key got no answer: the next run asks again, as does `featurekit retry`" in ran.out
    told = "2 paid keys refused for good (0 of them before): only `featurekit retry --errors terminal` asks again"
    assert told in ran.out
    plan = featurekit("plan", output="text").out
    assert "2 keys of LLMCompletion refused for good: only `featurekit retry --errors terminal`" in plan
    assert featurekit("plan").summary["failed"][1]["kind"] == "terminal"


def test_a_budget_holds_for_what_is_asked_again(featurekit: Featurekit, model: Model) -> None:
    model.refuses = "espresso"
    featurekit("run")
    model.refuses = "-"
    stopped = featurekit("retry", "--errors", "terminal", "--max-calls", "1")
    assert (stopped.code, stopped.calls) == (75, 1)
    assert featurekit("retry", "--errors", "terminal").calls == 1


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--builder", "LLMLogic"], 2, "'LLMLogic' is no paid builder of this run. Known: LLMCompletion"),
        (["--errors", "some"], 2, "'some' is not one of"),
    ],
)
def test_a_mistake_is_told(featurekit: Featurekit, options: list[str], code: int, said: str) -> None:
    ran = featurekit("retry", *options)
    assert ran.code == code and said in " ".join(ran.err.replace("\u2502", " ").split())
