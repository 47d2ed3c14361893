"""`featurekit outputs rollback`, over what the main job published."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from featurekit_spark.cli import app

Workplace = Any


def rollback(workplace: Workplace, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(
        app,
        [
            *("outputs", "rollback", *arguments, "--merchant", "abt", "--market", "US"),
            *("--set", f"warehouse={workplace.warehouse}"),
        ],
    )
    return done.exit_code, done.stdout, done.stderr


def test_back_to_an_earlier_run_and_on_from_there(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    before = workplace.published()
    workplace.run("--run-id", "r2", "--set", "search.top_k=2")
    after, version = workplace.recs(), workplace.version()

    code, out, err = rollback(workplace, "r1", "--dry-run")
    assert (code, err) == (0, "")
    assert out == "abt US: would go back to run r1\n  sink delta: r2 -> r1, 6 rows (delta version 1)\n"
    assert (workplace.recs(), workplace.version()) == (after, version)

    found = json.loads(rollback(workplace, "r1", "--output", "json")[1])
    assert found["sinks"]["delta"] == {
        "from": "r2",
        "to": "r1",
        "rows": 6,
        "how": "delta version 1",
        "changed": True,
    }
    assert workplace.published() == before

    again = workplace.run("--run-id", "r3", "--set", "search.top_k=2")
    assert again.computed == 0 and again.summary["sinks"]["delta"]["status"] == "published"
    assert workplace.recs() == after


def test_back_to_the_run_whose_answers_stand_already(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    version = workplace.version()
    said = rollback(workplace, "r1")[1]
    assert "r1 -> r1, 6 rows (holds it already)" in said and "the next run" not in said
    assert workplace.version() == version
    assert workplace.run().summary["sinks"]["delta"]["status"] == "unchanged"


def test_a_run_that_found_everything_published_means_what_stood_then(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    before = workplace.published()
    workplace.run("--run-id", "r2")
    workplace.run("--run-id", "r3", "--set", "search.top_k=2")
    code, out, _ = rollback(workplace, "r2")
    assert code == 0 and "r3 -> r1" in out
    assert "run r2 left the rows of run r1 there" in out and "the next run publishes what it computes" in out
    assert workplace.published() == before


def test_a_run_that_is_not_known(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    code, out, err = rollback(workplace, "r9", "--output", "json")
    assert code == 2 and "cannot go back to run 'r9'" in err and "known: r1" in err
    assert json.loads(out)["exit_code"] == 2


def test_latest_is_the_last_run_that_finished(workplace: Workplace) -> None:
    workplace.run("--run-id", "r1")
    before = workplace.published()
    workplace.catalog({"p1": "a new lamp"})
    assert workplace.run("--run-id", "r2", "--max-calls", "0").code == 75
    code, out, err = rollback(workplace, "latest")
    assert (code, err) == (0, "") and "went back to run r1" in out
    code, out, err = rollback(workplace, "r2")
    assert code == 2 and "run 'r2' stopped before its end and published nothing" in err
    assert "The last run that published is 'r1'" in err
    assert workplace.published() == before


def test_a_first_run_that_stopped_has_nothing_to_go_back_to(workplace: Workplace) -> None:
    assert workplace.run("--run-id", "r1", "--max-calls", "0").code == 75
    for run in ("r1", "latest"):
        code, _, err = rollback(workplace, run)
        assert code == 2 and "No run before it published anything" in err
