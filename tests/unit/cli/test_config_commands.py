"""What `config show` tells of settings from every source, and what it does not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from featurekit_spark.cli import app
from featurekit_spark.settings import Settings, mask_password


def show(*words: str) -> Result:
    return CliRunner().invoke(app, ["config", "show", *words])


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "merchants").mkdir()
    (tmp_path / "merchants" / "abt.yaml").write_text("search: {top_k: 7}\n")
    path = tmp_path / "dev.yaml"
    path.write_text("search: {top_k: 5}\nllm: {suggestions: 4}\n")
    return path


def test_every_setting_and_its_origin(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATUREKIT__ENGINE__PARTITIONS", "9")
    done = show(
        *("--conf-file", str(conf), "--merchant", "abt", "--set", "embedder.dim=16", "--engine", "local"),
        *("--output", "json"),
    )
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert list(found) == [leaf.key for leaf in Settings().leaves()]
    assert found["search.top_k"] == {"value": 7, "origin": str(conf.parent / "merchants" / "abt.yaml")}
    assert found["llm.suggestions"] == {"value": 4, "origin": str(conf)}
    assert found["engine.partitions"] == {"value": 9, "origin": "environment FEATUREKIT__ENGINE__PARTITIONS"}
    assert found["embedder.dim"] == {"value": 16, "origin": "--set embedder.dim"}
    assert found["engine.kind"] == {"value": "local", "origin": "--set engine.kind"}
    assert found["warehouse"] == {"value": "warehouse", "origin": "default"}


def test_a_table_for_people(conf: Path) -> None:
    lines = show("--conf-file", str(conf)).stdout.splitlines()
    assert lines[0].split() == ["key", "value", "origin"]
    (line,) = [line for line in lines if line.startswith("search.top_k")]
    assert line.split() == ["search.top_k", "5", str(conf)]
    assert [line.split()[1] for line in lines if line.startswith("cache.path")] == ["null"]


def test_some_settings(conf: Path) -> None:
    found = json.loads(show("search.top_k", "embedder", "--output", "json").stdout)
    assert list(found)[:2] == ["embedder.provider", "embedder.dim"] and list(found)[-1] == "search.top_k"
    assert {key.partition(".")[0] for key in found} == {"embedder", "search"}
    unknown = show("serch.top_k")
    assert unknown.exit_code == 2 and "Did you mean 'search.top_k'?" in unknown.stderr


def test_secrets_are_masked() -> None:
    done = show(
        *("--set", "sinks=[{kind: redis, url: 'redis://me:hunter2@h/0?password=hunter2'}]"),
        *("--set", "llm.base_url=https://h/v1?api-key=hunter2&v=1"),
    )
    assert done.exit_code == 0 and "hunter2" not in done.stdout + done.stderr
    assert "redis://me:***@h/0?password=***" in done.stdout
    assert "https://h/v1?api-key=***&v=1" in done.stdout


def test_a_password_in_an_address_of_a_model_is_refused_and_not_repeated() -> None:
    done = show("--set", "llm.base_url=https://user:hunter2@h/v1")
    assert done.exit_code == 3 and "hunter2" not in done.stdout + done.stderr
    assert "llm.base_url" in done.stderr


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://h/v1?Token=a/b+c==&x=1", "https://h/v1?Token=***&x=1"),
        ("s3://bucket/monkey=1", "s3://bucket/monkey=1"),
        ("{'url': 'https://h?sig=abc', 'b': 1}", "{'url': 'https://h?sig=***', 'b': 1}"),
    ],
)
def test_masks(text: str, masked: str) -> None:
    assert mask_password(text) == masked


def test_a_mistake_in_the_settings() -> None:
    done = show("--set", "serch.top_k=1", "--output", "json")
    assert done.exit_code == 3 and json.loads(done.stdout)["exit_code"] == 3
