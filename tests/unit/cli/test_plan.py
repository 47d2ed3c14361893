"""`featurekit plan` and `run --dry-run` as a user sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from featurekit_spark.cli import app
from featurekit_spark.llm.base import Completion
from tests.unit.cli.conftest import TITLES, Ran

Workplace = Any
Plan = Callable[..., Ran]


@pytest.fixture
def plan(workplace: Workplace, capfd: pytest.CaptureFixture[str]) -> Plan:
    def call(*options: str, command: str = "plan", output: str = "json") -> Ran:
        capfd.readouterr()
        arguments = [
            *(command, "--merchant", "abt", "--market", "US", "--engine", "local", "--output", output),
            *("--set", f"product_db.path={workplace.catalogs}", "--set", f"warehouse={workplace.warehouse}"),
            *options,
        ]
        with pytest.raises(SystemExit) as done:
            app(arguments, prog_name="featurekit")
        return Ran(int(done.value.code or 0), *capfd.readouterr())

    return call


def test_a_plan_says_what_the_next_run_does(workplace: Workplace, plan: Plan) -> None:
    cold = plan()
    assert (cold.code, cold.err) == (0, "")
    facts = cold.summary
    assert (facts["status"], facts["products"], facts["calls"], facts["unchanged"]) == ("ok", 6, 6, False)
    assert facts["builders"]["LLMCompletion"]["miss"] == 6
    assert not facts["builders"]["LLMCompletion"]["estimated"]
    assert not workplace.warehouse.exists()
    assert workplace.run().calls == facts["calls"]

    warm = plan().summary
    assert (warm["unchanged"], warm["calls"], warm["usd"], warm["estimated"]) == (True, 0, 0.0, False)
    assert warm["builders"]["LLMLogic"] | {"seconds": 0} == {
        "paid": False,
        "hit": 6,
        "proven": 6,
        "stale": 0,
        "miss": 0,
        "error": 0,
        "empty": 0,
        "estimated": False,
        "calls": 0,
        "pending": 0,
        "tokens": 0,
        "usd": 0.0,
        "seconds": 0,
        "expected": False,
    }

    workplace.catalog([*TITLES.items(), ("p7", "floor lamp")])
    more = plan().summary
    assert (more["calls"], more["builders"]["LLMCompletion"]["hit"]) == (1, 6)
    assert workplace.run().calls == 1


def test_text_is_a_table(workplace: Workplace, plan: Plan) -> None:
    cold = plan(output="text")
    lines = cold.out.splitlines()
    assert re.fullmatch(
        r"abt US: 6 products; a run would make 6 paid calls \(about \d+ tokens, 0.00 usd\) and compute for at least "
        r"[\d.]+ (us|ms|s) of one core",
        lines[0],
    )
    assert lines[1].split() == [
        *("builder", "hit", "stale", "miss", "error", "calls", "tokens", "usd", "seconds")
    ]
    (completion,) = [line.split() for line in lines if "LLMCompletion" in line]
    assert completion[:7] == [
        "LLMCompletion",
        *("0", "0", "6", "0", "6"),
        f"*{re.findall('about ([0-9]+)', lines[0])[0]}",
    ]
    assert completion[7:] == ["*0.00", "?"]
    (searcher,) = [line.split() for line in lines if "Searcher" in line]
    assert searcher[3] == "~6"
    assert [line[:10] for line in lines[-3:]] == ["  ~: about", "  *: expec", "  ?: not k"]
    workplace.run()
    assert plan(output="text").out.startswith(
        "abt US: 6 products, all proven unchanged: a run would compute nothing"
    )


def test_a_dry_run_is_the_plan(workplace: Workplace, plan: Plan) -> None:
    assert plan(command="run").code == 0
    assert workplace.warehouse.exists()
    workplace.catalog({"p1": "one lamp"})
    dry, said = plan("--dry-run", command="run"), plan()
    assert (dry.code, dry.err) == (0, said.err)
    assert dry.summary.keys() == said.summary.keys() and dry.summary["calls"] == said.summary["calls"] == 1


def test_fail_over_usd(workplace: Workplace, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    unpriced = ("--set", "llm.provider=openai", "--set", "llm.model=m")
    unknown = plan("--fail-over-usd", "100", *unpriced)
    assert unknown.code == 6 and unknown.summary["status"] == "failed"
    assert "nobody knows whether this run stays below 100.0 usd: LLMCompletion would" in unknown.err
    monkeypatch.setattr(
        "featurekit_spark.llm.offline.Completion",
        lambda text, *tokens, usd: Completion(text, *tokens, usd=0.25),
    )
    workplace.run()
    workplace.catalog([*TITLES.items(), ("p7", "floor lamp"), ("p8", "bed lamp")])
    dear = plan("--fail-over-usd", "0.4", output="text")
    assert (dear.code, dear.err) == (
        *(6, "error: this run would cost 0.5000 usd, more than --fail-over-usd 0.4\n"),
    )
    assert dear.out.startswith("abt US: 8 products; a run would make 2 paid calls")
    assert plan("--fail-over-usd", "0.5").code == 0


def test_a_jump_is_told(workplace: Workplace, plan: Plan) -> None:
    workplace.run()
    workplace.catalog([*TITLES.items(), *((f"q{n}", f"lamp {n}") for n in range(6))])
    said = plan(output="text")
    assert "warning: LLMLogic has 12 keys, the last run had 6: look at what" in said.err
    ran = workplace.run()
    assert ran.code == 0 and "warning: LLMLogic has 12 keys, the last run had 6" in ran.err
    assert len(ran.summary["warnings"]) == 1


def test_what_is_wrong_is_an_exit_code(plan: Plan) -> None:
    assert plan("--set", "product_db.path=nowhere").code == 3
    refused = plan("--set", "search.top_k=ten")
    assert refused.code == 3 and json.loads(refused.out)["exit_code"] == 3
    assert plan("--fail-over-usd", "-1").code == 2


def test_a_plan_says_what_changed_since_the_last_run(workplace: Workplace, plan: Plan) -> None:
    workplace.run()
    template = ("--set", "prompt_template=what goes with {title}?")
    (change,) = plan(*template).summary["changes"]
    assert (change["builder"], change["kinds"], change["adoptable"]) == (
        "LLMProductPrompt",
        ["config"],
        False,
    )
    assert "changed since the last run:" not in plan(output="text").out
    lines = plan(*template, output="text").out.splitlines()
    assert lines[-2] == "  changed since the last run:"
    assert lines[-1].startswith("    LLMProductPrompt: its config changed from ")
    assert lines[-1].endswith(": 6 keys to build")
