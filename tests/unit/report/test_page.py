"""What stands on the page of a run."""

from __future__ import annotations

import re
from typing import Any

import pytest

from featurekit_spark.report.page import run_page
from tests.unit.report.reading import Read, counts, document, read


def test_a_row_per_builder_that_was_asked_with_what_it_cost_and_a_bar() -> None:
    found = document(
        builders={
            "LLMCompletion": counts(hit=6, computed=3, error=1, calls=4, tokens=1234, usd=0.5, seconds=2.0),
            "LLMLogic": counts(hit=1000),
            "ProductIds": counts(),
        }
    )
    page = run_page(found)
    told = Read(page)
    assert 'aria-label="6 hit, 3 computed, 1 error"' in page and 'class="hit" style="width:60.0%"' in page
    assert " LLMCompletion 6 3 1 4 1,234 0.5000 2.00 s" in re.sub(" +", " ", told.sections["Builders"])
    assert "Not asked for anything: ProductIds." in told.sections["Builders"]
    assert "Hits 1,006 100 %" in re.sub(" +", " ", told.sections["abt US ok"])
    assert "USD 0.5000" in told.sections["abt US ok"]
    assert "Empty" not in told.sections["Builders"]  # no key was


def test_values_carried_over_are_shown_where_a_record_knows_of_them() -> None:
    assert "pdated" not in read(document(builders={"A": counts(computed=1)})).text
    found = document(builders={"A": counts(computed=1, updated=3)})
    told = read(found)
    assert (
        "updated: carried over from the value before" in told.text
        and "Updated 3" in told.sections["abt US ok"]
    )
    assert 'class="updated" style="width:75.0%"' in run_page(found)


def test_a_price_that_nobody_knows_is_not_nothing() -> None:
    told = read(document(builders={"A": counts(computed=1, calls=1, usd=None), "B": counts(hit=1)}))
    assert "USD unknown" in told.sections["abt US ok"]
    assert "Calls" not in read(document(builders={"A": counts(computed=1)})).sections["Builders"]


def test_failed_keys_are_told_by_their_causes() -> None:
    errors = {f'["abt","US","p{n}"]': f'LLMCompletion["say p{n}"]: status 400: no' for n in range(30)}
    errors['["abt","US","q"]'] = 'LLMLogic["abt","US","q"]: ValueError: no q'
    told = read(document(status="partial", products=40, errors=errors))
    failed = told.sections["Failed keys"]
    assert failed.count("LLMCompletion: status 400: no") == 1 and "LLMLogic: ValueError: no q" in failed
    assert 'LLMCompletion["say p3"]: status 400: no' in failed  # key by key, below
    assert "6 more." in failed
    assert "31 of 40 keys failed." in told.text and "Failed keys 31" in told.sections["abt US partial"]


def test_many_failed_keys_are_counted_as_far_as_they_are_kept() -> None:
    errors = {f"[{number}]": f"A[{number}]: reason {number % 12}" for number in range(1000)}
    told = read(document(errors=errors))
    assert "Among the first 100 of 1,000 failed keys. 2 more errors." in told.sections["Failed keys"]
    assert "975 more." in told.sections["Failed keys"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"status": "failed", "error": "no disk", "exit_code": 4},
            "ended before its end. exit code 4: data quality",
        ),
        (
            {"status": "stopped", "error": "max_calls=2", "exit_code": 75},
            "stopped at its own limit. exit code 75: run",
        ),
        ({"unchanged": True}, "Nothing had changed."),
        ({"warnings": ["LLMLogic has 1292 keys"]}, "Warnings LLMLogic has 1292 keys"),
        ({"run_date": "2026-01-05"}, "Run nightly-1 · for 2026-01-05 · started 2026-01-31 12:00:00 UTC"),
    ],
)
def test_how_it_ended_is_said_at_the_top(changes: dict[str, Any], said: str) -> None:
    told = next(
        body for heading, body in read(document(**changes)).sections.items() if heading.startswith("abt")
    )
    assert said in re.sub(r"\s+", " ", told)


def test_time_that_no_stage_accounts_for_is_told_and_short_stages_are_one() -> None:
    stages = [{"stage": name, "seconds": spent} for name, spent in (("Dear", 130.0), ("A", 0.1), ("B", 0.1))]
    sinks = {"delta": {"status": "published", "rows": 1, "seconds": 10.0, "run_id": "r0"}}
    told = read(document(stages=stages, sinks=sinks, wall_seconds=190.1))
    assert re.sub(r"\s+", " ", told.sections["Time"]).strip() == (
        "Stage Took Share Dear 2 min 10 s publish delta 10.0 s outside of finished stages 49.9 s "
        "2 shorter ones 0.20 s"
    )
    assert "r0.html" in told.links  # whose answers the output holds


def test_settings_that_somebody_set_come_first() -> None:
    found = document()
    found["settings"] = [
        {"key": "a", "value": 1, "origin": "default"},
        {"key": "b", "value": None, "origin": "--set b"},
    ]
    told = read(found).sections["Settings (1 of 2 set)"]
    assert told.index("b") < told.index("default") and "none" in told
