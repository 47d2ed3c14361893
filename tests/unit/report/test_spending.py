"""What a run's page says of money: bars by builder and by day, with figures that say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurekit_spark.report.page import run_page
from featurekit_spark.report.spending import by_day
from featurekit_spark.report.store import RunStore
from tests.unit.report.reading import EVIL, Read, counts, document


def cost(found: dict[str, Any]) -> str:
    return " ".join(Read(run_page(found)).sections.get("Cost", "").split())


def paid(day: int, usd: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    told = counts(computed=3, calls=3, tokens=90, usd=usd)
    return document(run_id=f"run-{day}", at=day * 24 * 60, builders={"LLMCompletion": told}, **changes)


def test_a_run_that_paid_for_nothing_has_no_such_section() -> None:
    assert "Cost" not in Read(run_page(document(builders={"A": counts(computed=1)}))).sections


def test_bars_are_shares_of_the_dearest_and_figures_stand_beside_them() -> None:
    found = document(
        builders={
            "LLMCompletion": counts(computed=3, calls=3, tokens=900, usd=0.5),
            "HostedEmbedding": counts(computed=9, calls=9, tokens=100, usd=0.05),
            "LLMLogic": counts(computed=9),
        }
    )
    page = run_page(found)
    assert "LLMCompletion 3 900 0.5000 HostedEmbedding 9 100 0.0500" in cost(found)
    assert "USD, as bars" in page and "LLMLogic" not in cost(found)
    section = page[page.index("<h2>Cost") : page.index("</section>", page.index("<h2>Cost"))]
    assert section.count('<i style="width:100.0%">') == 1 and '<i style="width:10.0%">' in section


def test_where_a_price_is_not_known_bars_are_tokens() -> None:
    found = document(
        builders={
            "A": counts(computed=1, calls=1, tokens=10, usd=None),
            "B": counts(computed=1, calls=1, tokens=20, usd=9.0),
        }
    )
    assert "A 1 10 unknown B 1 20 9.0000" in cost(found) and "Tokens, as bars" in cost(found)


def test_days_are_summed_over_the_last_runs(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    for day, usd in enumerate((0.5, 0.25, None)):
        store.write(paid(day, usd))
    store.write(paid(1, 0.75) | {"run_id": "again"})
    store.write(document(run_id="idle", at=9 * 24 * 60))
    latest = store.read("abt", "US", "again")
    days = [
        {"day": "2026-01-31", "runs": 1, "calls": 3, "tokens": 90, "usd": 0.5},
        {"day": "2026-02-01", "runs": 2, "calls": 6, "tokens": 180, "usd": 1.0},
        {"day": "2026-02-02", "runs": 1, "calls": 3, "tokens": 90, "usd": None},
    ]
    assert latest["spending"] == days
    assert "2026-01-31 1 3 90 0.5000 2026-02-01 2 6 180 1.0000 2026-02-02 1 3 90 unknown" in cost(latest)
    idle = store.read("abt", "US", "idle")  # it paid for nothing, the runs before it did
    assert idle["spending"] == days and "Calls of this run" not in run_page(idle)


def test_only_the_last_days_are_shown_and_old_summaries_are_read() -> None:
    runs = [
        {"started": f"2026-01-{day:02}T00:00:00Z", "calls_total": 1, "usd_total": 0.1} for day in range(1, 31)
    ]
    days = by_day(runs)
    assert [day["day"] for day in days] == [f"2026-01-{day}" for day in range(17, 31)]
    assert {day["tokens"] for day in days} == {None}  # runs were once listed without them
    assert by_day([{"started": None, "calls_total": 1}, {"started": "2026-01-01", "calls_total": 0}]) == []


def test_attempts_that_failed_are_told_where_there_were_any(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    told = counts(computed=3, calls=3, tokens=95, usd=0.5, attempts=5, failed_attempts=2)
    store.write(document(run_id="r1", builders={"LLMCompletion": told}))
    found = store.read("abt", "US", "r1")
    assert found["spending"][0]["failed_attempts"] == 2
    assert "LLMCompletion 3 2 95 0.5000" in cost(found) and "Failed attempts" in cost(found)
    assert "Failed attempts 2" in " ".join(Read(run_page(found)).text.split())
    assert "Failed attempts" not in run_page(paid(0))


def test_no_text_becomes_a_tag() -> None:
    found = document(builders={EVIL: counts(calls=1, usd=None)})
    tags = Read(run_page({**found, "spending": [{"day": EVIL, "runs": 1, "calls": 1}]})).tags
    assert "script" not in {tag for tag, _ in tags}
