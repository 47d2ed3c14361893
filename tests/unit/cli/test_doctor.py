"""The doctor as a command: which checks there are for which settings, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from featurekit_spark.cli import app


@pytest.fixture(autouse=True)
def catalogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "catalogs").mkdir()
    (tmp_path / "catalogs" / "abt_US.csv").write_text("product_id,title\np1,lamp\n")


def doctor(*words: str) -> Result:
    return CliRunner().invoke(app, ["doctor", "--set", "product_db.path=catalogs", *words])


def checks(done: Result) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


ABT = ("--merchant", "abt", "--market", "US")


def test_everything_is_checked_and_nothing_left(tmp_path: Path) -> None:
    done = doctor("--engine", "local", "--output", "json", *ABT)
    assert done.exit_code == 0, done.stdout
    assert list(checks(done)) == [
        *("settings", "python", "java", "packages", "warehouse", "cache", "several writers", "disk"),
        *("model", "embedder", "catalog", "logic builders"),
    ]
    assert json.loads(done.stdout)["status"] in {"ok", "warn"}
    assert checks(done)["logic builders"]["found"] == "LLMLogic over ProductIds"
    assert [path.name for path in tmp_path.iterdir()] == ["catalogs"]


def test_spark_has_checks_of_its_own() -> None:
    found = checks(doctor("--output", "json"))
    assert {"spark environment", "delta jars", "class archive"} <= set(found)
    assert not {"catalog", "spark starts"} & set(found)


def test_what_fails_is_told_with_what_to_do() -> None:
    done = doctor(
        *("--engine", "local", "--merchant", "abt", "--market", "DE"),
        *("--set", "sinks=[{kind: redis, url: 'redis://:pw@127.0.0.1:1/0', timeout_s: 0.5}]"),
        *("--set", "llm={provider: openai, model: m, api_key_env: NO_SUCH_VARIABLE}"),
        *("--set", "cache.base=nowhere", "--set", "logic_builders=[nowhere:X]"),
    )
    assert done.exit_code == 3
    assert "FAIL  redis: redis://:***@127.0.0.1:1/0" in done.stdout and "pw@" not in done.stdout
    assert "NO_SUCH_VARIABLE is not set" in done.stdout
    assert "FAIL  catalog: " in done.stdout and "FAIL  cache.base: " in done.stdout
    assert "FAIL  logic builders: " in done.stdout and "      -> Correct logic_builders" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("5 failed")


def test_settings_that_are_wrong_do_not_hide_the_machine() -> None:
    done = doctor("--set", "serch.top_k=1", "--output", "json")
    assert done.exit_code == 3
    found = checks(done)
    assert found["settings"]["status"] == "fail" and "serch" in found["settings"]["found"]
    assert {"python", "java", "packages"} <= set(found)


def test_a_merchant_without_a_market() -> None:
    done = doctor("--merchant", "abt")
    assert done.exit_code == 2 and "together" in done.stderr


def test_warnings_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", "python3")
    done = doctor("--output", "json")
    assert checks(done)["spark environment"]["status"] == "warn"
    assert done.exit_code == (3 if json.loads(done.stdout)["status"] == "fail" else 0)
