"""`featurekit explain`: the plan as a tree, why a key is computed again, and what an earlier run did."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from featurekit_spark.cli import app
from featurekit_spark.llm.offline import OfflineLLM
from tests.unit.cli.conftest import TITLES

Workplace = Any
P1 = '["abt","US","p1"]'


def explain(workplace: Workplace, *arguments: str) -> tuple[int, str, str]:
    settings = [f"product_db.path={workplace.catalogs}", f"warehouse={workplace.warehouse}"]
    named = ["--merchant", "abt", "--market", "US", "--engine", "local"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["explain", *arguments, *named, *options])
    return done.exit_code, done.stdout, done.stderr


def facts(workplace: Workplace, *arguments: str) -> dict[str, Any]:
    code, out, _ = explain(workplace, *arguments, "--output", "json")
    found: dict[str, Any] = json.loads(out)
    assert (code, found["status"]) == (0, "ok")
    return found


@pytest.fixture
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(model: OfflineLLM, prompt: str, **options: Any) -> Any:
        raise AssertionError("a question made a call")

    monkeypatch.setattr(OfflineLLM, "complete", refuse)


@pytest.mark.usefixtures("no_calls")
def test_the_plan_as_a_tree(workplace: Workplace) -> None:
    code, out, err = explain(workplace)
    assert (code, err) == (0, "")
    assert out.startswith("plan for LLMLogic.over(ProductIds) on local: 10 stages\n")
    assert "\n10 stage LLMLogic\n" in out
    assert "├─ 8 stage LLMSuggestions\n" in out
    assert "│  ├─ 7 paid stage LLMCompletion\n" in out
    assert not workplace.warehouse.exists()
    stages = facts(workplace)["stages"]
    assert [stage["number"] for stage in stages] == list(range(1, 11))
    assert (stages[6]["label"], stages[6]["inputs"]) == ("LLMCompletion", [4])


def test_the_plan_of_another_builder(workplace: Workplace) -> None:
    assert explain(workplace, "LLMProductPrompt")[1].startswith("plan for LLMProductPrompt.over(ProductIds)")
    path = "featurekit_spark.apps.product_recs:SimilarProducts"
    assert explain(workplace, path)[1].startswith("plan for SimilarProducts.over(ProductIds)")
    code, _, err = explain(workplace, "ProductEmbedding")
    assert code == 2
    assert "ask for one key of it with --key" in err


def test_a_key(workplace: Workplace, no_calls_after: Any) -> None:
    first = facts(workplace, "--key", P1)
    assert (first["state"], first["cause"]) == ("unknown", "never computed")
    workplace.run("--run-id", "r1")
    no_calls_after()
    hit = facts(workplace, "LLMLogic", "--key", P1)
    assert hit["state"] == "hit"
    assert hit["proof"]["run_id"] == "r1"
    workplace.catalog({**TITLES, "p1": "red floor lamp"})
    code, out, err = explain(workplace, "LLMLogic", "--key", P1)
    assert (code, err) == (0, "")
    said = "ProductEmbeddingString changed: value hash "
    assert out.startswith(f'LLMLogic["abt","US","p1"]: unknown, {said}')
    changed = facts(workplace, "LLMLogic", "--key", '{"product_id":"p1","merchant":"abt","market":"US"}')
    sources = [part for part in changed["proof"]["parts"] if part["kind"] == "source"]
    assert [(part["name"], part["changed"]) for part in sources] == [("ProductEmbeddingString", True)]
    prompt = find(changed["step"], "LLMProductPrompt")
    assert (prompt["state"], prompt["cause"][: len(said)]) == ("miss", said)
    assert prompt["value_hash"] != prompt["before"]["value_hash"]
    completion = find(changed["step"], "LLMCompletion")
    assert (completion["key"], completion["state"]) == ('["get recommendations for red floor lamp"]', "miss")
    other = facts(workplace, "--key", '["abt","US","p2"]')
    assert other["cause"].startswith("the group changed: 1 member changed (p1)")
    same = [part for part in find(other["step"], "LLMSuggestions")["parts"] if part["kind"] == "input"]
    assert [(part["changed"], part["said"]) for part in same] == [(False, "")]


@pytest.fixture
def no_calls_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def refuse(model: OfflineLLM, prompt: str, **options: Any) -> Any:
        raise AssertionError("a question made a call")

    return lambda: monkeypatch.setattr(OfflineLLM, "complete", refuse)


def find(step: dict[str, Any], builder: str) -> dict[str, Any]:
    """The first step of a builder."""
    if step["builder"] == builder:
        return step
    found = (find(inner, builder) for inner in step["inputs"])
    return next((inner for inner in found if inner), {})


def test_a_changed_setting(workplace: Workplace) -> None:
    workplace.run()
    found = facts(workplace, "--key", P1, "--set", "prompt_template=more like {title}")
    old, new = "template='get recommendations for {title}'", "template='more like {title}'"
    assert old in found["cause"]
    assert new in found["cause"]
    assert found["cause"].startswith("LLMProductPrompt: its config changed (")


def test_a_run(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    workplace.catalog({**TITLES, "p1": "red floor lamp"})
    workplace.run("--run-id", "r2")
    workplace.run("--run-id", "r3")
    code, out, _ = explain(workplace, "LLMProductPrompt", "--run", "r2")
    assert code == 0
    assert out.startswith(
        "run r2 of abt US: ok\nLLMProductPrompt: 5 hit, 1 computed, 0 updated, 0 empty, 0 error, 0 calls\n"
    )
    assert (
        "    config  LLMProductPrompt.Config(template='get recommendations for {title}', engine='fields') ("
        in out
    )
    assert "run r3 of abt US: ok, nothing had changed" in explain(workplace, "--run", "r3")[1]
    builders = facts(workplace, "--run", "r1")["builders"]
    assert builders["LLMLogic"]["computed"] == 6
    assert builders["LLMLogic"]["version"] == "1"


def test_a_key_of_a_run(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    workplace.catalog({**TITLES, "p1": "red floor lamp"})
    workplace.run("--run-id", "r2")
    found = facts(workplace, "LLMLogic", "--run", "r2", "--key", P1)
    assert (found["state"], found["run_id"]) == ("computed", "r2")
    assert facts(workplace, "LLMLogic", "--run", "latest", "--key", P1) == found
    prompt = find(found["step"], "LLMProductPrompt")
    assert (prompt["state"], prompt["before"]["run_id"]) == ("computed", "r1")
    assert prompt["cause"].startswith("ProductEmbeddingString changed: value hash ")
    first = facts(workplace, "LLMLogic", "--run", "r1", "--key", P1)
    assert (first["state"], first["cause"]) == ("computed", "never computed")
    other = find(
        facts(workplace, "LLMLogic", "--run", "r2", "--key", '["abt","US","p4"]')["step"], "LLMProductPrompt"
    )
    assert other["state"] == "hit"
    assert other["cause"].endswith(" by run r1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["LLMLogic", "--key", "abt,US,p1"], 'is written --key \'["abt", "US", "<product_id>"]\''),
        (
            ["LLMLogic", "--key", '["abt","US"]'],
            "LLMLogic has the key fields ('merchant', 'market', 'product_id') (3), found 2",
        ),
        (["LLMLogic", "--key", '"p1"'], "LLMLogic has the key fields ('merchant', 'market', 'product_id')"),
        (["LLMLogic", "--key", '["abt","US",null]'], "LLMLogic has the key fields"),
        (["LLMLogic", "--key", '["buy","US","p1"]'], "--key has the merchant 'buy', and --merchant is 'abt'"),
        (["LLMLogik", "--key", P1], "Did you mean 'LLMLogic'?"),
        (["no.such:Class", "--key", P1], "names no builder"),
        (["LLMLogic", "--run", "r9"], "no run 'r9' of abt in US"),
        (["LLMLogic", "--run", "r9", "--key", P1], "no record of a run 'r9'"),
    ],
)
def test_questions_that_make_no_sense(workplace: Workplace, arguments: list[str], said: str) -> None:
    code, out, err = explain(workplace, *arguments, "--output", "json")
    assert code == 2
    assert said in err
    assert json.loads(out)["exit_code"] == 2


def test_a_key_without_a_builder_where_there_are_several(workplace: Workplace) -> None:
    apps = "featurekit_spark.apps.product_recs"
    several = f"logic_builders=[{apps}:LLMLogic,{apps}:SimilarProducts]"
    code, _, err = explain(workplace, "--key", P1, "--set", several)
    assert code == 2
    assert "LLMLogic, SimilarProducts" in err
