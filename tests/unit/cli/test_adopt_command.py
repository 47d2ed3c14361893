"""`featurekit adopt` as a user sees it: a logic builder of one's own, rewritten between two runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cli import app
from tests.unit.cli.conftest import Ran

Workplace = Any
Adopt = Callable[..., Ran]

PICKS = '''
import pyarrow as pa

from featurekit_spark import FeatureBuilder
from featurekit_spark.apps.product_recs import ProductEmbeddingString


class Picks(FeatureBuilder[list[str]]):
    """Letters of a title, as if they were products."""

    key = ("merchant", "market", "product_id")
    deps = (ProductEmbeddingString,)
    value = pa.list_(pa.string())

    def build_one(self, inputs, config, context):
        return BODY
'''
SAME, OTHER = 'sorted(set(inputs["ProductEmbeddingString"]))', 'sorted(inputs["ProductEmbeddingString"])'


@pytest.fixture
def logic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The setting for a version of the logic builder; a version is a module of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    unique = tmp_path.name.replace("-", "_")

    def of(body: str) -> str:
        name = f"picks_{unique}_{len(list(tmp_path.glob('picks_*.py')))}"
        (tmp_path / f"{name}.py").write_text(PICKS.replace("BODY", body))
        importlib.invalidate_caches()
        return f"logic_builders=[{name}:Picks]"

    return of


@pytest.fixture
def adopt(workplace: Workplace, capfd: pytest.CaptureFixture[str]) -> Adopt:
    def call(builder: str, setting: str, *options: str, output: str = "json") -> Ran:
        capfd.readouterr()
        arguments = [
            *("adopt", builder, "--merchant", "abt", "--market", "US", "--output", output, "--set", setting),
            *("--set", f"product_db.path={workplace.catalogs}", "--set", f"warehouse={workplace.warehouse}"),
            *("--set", "engine.kind=local"),
            *options,
        ]
        with pytest.raises(SystemExit) as done:
            app(arguments, prog_name="featurekit")
        return Ran(int(done.value.code or 0), *capfd.readouterr())

    return call


def run(workplace: Workplace, setting: str) -> Any:
    return workplace.run("--set", setting).summary["builders"]["Picks"]


def test_a_refactoring(workplace: Workplace, adopt: Adopt, logic: Callable[[str], str]) -> None:
    assert run(workplace, logic(SAME))["computed"] == 6
    new = logic('sorted({letter for letter in inputs["ProductEmbeddingString"]})')
    found = adopt("Picks", new, "--reason", "a set comprehension")
    assert (found.code, found.err, found.out.count("\n")) == (0, "", 1)
    assert {
        name: found.summary[name] for name in ("status", "sampled", "agreed", "entries", "exit_code")
    } == {"status": "adopted", "sampled": 6, "agreed": 6, "entries": 6, "exit_code": 0}
    counts = run(workplace, new)
    assert (counts["computed"], counts["hit"]) == (0, 6)


def test_a_comment(workplace: Workplace, adopt: Adopt, logic: Callable[[str], str]) -> None:
    run(workplace, logic(SAME))
    new = logic(f"{SAME}  # in order")
    found = adopt("Picks", new, output="text")
    assert found.code == 0
    assert found.out.startswith("Picks: its code is what it was in the last run")
    assert run(workplace, new)["computed"] == 0


def test_values_that_differ(workplace: Workplace, adopt: Adopt, logic: Callable[[str], str]) -> None:
    run(workplace, logic(SAME))
    new = logic(OTHER)
    found = adopt("Picks", new)
    assert (found.code, found.summary["status"], found.summary["exit_code"]) == (4, "refused", 4)
    first = found.summary["disagreements"][0]
    assert set(first) == {"key", "old", "new"} and json.loads(first["key"])[0] == "abt"
    told = adopt("Picks", new, output="text")
    assert told.code == 4
    assert "the new code computes other values for 6 of 6 keys; nothing was adopted" in told.out
    assert "\n    was  [" in told.out and "\n    now  [" in told.out

    forced = adopt("Picks", new, "--force")
    assert (forced.code, forced.summary["entries"], forced.summary["forced"]) == (0, 6, True)
    assert run(workplace, new)["computed"] == 0


def test_a_dry_run_and_a_small_sample(
    workplace: Workplace, adopt: Adopt, logic: Callable[[str], str]
) -> None:
    run(workplace, logic(SAME))
    new = logic(f"list({SAME})")
    found = adopt("Picks", new, "--dry-run", "--sample", "2")
    assert (found.code, found.summary["status"], found.summary["sampled"]) == (0, "would adopt", 2)
    assert run(workplace, new)["computed"] == 6


def test_by_import_path(workplace: Workplace, adopt: Adopt, logic: Callable[[str], str]) -> None:
    run(workplace, logic(SAME))
    new = logic(f"list({SAME})")
    path = new.removeprefix("logic_builders=[").removesuffix("]")
    assert adopt(path, new).summary["entries"] == 6


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("Pick", 2, "no builder 'Pick' in this graph. Known: Picks, "),
        ("nowhere:Picks", 2, "'nowhere:Picks' names no builder"),
        ("ProductIds", 0, ""),
    ],
)
def test_which_builder(
    workplace: Workplace, adopt: Adopt, logic: Callable[[str], str], name: str, code: int, said: str
) -> None:
    setting = logic(SAME)
    run(workplace, setting)
    found = adopt(name, setting)
    assert found.code == code
    assert said in found.err
    if code == 0:
        assert found.summary["status"] == "nothing to do"
    else:
        assert found.summary["status"] == "failed"
