"""The demo: a catalog, a run, some recommendations; the second time nothing is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from featurekit_spark.cli import app


def demo(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["demo", "--products", "40", "--folder", str(folder), *words])


def test_it_shows_recommendations_by_title(tmp_path: Path) -> None:
    done = demo(tmp_path / "data")
    assert done.exit_code == 0, done.output
    assert "demo US: 40 products, ok" in done.stdout and "Run it again: nothing will" in done.stdout
    assert "LLMLogic: 40 products" in done.stdout and "├── " in done.stdout
    assert done.stdout.rstrip().endswith("how to name a real one.")
    assert "featurekit run --merchant demo --market US --engine local" in done.stderr
    titles = (tmp_path / "data" / "catalogs" / "demo_US.csv").read_text()
    shown = done.stdout.split("├── ")[1].splitlines()[0]
    assert shown[:30] in titles

    again = demo(tmp_path / "data")
    assert "Nothing had changed since the last time" in again.stdout and "Run it again" not in again.stdout

    again = demo(tmp_path / "data", "--output", "json")
    (line,) = again.stdout.splitlines()
    assert json.loads(line)["unchanged"] and again.exit_code == 0


def test_the_runs_exit_code_is_the_demos(tmp_path: Path) -> None:
    done = demo(tmp_path, "--set", "search.top_k=ten")
    assert done.exit_code == 3 and "search.top_k: Input should be" in done.stderr
    assert "LLMLogic" not in done.stdout


@pytest.mark.parametrize("products", ["0", "many", "10000000"])
def test_a_number_that_is_none(tmp_path: Path, products: str) -> None:
    done = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path), "--products", products])
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []
