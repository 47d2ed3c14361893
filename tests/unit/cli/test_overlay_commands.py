"""A development run over production's cache, and what then goes down, by the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from featurekit_spark.cli import app

Workplace = Any


@pytest.fixture
def promote(workplace: Workplace, tmp_path: Path) -> Any:
    def call(*options: str, base: bool = True) -> Result:
        where = ["--set", f"warehouse={tmp_path / 'dev'}"]
        where += ["--set", f"cache.base={workplace.warehouse / 'cache'}"] if base else []
        words = ["cache", "promote", "--merchant", "abt", "--market", "US", *where, *options]
        return CliRunner().invoke(app, words)

    return call


def rows_of(result: Result) -> dict[str, int]:
    told = json.loads(result.stdout)
    return {name: sum(counts.values()) for name, counts in told["builders"].items()}


def test_a_development_run_and_back(workplace: Workplace, tmp_path: Path, promote: Any) -> None:
    over = ["--set", f"cache.base={workplace.warehouse / 'cache'}", "--set", f"warehouse={tmp_path / 'dev'}"]
    assert workplace.run().calls == 6
    same = workplace.run(*over)
    assert (same.code, same.calls, same.computed) == (0, 0, 0)
    assert same.summary["sinks"]["delta"]["status"] == "published"

    titles = {"p1": "yellow table lamp", "p2": "blue table lamp"}
    workplace.catalog(titles)
    assert workplace.run(*over).calls == 1
    dry = promote("--dry-run", "--output", "json")
    assert dry.exit_code == 0 and json.loads(dry.stdout)["dry_run"]
    assert rows_of(dry)["LLMCompletion"] == 1

    done = promote("--builder", "LLMCompletion")
    assert done.exit_code == 0 and done.stdout.startswith("1 row went from ")
    assert workplace.run().calls == 0  # production has the answer now

    assert set(rows_of(promote("--output", "json"))) > {"LLMCompletion", "LLMLogic"}
    assert set(rows_of(promote("--output", "json")).values()) == {0}


def test_mistakes_are_told(workplace: Workplace, promote: Any) -> None:
    missing = promote()
    assert missing.exit_code == 3 and "holds no cache" in missing.stderr
    unset = promote(base=False)
    assert unset.exit_code == 3 and "--set cache.base=PATH" in unset.stderr
    memory = promote("--set", "cache.kind=memory")
    assert memory.exit_code == 2 and "keeps nothing" in memory.stderr
    workplace.run()
    unknown = promote("--builder", "Nothing", "--output", "json")
    assert (
        unknown.exit_code == 2 and "'Nothing' has nothing to promote" in json.loads(unknown.stdout)["error"]
    )
