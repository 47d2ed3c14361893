"""The journal of paid answers: durable as they come, found by the next attempt, taken in by the next run."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.invalidate import invalidate
from featurekit_spark.cache.journal import Journal, take_in
from featurekit_spark.errors import CacheError, FeaturekitError
from featurekit_spark.testing.behaviour import entry, rows
from tests.paid_shop import MICRO_BATCH, Counter, Use, run

ROOT = Path(__file__).resolve().parents[3]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def journal_of(cache: DeltaCache, run_id: str = "run-1") -> Journal:
    journal = cache.journal(run_id, size=2)
    assert journal is not None
    journal.begin()
    return journal


def test_answers_are_found_by_a_later_attempt(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    lamp, sofa = entry("a", "lamp"), entry("b", "sofa")
    first = journal_of(cache)
    first.add(rows(lamp))
    later = journal_of(cache)
    wanted = {lamp.key: lamp.entry_id, sofa.key: sofa.entry_id}
    assert {key: found.value for key, found in later.find("Title", wanted).items()} == {lamp.key: b"lamp"}
    assert later.find("Other", wanted) == {}
    assert later.find("Title", {lamp.key: sofa.entry_id}) == {}
    assert journal_of(cache, "run-2").find("Title", wanted) == {}


def test_what_a_dead_run_left_is_taken_in_once(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    known = entry("a", "lamp")
    cache.append(rows(known))
    dead = journal_of(cache)
    dead.add(rows(entry("a", "another lamp"), entry("b", "sofa")))
    assert take_in(cache, now=NOW) == 1  # the cache has an answer to the other one, and keeps it
    assert cache.current("Title", "c1", [known.key])[known.key].entry.value == b"lamp"
    assert len(cache.history("Title")) == 2
    assert take_in(cache, now=NOW) == 0
    assert not (tmp_path / "cache/journal/run-1").exists()


def test_a_run_that_goes_on_keeps_its_journal(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    alive = journal_of(cache)
    with alive.opened():
        alive.add(rows(entry("a", "lamp")))
        assert take_in(cache, now=NOW) == 1  # what one paid for is the others' as well
        assert (tmp_path / "cache/journal/run-1").exists()
    assert not list((tmp_path / "cache/journal").iterdir())


def test_a_run_that_failed_leaves_it_to_the_next(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    journal = journal_of(cache)
    with suppress(ZeroDivisionError), journal.opened():
        journal.add(rows(entry("a", "lamp")))
        raise ZeroDivisionError
    assert take_in(cache, now=NOW) == 1
    assert not list((tmp_path / "cache/journal").iterdir())


def test_a_torn_file_is_passed_over(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    journal_of(cache).add(rows(entry("a", "lamp")))
    folder = tmp_path / "cache/journal/run-1"
    (whole,) = {*folder.glob("*.arrow")} - {folder / "begun.arrow"}
    (folder / ".torn.part").write_bytes(whole.read_bytes()[:99])
    assert take_in(cache, now=NOW) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_paid(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/journal").write_text("a file where the folder should be")
    with pytest.raises(CacheError, match="could not be kept in the journal"):
        journal_of(cache)


def test_the_run_itself_begins_it_where_nobody_did(tmp_path: Path) -> None:
    """For calls outside of stages that pay: of sources, and of hand-written gets."""
    cache = DeltaCache(str(tmp_path / "cache"))
    journal = cache.journal("run-1", size=2)
    assert journal is not None
    journal.add(rows(entry("a", "lamp")))
    assert journal.seen() and take_in(cache, now=NOW) == 1


def test_workers_that_outlive_their_run_add_nothing_that_nobody_takes_in(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    orphan = pickle.loads(pickle.dumps(journal_of(cache)))
    assert orphan.seen()
    orphan.add(rows(entry("a", "lamp")))
    assert take_in(cache, now=NOW) == 1
    with pytest.raises(CacheError, match="journal .*run-1 is closed.* No further calls"):
        orphan.add(rows(entry("b", "sofa")))
    assert orphan.seen()  # else it would go on without a journal
    assert not list((tmp_path / "cache/journal").iterdir())


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, 37, 150])
def test_a_killed_run_repeats_no_more_than_twice_the_calls_in_flight(tmp_path: Path, kill_at: int) -> None:
    cache, log = DeltaCache(str(tmp_path / "cache")), tmp_path / "calls"
    command = [sys.executable, "-m", "tests.paid_shop", cache.path, str(log), "160", str(kill_at)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = Counter(log, 160).asked()
    assert len(before) == kill_at
    counter = Counter(tmp_path / "calls again", 160)
    result = run(cache, counter)
    assert result.status == "ok" and len(result.values(Use)) == 160
    after = counter.asked()
    assert set(before) | set(after) == {f"p{i}" for i in range(160)}
    assert len(set(before) & set(after)) <= 2 * MICRO_BATCH
    assert len(after) == len(set(after)) == result.builders["Ask"].calls
    assert not list((tmp_path / "cache/journal").iterdir())
    assert run(cache, counter).builders["Use"].hit == 160
    assert counter.asked() == after


def test_a_full_disk_ends_the_run_and_the_calls(tmp_path: Path) -> None:
    """The process may write no file as large as the one that the micro-batch at a third of the run needs."""
    cache, log = DeltaCache(str(tmp_path / "cache")), tmp_path / "calls"
    command = [sys.executable, "-m", "tests.paid_shop", cache.path, str(log), "300", "0", "1000000"]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert full.returncode == 1
    assert "CacheError: " in full.stderr.splitlines()[-1], full.stderr
    assert "could not be kept in the journal" in full.stderr and "File too large" in full.stderr
    before = Counter(log, 300).asked()
    assert 100 < len(before) <= 100 + 2 * MICRO_BATCH
    second = Counter(tmp_path / "calls again", 300)
    result = run(cache, second)
    assert (result.status, len(result.values(Use))) == ("ok", 300)
    after = second.asked()
    assert set(before) | set(after) == {f"p{i}" for i in range(300)}
    assert 0 < len(set(before) & set(after)) <= 2 * MICRO_BATCH
    assert len(after) == len(set(after))


def test_a_journal_that_cannot_be_written_to_costs_no_call(tmp_path: Path) -> None:
    cache, counter = DeltaCache(str(tmp_path / "cache")), Counter(tmp_path / "calls", 20)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/journal").write_text("a file where the folder should be")
    with pytest.raises(FeaturekitError, match="journal"):
        run(cache, counter)
    assert counter.asked() == []
    (tmp_path / "cache/journal").unlink()
    assert run(cache, counter).status == "ok"
    assert len(counter.asked()) == 20


def test_a_newer_answer_to_the_same_request_is_taken_in(tmp_path: Path) -> None:
    """Asked again after its ttl, a request has the same identity and another answer."""
    cache = DeltaCache(str(tmp_path / "cache"))
    old = entry("a", "lamp")
    cache.append(rows(old))
    journal_of(cache).add(rows(replace(old, value=b"light", ts=old.ts + timedelta(days=1))))
    assert take_in(cache, now=NOW) == 1
    assert cache.current("Title", "c1", [old.key])[old.key].entry.value == b"light"
    journal_of(cache).add(rows(replace(old, value=b"older", ts=old.ts - timedelta(days=1))))
    assert take_in(cache, now=NOW) == 0


def test_a_damaged_file_is_put_aside_and_blocks_nobody(tmp_path: Path, caplog: Any) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    journal_of(cache).add(rows(entry("a", "lamp")))
    (tmp_path / "cache/journal/run-1/torn.arrow").write_bytes(b"ARROW1 and no more")
    assert take_in(cache, now=NOW) == 1
    assert "torn.arrow is damaged" in caplog.text
    assert (tmp_path / "cache/journal/damaged.run-1.torn.arrow").exists()
    assert take_in(cache, now=NOW) == 0


def test_a_lock_that_a_killed_run_left_goes(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    (tmp_path / "cache/journal").mkdir(parents=True)
    (tmp_path / "cache/journal/.run-9.lock").touch()
    assert take_in(cache, now=NOW) == 0
    assert not list((tmp_path / "cache/journal").iterdir())


def test_invalidated_answers_do_not_come_back(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "lamp")))
    journal_of(cache).add(rows(entry("b", "sofa")))
    invalidate(cache, "Title", None, reason="wrong", now=NOW)
    assert take_in(cache, now=NOW) == 0
    assert len(cache.ids("Title")) == 0
