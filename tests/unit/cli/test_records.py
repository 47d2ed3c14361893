"""What a run leaves in `{warehouse}/runs`, in whatever way it ends."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any

import pytest

from featurekit_spark.cli.backfill import Dates
from featurekit_spark.sinks import DeltaSink

Workplace = Any


def documents(workplace: Workplace, market: str = "US") -> list[dict[str, Any]]:
    """Documents of runs, oldest first."""
    folder = workplace.warehouse / "runs" / "abt" / market
    found = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != ".index.json"]
    return sorted(found, key=lambda document: str(document["started"]))


def test_a_run_leaves_a_document_and_a_page(workplace: Workplace) -> None:
    before = datetime.now(UTC)
    ran = workplace.run("--run-id", "r1")
    assert (ran.code, ran.err) == (0, "")
    page = workplace.warehouse / "runs" / "abt" / "US" / "r1.html"
    assert ran.summary["page"] == str(page) and "LLMLogic" in page.read_text()
    (found,) = documents(workplace)
    for name in ("run_id", "status", "builders", "sinks", "quality", "products", "wall_seconds"):
        assert found[name] == ran.summary[name], name
    assert (found["run_id"], found["status"], found["engine"]) == ("r1", "ok", "local")
    assert "LLMLogic" in found["plan"] and sum(stage["seconds"] for stage in found["stages"]) > 0
    assert found["identities"]["LLMLogic"]["config_hash"]
    assert before <= datetime.fromisoformat(found["started"]) <= datetime.fromisoformat(found["ended"])
    warehouse = next(s for s in found["settings"] if s["key"] == "warehouse")
    assert warehouse == {"key": "warehouse", "value": str(workplace.warehouse), "origin": "--set warehouse"}


def test_a_run_that_found_nothing_to_do_leaves_one_too(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    workplace.run("--run-id", "r2")
    found = documents(workplace)[-1]
    assert (found["run_id"], found["unchanged"], found["stages"]) == ("r2", True, [])
    assert "LLMLogic" in found["plan"] and found["identities"]["LLMLogic"]["config_hash"]
    assert found["sinks"]["delta"]["run_id"] == "r1"
    listed = (workplace.warehouse / "runs" / "abt" / "US" / "index.html").read_text()
    assert listed.index("r2.html") < listed.index("r1.html")


def test_a_failed_run_leaves_how_far_it_came(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(DeltaSink, "publish", broken)
        assert workplace.run().code == 1
    (found,) = documents(workplace)
    assert (found["status"], found["exit_code"]) == ("failed", 1) and "disk full" in found["error"]
    assert found["builders"]["LLMLogic"]["computed"] == 6 and found["stages"]


def test_a_run_whose_stage_failed_leaves_the_stages_before_it(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("featurekit_spark.engines.local.LocalEngine.run_stage", broken)
    ran = workplace.run()
    (found,) = documents(workplace)
    assert ran.code == 1 and found["error"] == "OSError: disk full"
    assert "LLMLogic" in found["plan"] and found["stages"] and found["identities"]
    assert found["builders"]["ProductEmbeddingString"]["computed"] == 6


def test_a_run_that_failed_before_it_computed_leaves_its_error(workplace: Workplace) -> None:
    ran = workplace.run("--set", "product_db.path=nowhere")
    (found,) = documents(workplace)
    assert found["error"] == ran.summary["error"] and found["run_id"] == ran.summary["run_id"]


def test_an_interrupted_run_leaves_one(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DeltaSink, "publish", interrupt)
    assert workplace.run().code == 130
    (found,) = documents(workplace)
    assert (found["status"], found["error"], found["exit_code"]) == ("failed", "interrupted", 130)


def test_a_record_that_cannot_be_written_is_a_warning(workplace: Workplace) -> None:
    workplace.warehouse.mkdir()
    (workplace.warehouse / "runs").write_text("a file where a folder should be")
    ran = workplace.run("--run-id", "r1")
    assert ran.code == 0 and "page" not in ran.summary
    assert ran.err.startswith("warning: the record of run r1 could not be written: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--run-id", "../x"], ["--run-id", "latest"], ["--set", "search.top_k=ten"]]
)
def test_a_run_that_never_began_leaves_nothing(workplace: Workplace, options: list[str]) -> None:
    assert workplace.run(*options).code in (2, 3)
    assert not workplace.warehouse.exists()


# -- backfill ------------------------------------------------------------------------------------------------


def test_a_backfill_is_one_run_per_date(workplace: Workplace) -> None:
    ran = workplace.run("--backfill", "2026-01-30..2026-02-01", "--run-id", "fill")
    assert (ran.code, ran.err) == (0, "")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    days = ["2026-01-30", "2026-01-31", "2026-02-01"]
    assert [line["run_date"] for line in lines] == days
    assert [line["run_id"] for line in lines] == [f"fill-{day}" for day in days]
    assert [found["run_date"] for found in documents(workplace)] == days
    assert {row["ts"].astimezone(UTC).date() for row in workplace.published()} == {date(2026, 1, 30)}
    assert [line["unchanged"] for line in lines] == [False, True, True]


def test_a_backfill_stops_at_a_failure_and_says_where_to_go_on(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = DeltaSink.check, []

    def sometimes(sink: DeltaSink) -> None:
        calls.append(sink)
        if len(calls) == 2:
            raise OSError("no net")
        right(sink)

    monkeypatch.setattr(DeltaSink, "check", sometimes)
    ran = workplace.run("--backfill", "2026-01-01..2026-01-04")
    assert ran.code == 1
    assert [json.loads(line)["status"] for line in ran.out.splitlines()] == ["ok", "failed"]
    assert "1 of 4 dates are done; go on with --backfill 2026-01-02..2026-01-04" in ran.err
    assert workplace.run("--backfill", "2026-01-02..2026-01-04").code == 0


def test_a_backfill_stops_where_a_run_reached_its_budget(workplace: Workplace) -> None:
    ran = workplace.run("--backfill", "2026-01-01..2026-01-04", "--max-calls", "2")
    assert ran.code == 75
    assert [json.loads(line)["status"] for line in ran.out.splitlines()] == ["stopped"]
    assert "0 of 4 dates are done; go on with --backfill 2026-01-01..2026-01-04" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backfill", "2026-01-01"], "there is no .. in it"),
        (["--backfill", "2026-01-01..2026-02-30"], "day is out of range for month"),
        (["--backfill", "2026-01-02..2026-01-01"], "ends before it begins"),
        (["--backfill", "2026-01-01..2026-01-02", "--run-date", "2026-01-01"], "leave out --run-date"),
    ],
)
def test_a_backfill_without_sense_is_a_usage_error(
    workplace: Workplace, options: list[str], said: str
) -> None:
    ran = workplace.run(*options)
    assert ran.code == 2 and said in " ".join(ran.err.replace("│", " ").split())
    assert not workplace.warehouse.exists()


def test_dates_are_all_of_them() -> None:
    dates = Dates.parse("2026-02-27..2026-03-01")
    assert [day.day for day in dates] == [27, 28, 1]
    assert (len(dates), str(dates)) == (3, "2026-02-27..2026-03-01")


# -- republish -----------------------------------------------------------------------------------------------


def test_republish_writes_what_is_published_already(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    recs, version = workplace.recs(), workplace.version()
    ran = workplace.run("--run-id", "r2", "--republish")
    assert ran.summary["unchanged"] and ran.summary["sinks"]["delta"]["status"] == "published"
    assert (workplace.recs(), workplace.version()) == (recs, version + 1)
    assert workplace.run().summary["sinks"]["delta"]["status"] == "unchanged"
