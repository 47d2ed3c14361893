"""Old prompts and answers leave the cache: not a byte of them is left, and what was paid for is still found."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from featurekit_spark.cache.base import TraceRow
from featurekit_spark.cache.care import reading
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import hashed_key
from featurekit_spark.cache.promote import promote
from featurekit_spark.cache.purge import plan_purge
from featurekit_spark.cache.retention import EXPIRED, Retention, forgotten, retain
from featurekit_spark.cache.show import show
from featurekit_spark.cache.verify import verify
from featurekit_spark.errors import LockedError
from featurekit_spark.fingerprint import key_json
from featurekit_spark.report.cost import paid_lots, summed
from tests.letter_shop import NAMES, Desk, Initial, run

LATER = datetime.now(UTC) + timedelta(days=40)
MONTH = timedelta(days=30)


@pytest.fixture
def cache(tmp_path: Path) -> DeltaCache:
    return DeltaCache(str(tmp_path / "cache"))


def texts_in(cache: DeltaCache, *tables: str) -> str:
    """Everything that the tables' files hold, logs and earlier versions included."""
    found = []
    for table in tables:
        for path in sorted(Path(cache.table_path(table)).rglob("*")):
            if path.suffix == ".parquet":
                found.append(str(pq.read_table(path, partitioning=None).to_pylist()))
            elif path.is_file():
                found.append(path.read_text(errors="replace"))
    return "\n".join(found)


def spent(cache: DeltaCache) -> list[Any]:
    return summed(paid_lots(cache), ("builder", "day"))


def test_a_prompt_becomes_a_hash_by_which_its_answer_is_found(cache: DeltaCache) -> None:
    desk = Desk()
    run(cache, desk)
    before = spent(cache)
    assert "write to Ada" in texts_in(cache, "entries")
    report = retain(cache, Retention(MONTH), now=LATER)
    assert report == {
        "prompts": {"Ask": 3}, "answers": {}, "repeated_in": {"Letter": 3}, "traces": 0, "dry_run": False,
    }  # fmt: skip
    assert "write to" not in texts_in(cache, "entries", "traces")
    assert spent(cache) == before and not verify(cache).damage
    assert run(cache, desk).unchanged
    desk.names["p3"] = "Barbara"
    assert run(cache, desk, Initial).values(Initial) == {
        ("a", f"p{i}"): name[0] for i, name in enumerate([*NAMES, "Barbara"])
    }
    assert len(desk.asked) == 4, "only the new prompt was asked"
    assert not [row for row in cache.trace_rows("Ask").to_pylist() if row["kind"] == "pointer"]
    shown = show(cache, "Ask", key_json(("write to Ada",)))
    assert [(entry["current"], entry["value"]) for entry in shown["entries"]] == [(True, "Dear Ada of old")]


def test_what_is_asked_for_by_a_hash_is_current_as_before(cache: DeltaCache) -> None:
    run(cache, Desk())
    (config,) = set(cache.history("Ask")["config_hash"].to_pylist())
    key = key_json(("write to Ada",))
    before = cache.current("Ask", config, [key])[key]
    retain(cache, Retention(MONTH), now=LATER)
    after = DeltaCache(cache.path)
    for found in (
        after.current("Ask", config, [key])[key],
        after.find("Ask", config, {key: before.entry.entry_id})[key],
        after.candidates("Ask", config, [key])[0],
    ):
        assert found == before
    assert {row["key"] for row in after.newest("Ask").to_pylist()} == {
        hashed_key(key_json((f"write to {name}",))) for name in NAMES
    }


def test_what_points_to_an_entry_still_does(cache: DeltaCache) -> None:
    run(cache, Desk())
    (row,) = [row for row in cache.history("Ask").to_pylist() if "Ada" in row["key"]]
    place = (row["key"], row["config_hash"])
    cache.append(None, [TraceRow("Ask", "pointer", *place, LATER, "emptied")])  # to nothing
    assert cache.current("Ask", place[1], [place[0]]) == {}
    cache.append(None, [TraceRow("Ask", "pointer", *place, LATER, "back", entry_id=row["entry_id"])])
    before = cache.current("Ask", place[1], [place[0]])
    assert retain(cache, Retention(MONTH), now=LATER)["traces"] == 2
    assert "write to" not in texts_in(cache, "traces")
    assert DeltaCache(cache.path).current("Ask", place[1], [place[0]]) == before != {}


def test_many_keys_are_looked_up_by_their_hashes_too(cache: DeltaCache) -> None:
    desk = Desk({f"p{i:05}": f"N{i:05}" for i in range(5_200)})
    run(cache, desk)
    retain(cache, Retention(MONTH), now=LATER)
    run(cache, desk, Initial)
    assert len(desk.asked) == 5_200


def test_an_answer_goes_and_its_price_stays(cache: DeltaCache) -> None:
    desk = Desk()
    run(cache, desk)
    before = spent(cache)
    report = retain(cache, Retention(MONTH, answers=True), now=LATER)
    assert report["answers"] == {"Ask": 3} == report["prompts"]
    assert "Dear" not in texts_in(cache, "entries", "traces") and "write to" not in texts_in(cache, "entries")
    rows = cache.history("Ask").to_pylist()
    assert {(row["status"], row["value"], row["usd"], bool(row["value_hash"])) for row in rows} == {
        (EXPIRED, None, 0.25, True)
    }
    assert spent(cache) == before and not verify(cache).damage
    assert run(cache, desk).unchanged and len(desk.asked) == 3, "what was made of them stands"
    assert run(cache, desk, Initial).status == "ok"
    assert len(desk.asked) == 6, "whatever needs an answer again asks again"
    assert summed(paid_lots(cache), ())[0].calls == 6
    assert not any(retain(cache, Retention(MONTH, answers=True), now=datetime.now(UTC)).values())


def test_answers_alone(cache: DeltaCache) -> None:
    desk = Desk()
    run(cache, desk)
    report = retain(cache, Retention(MONTH, prompts=False, answers=True), now=LATER)
    assert report == {"prompts": {}, "answers": {"Ask": 3}, "repeated_in": {}, "traces": 0, "dry_run": False}
    told = texts_in(cache, "entries")
    assert "Dear" not in told and "write to Ada" in told


def test_young_texts_stay_and_a_prompt_is_as_old_as_its_newest_entry(cache: DeltaCache) -> None:
    desk = Desk()
    run(cache, desk)
    assert not any(retain(cache, Retention(MONTH, answers=True), now=datetime.now(UTC)).values())
    retain(cache, Retention(MONTH), now=LATER)
    run(cache, desk, Initial)  # makes the prompts again, and finds their answers
    assert "write to Ada" in texts_in(cache, "entries")
    report = retain(cache, Retention(MONTH), now=LATER)
    assert report["prompts"] == {} and report["repeated_in"] == {"Letter": 3}
    assert "write to Ada" not in texts_in(cache, "entries")


def test_errors_are_forgotten_but_for_their_kind(cache: DeltaCache) -> None:
    desk = Desk(refused=frozenset({"write to Grace"}))
    assert run(cache, desk).builders["Ask"].error == 1
    before = spent(cache)
    report = retain(cache, Retention(MONTH, answers=True), now=LATER)
    assert report["prompts"] == {"Ask": 3} and report["repeated_in"] == {"Length": 1, "Letter": 3}
    assert "write to Grace" not in texts_in(cache, "entries", "traces")
    (error,) = [row["error"] for row in cache.history("Ask").to_pylist() if row["status"] == "error"]
    assert error.startswith('Ask["sha256:') and error.endswith(
        "]: [terminal, 2 attempts] its text is no longer kept"
    )
    assert spent(cache) == before
    again = run(cache, desk, Initial)
    assert again.builders["Ask"].remembered == 1, "it is not asked again"
    assert "write to Grace" not in desk.asked[3:]


def test_looking_changes_nothing(cache: DeltaCache) -> None:
    run(cache, Desk())
    before = texts_in(cache, "entries", "traces", "runs")
    rule = Retention(MONTH, answers=True)
    looked = retain(cache, rule, now=LATER, dry_run=True)
    assert texts_in(cache, "entries", "traces", "runs") == before
    assert {**retain(cache, rule, now=LATER), "dry_run": True} == looked


def test_it_is_refused_while_a_run_reads(cache: DeltaCache) -> None:
    run(cache, Desk())
    with reading(cache.path), pytest.raises(LockedError):
        retain(cache, Retention(MONTH), now=LATER)


def test_what_a_dead_run_left_is_taken_in_first(cache: DeltaCache) -> None:
    run(cache, Desk())
    rows = cache.history("Ask").slice(0, 1).drop(["recorded"])
    journal = cache.journal("dead", size=1)
    assert journal is not None
    journal.begin()
    journal.add(rows)
    retain(cache, Retention(MONTH), now=LATER)
    assert not list(Path(str(cache.journals)).rglob("*.arrow"))


def test_a_crash_in_between_is_made_good_by_the_next_time(
    cache: DeltaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featurekit_spark.cache import files

    desk, whole, calls = Desk(), files.remove_rows, 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("power cut")
        return whole(*args, **kwargs)

    run(cache, desk)
    monkeypatch.setattr(files, "remove_rows", dies)
    with pytest.raises(OSError, match="power cut"):
        retain(cache, Retention(MONTH), now=LATER)
    monkeypatch.undo()
    run(cache, desk, Initial)
    assert len(desk.asked) == 3
    retain(cache, Retention(MONTH), now=LATER)
    assert "write to" not in texts_in(cache, "entries", "traces")


def test_purge_finds_a_hashed_prompt_by_its_text(cache: DeltaCache) -> None:
    desk = Desk()
    run(cache, desk)
    retain(cache, Retention(MONTH), now=LATER)
    run(cache, desk, Initial)
    plan = plan_purge(cache, [("a", "p0")], texts=True)
    assert plan.report["entries"]["Ask"] == 1


def test_a_cache_that_it_is_promoted_to_finds_it_as_well(cache: DeltaCache, tmp_path: Path) -> None:
    desk, below = Desk(), DeltaCache(str(tmp_path / "below"))
    run(cache, desk)
    retain(cache, Retention(MONTH), now=LATER)
    promote(cache, below)
    assert "write to" not in texts_in(below, "entries", "traces")
    run(below, desk, Initial)
    assert len(desk.asked) == 3


def test_errors_that_are_nobodys_stay_as_they_are() -> None:
    assert forgotten('Other["a"]: no', {"Ask"}) == 'Other["a"]: no'
    assert forgotten("Ask: no", {"Ask"}) == "Ask: no"
    assert forgotten('Ask["a": broken', {"Ask"}) == "Ask: its text is no longer kept"
    once = forgotten('Ask["a ] b"]: [retryable, 3 attempts] a ] b is too much', {"Ask"})
    assert (
        once == f"Ask{hashed_key(json.dumps(['a ] b']))}: [retryable, 3 attempts] its text is no longer kept"
    )
    assert forgotten(once, {"Ask"}) == once
