"""Plans as trees. A change shows as a diff of the text files in `trees`.

`python -m tests.golden.test_trees` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from featurekit_spark.plan import CheckTraces, Plan, build_plan
from featurekit_spark.plan_tree import inputs_of, plan_facts, plan_tree
from tests.golden.test_plans import PLANS, _graph

HERE = Path(__file__).parent / "trees"


def plan_of(name: str) -> Plan:
    targets, state = PLANS[name]
    return build_plan(_graph(targets), targets, state)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_tree(name: str) -> None:
    assert plan_tree(plan_of(name)) + "\n" == (HERE / f"{name}.txt").read_text()


def test_every_golden_text_has_its_plan() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == set(PLANS)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_every_stage_is_drawn_and_its_inputs_run_before_it(name: str) -> None:
    plan = plan_of(name)
    lines = [line.lstrip("│├└─ ") for line in plan_tree(plan).splitlines()[1:]]
    for number, stage in enumerate(plan.stages, 1):
        assert any(line.startswith(f"{number} ") for line in lines), f"{stage.label} is not in the tree"
        assert all(before < number for before in inputs_of(plan, number)) or isinstance(stage, CheckTraces)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_facts_name_what_is_given(name: str) -> None:
    """What the plan says is given to a stage is made by one of its inputs."""
    plan = plan_of(name)
    facts = plan_facts(plan)
    for stage in facts["stages"]:
        given = [line.removeprefix("given  ") for line in stage["details"] if line.startswith("given  ")]
        made = " ".join(facts["stages"][n - 1]["label"] for n in stage["inputs"])
        for builder in ", ".join(given).split(", "):
            assert builder in ("", "nothing") or builder in made, f"{stage['label']} is given {builder}"


if __name__ == "__main__":
    for plan_name in PLANS:
        (HERE / f"{plan_name}.txt").write_text(plan_tree(plan_of(plan_name)) + "\n")
