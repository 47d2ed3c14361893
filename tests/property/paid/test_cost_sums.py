"""However what was paid is grouped, it adds up to the same: nothing counted twice, left out, or taken for nothing."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import chain, combinations
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.cache.base import ENTRY_SCHEMA, RunRecord
from featurekit_spark.report.cost import DIMENSIONS, Spent, spent_in, summed

GROUPINGS = list(chain.from_iterable(combinations(DIMENSIONS, size) for size in range(len(DIMENSIONS) + 1)))
START = datetime(2026, 1, 1, tzinfo=UTC)
AMOUNTS = st.none() | st.floats(0, 100)


@st.composite
def lots(draw: Any) -> Spent:
    calls = draw(st.integers(1, 50))
    usd = draw(st.none() | st.decimals(0, 10**6, places=12))
    return Spent(
        draw(st.sampled_from(["A", "B"])),
        draw(st.sampled_from([None, "abt", "buy"])),
        draw(st.sampled_from([None, "m", "n"])),
        draw(st.sampled_from([None, date(2026, 1, 1), date(2026, 1, 2)])),
        calls=calls,
        failed=draw(st.integers(0, calls)),
        tokens=draw(st.none() | st.integers(0, 10**9)),
        usd=usd,
        unpriced=calls if usd is None else draw(st.integers(0, calls - 1)),
        seconds=draw(st.integers(0, 1000)),
        removed=draw(st.integers(0, calls)),
        estimated_tokens=draw(st.integers(0, 10**9)),
        attempts=draw(st.integers(0, 100)),
        failed_attempts=draw(st.integers(0, 100)),
    )


def amounts(sums: list[Spent]) -> tuple[Any, ...]:
    whole = sum(sums, Spent())
    counts = whole.calls, whole.failed, whole.tokens, whole.usd, whole.unpriced, whole.seconds, whole.removed
    return *counts, whole.estimated_tokens, whole.attempts, whole.failed_attempts


@given(st.lists(lots(), max_size=12))
def test_every_grouping_adds_up_to_the_total(found: list[Spent]) -> None:
    total = amounts(found)
    for by in GROUPINGS:
        sums = summed(found, by)
        assert amounts(sums) == total, by
        names = [tuple(getattr(row, name) for name in by) for row in sums]
        assert len(set(names)) == len(names)
        assert all((row.usd is None) == (row.unpriced == row.calls) for row in sums)


@st.composite
def entries(draw: Any) -> dict[str, Any]:
    number = draw(st.integers(0, 30))
    builder = draw(st.sampled_from(["Paid", "Free"]))
    failed = draw(st.booleans())
    paid = builder == "Paid" and not failed
    return {
        "builder": builder,
        "key": f"[{number}]",
        "config_hash": draw(st.sampled_from(["c1", "c2", "c3"])),
        "ts": START,
        "entry_id": f"{number}",
        "run_id": draw(st.sampled_from(["r1", "r2", "gone"])),
        "status": "error" if failed else "ok",
        "error": f"{draw(st.sampled_from([builder, 'Input']))}[{number}]: no" if failed else None,
        "seconds": draw(st.floats(0, 9)),
        "tokens": draw(st.none() | st.integers(0, 1000)) if paid else None,
        "usd": draw(AMOUNTS) if paid else None,
        "attempts": draw(st.none() | st.integers(0, 6)),
        "recorded": int(START.timestamp() * 1e9) + draw(st.integers(0, 3)) * 86_400 * 10**9,
    }


@st.composite
def appended(draw: Any) -> list[dict[str, Any]]:
    """An entry as often as runs have appended it: each at its time, and as it knew how long it took."""
    row, more = draw(entries()), draw(st.lists(entries(), max_size=2))
    return [row, *({**row, "seconds": copy["seconds"], "recorded": copy["recorded"]} for copy in more)]


def requests(row: dict[str, Any]) -> int:
    return 1 if row["attempts"] is None else int(row["attempts"])


def record(run_id: str, merchant: str, calls: int) -> RunRecord:
    facts = {"config_hash": "c1", "config": "C.Config(model='m')", "paid": True, "calls": calls, "usd": 1.5}
    facts |= {"tokens": 3, "estimated_tokens": 2}
    told = {"builders": {"Paid": facts, "Free": {"config_hash": "f", "paid": False}}}
    return RunRecord(run_id, json.dumps([merchant, "US"]), START, "ok", told, int(START.timestamp() * 1e9))


@given(st.lists(appended(), max_size=30), st.integers(0, 40), st.integers(0, 40))
def test_every_call_is_counted_once(copies: list[list[dict[str, Any]]], first: int, second: int) -> None:
    rows = [row for of_one in copies for row in of_one]
    table = pa.Table.from_pylist(rows, schema=ENTRY_SCHEMA)
    records = [record("r1", "abt", first), record("r2", "buy", second)]
    found = spent_in(table, records, merchants={"gone": "abt", "r2": "somebody"})
    own = [
        row
        for row in rows
        if row["builder"] == "Paid" and (row["status"] == "ok" or row["error"].startswith("Paid["))
    ]
    same = ("entry_id", "run_id", "config_hash", "status", "tokens", "usd")
    calls = {(*(row[name] for name in same), requests(row)): row for row in own}.values()
    by_run = {run: sum(row["run_id"] == run for row in calls) for run in ("r1", "r2", "gone")}
    expected = max(by_run["r1"], first) + max(by_run["r2"], second) + by_run["gone"]
    (total,) = summed(found, ()) or [Spent()]
    assert total.calls == expected
    assert total.failed == sum(row["status"] == "error" for row in calls)
    assert total.removed == expected - len(calls)
    assert total.estimated_tokens <= min(total.tokens or 0, 4)
    assert total.failed_attempts <= total.attempts
    if not total.removed:
        tried = list(map(requests, calls))
        assert total.attempts == sum(tried)
        answered = sum(row["status"] == "ok" and many > 0 for row, many in zip(calls, tried, strict=True))
        assert total.failed_attempts == sum(tried) - answered
        assert total.tokens == sum(row["tokens"] or 0 for row in calls) or total.tokens is None
        assert total.unpriced == sum(row["usd"] is None for row in calls)
        usd = sum(Decimal(str(row["usd"])) for row in calls if row["usd"] is not None)
        assert abs((total.usd or 0) - usd) < Decimal("1e-9")
    assert {row.builder for row in found} <= {"Paid"}
    assert {row.merchant for row in found} <= {"abt", "buy"}
    by_merchant = {row.merchant: row.calls for row in summed(found, ("merchant",))}
    assert by_merchant.get("buy", 0) == max(by_run["r2"], second)
