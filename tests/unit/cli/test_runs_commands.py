"""`featurekit runs` and `run --export-failed`, over runs that were made by the main job."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from featurekit_spark.cli import app
from featurekit_spark.llm.offline import OfflineLLM

Workplace = Any


def command(workplace: Workplace, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(
        app,
        [*arguments, "--merchant", "abt", "--market", "US", "--set", f"warehouse={workplace.warehouse}"],
    )
    return done.exit_code, done.stdout, done.stderr


def test_list_and_show(workplace: Workplace) -> None:
    assert "no runs of abt in US below" in command(workplace, "runs", "list")[1]
    workplace.run("--run-id", "r1")
    workplace.run("--run-id", "r2")
    code, out, err = command(workplace, "runs", "list")
    assert (code, err) == (0, "")
    assert [line.split()[-1] for line in out.splitlines()] == ["run", "r2", "r1"]
    assert " unchanged " in out.splitlines()[1] and " ok " in out.splitlines()[2]
    assert len(command(workplace, "runs", "list", "--limit", "1")[1].splitlines()) == 2

    done = CliRunner().invoke(
        app,
        ["runs", "list", "--merchant", "b", "--market", "UK", "--set", f"warehouse={workplace.warehouse}"],
    )
    assert "there are runs of abt in US" in done.stdout

    found = json.loads(command(workplace, "runs", "list", "--output", "json")[1])
    assert [run["run_id"] for run in found["runs"]] == ["r2", "r1"]
    assert json.loads(command(workplace, "runs", "show", "latest", "--output", "json")[1])["run_id"] == "r2"
    shown = command(workplace, "runs", "show", "r1")[1]
    assert shown.startswith("abt US: run r1, ok, began 20")
    assert "sink delta: published, 6 rows" in shown and "LLMCompletion" in shown and "stage " in shown
    assert str(workplace.warehouse / "runs" / "abt" / "US" / "r1.html") in shown


def test_show_tells_why_a_run_failed(workplace: Workplace) -> None:
    workplace.run("--set", "product_db.path=nowhere")
    shown = command(workplace, "runs", "show", "latest")[1]
    assert "ended before its end (exit code 3): " in shown and "there is no such folder" in shown


@pytest.mark.parametrize(
    ("run", "said"), [("r9", "no run 'r9' of abt in US"), ("../../x", "cannot be used"), ("index", "no run")]
)
def test_a_run_that_is_not_there(workplace: Workplace, run: str, said: str) -> None:
    workplace.run("--run-id", "r1")
    code, out, err = command(workplace, "runs", "show", run, "--output", "json")
    assert code == 2 and said in err
    assert json.loads(out)["status"] == "failed" and json.loads(out)["exit_code"] == 2


def test_failed_keys_are_exported_on_request(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OfflineLLM.complete

    async def sometimes(model: OfflineLLM, prompt: str, **options: Any) -> Any:
        if "blue" in prompt or "grinder" in prompt:
            raise ValueError("cannot answer this")
        return await right(model, prompt, **options)

    path = tmp_path / "failed.csv"
    with monkeypatch.context() as patched:
        patched.setattr(OfflineLLM, "complete", sometimes)
        assert workplace.run("--run-id", "r1", "--export-failed", str(path)).code == 5
        assert 'failed: ["abt","US","p2"]' in command(workplace, "runs", "show", "r1")[1]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["run_id"], row["builder"], row["product_id"]) for row in rows) == [
        ("r1", "LLMLogic", "p2"),
        ("r1", "LLMLogic", "p5"),
    ]
    assert all("cannot answer this" in row["error"] and row["ts"].startswith("20") for row in rows)
    assert {(row["merchant"], row["market"]) for row in rows} == {("abt", "US")}

    assert workplace.run("--export-failed", str(path)).code == 0
    assert path.read_text().count("\n") == 1  # its header


def test_failed_keys_that_cannot_be_exported(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = workplace.run("--export-failed", str(tmp_path / "file" / "failed.csv"))
    assert ran.code == 3 and "what was computed is kept" in ran.err
    assert not (workplace.warehouse / "recommendations").exists()


def test_a_backfill_exports_a_file_per_date(workplace: Workplace, tmp_path: Path) -> None:
    workplace.run("--backfill", "2026-01-01..2026-01-02", "--export-failed", str(tmp_path / "failed.csv"))
    assert sorted(path.name for path in tmp_path.glob("failed*")) == [
        "failed-2026-01-01.csv",
        "failed-2026-01-02.csv",
    ]
