"""The journal of paid answers: durable as they come, found by the next attempt, taken in by the next run; on a disk
and on an object store that only options open."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.elsewhere import Elsewhere
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.invalidate import invalidate
from featurekit_spark.cache.journal import Journal, take_in
from featurekit_spark.cache.liveness import SILENCE_S, alive, claimed
from featurekit_spark.errors import CacheError, ConfigError, FeaturekitError, LockedError
from featurekit_spark.testing.behaviour import entry, rows
from tests.paid_shop import MICRO_BATCH, Counter, Use, run
from tests.s3 import Store, s3_server

ROOT = Path(__file__).resolve().parents[3]
# One that pyarrow has no word for: then the storage is opened by deltalake.
OPTIONS: dict[str, dict[str, str]] = {"s3": {}, "s3 by deltalake": {"AWS_REQUEST_PAYER": "false"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with s3_server() as store:
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """Told nothing before, and nothing afterwards."""
    server.tell()
    yield server
    server.tell()


@pytest.fixture(params=["disk", *OPTIONS])
def cache(request: Any, tmp_path: Path) -> DeltaCache:
    if request.param == "disk":
        return DeltaCache(str(tmp_path / "cache"))
    options = {**request.getfixturevalue("store").options, **OPTIONS[request.param]}
    return DeltaCache(f"s3://lake/{tmp_path.name} {request.param}/cache", storage_options=options)


@pytest.fixture
def remote(store: Store, tmp_path: Path) -> DeltaCache:
    return DeltaCache(f"s3://lake/{tmp_path.name}/cache", storage_options=store.options)


def left(cache: DeltaCache) -> list[str]:
    """Files of journals, those that only say that a run goes on among them."""
    assert cache.journals is not None
    return sorted(info.path for info in cache.journals.infos(recursive=True) if info.is_file)


def journal_of(cache: DeltaCache, run_id: str = "run-1") -> Journal:
    journal = cache.journal(run_id, size=2)
    journal.begin()
    return journal


def test_answers_are_found_by_a_later_attempt(cache: DeltaCache) -> None:
    lamp, sofa = entry("a", "lamp"), entry("b", "sofa")
    first = journal_of(cache)
    first.add(rows(lamp))
    later = journal_of(cache)
    wanted = {lamp.key: lamp.entry_id, sofa.key: sofa.entry_id}
    assert {key: found.value for key, found in later.find("Title", wanted).items()} == {lamp.key: b"lamp"}
    assert later.find("Other", wanted) == {}
    assert later.find("Title", {lamp.key: sofa.entry_id}) == {}
    assert journal_of(cache, "run-2").find("Title", wanted) == {}


def test_answers_of_a_run_elsewhere_are_found_as_they_come(cache: DeltaCache) -> None:
    lamp, sofa = entry("a", "lamp"), entry("b", "sofa")
    journal, looking = journal_of(cache), Elsewhere(cache.journals, cache)
    with journal.opened():
        assert looking.find("Title", [lamp.entry_id]) == {}
        journal.add(rows(lamp))
        away = pickle.loads(pickle.dumps(looking))
        for one in (looking, away):
            found = one.find("Title", [lamp.entry_id, sofa.entry_id])
            assert {entry_id: answer.value for entry_id, answer in found.items()} == {lamp.entry_id: b"lamp"}


def test_what_a_dead_run_left_is_taken_in_once(cache: DeltaCache) -> None:
    known = entry("a", "lamp")
    cache.append(rows(known))
    dead = journal_of(cache)
    dead.add(rows(entry("a", "another lamp"), entry("b", "sofa")))
    assert take_in(cache) == 1  # the cache has an answer to the other one, and keeps it
    assert cache.current("Title", "c1", [known.key])[known.key].entry.value == b"lamp"
    assert len(cache.history("Title")) == 2
    assert take_in(cache) == 0
    assert not left(cache)


def test_a_run_that_goes_on_keeps_its_journal(cache: DeltaCache) -> None:
    alive = journal_of(cache)
    with alive.opened():
        alive.add(rows(entry("a", "lamp")))
        assert take_in(cache) == 1  # what one paid for is the others' as well
        assert any(name.startswith("run-1/") for name in left(cache))
    assert not left(cache)


def test_a_run_that_failed_leaves_it_to_the_next(cache: DeltaCache) -> None:
    journal = journal_of(cache)
    with suppress(ZeroDivisionError), journal.opened():
        journal.add(rows(entry("a", "lamp")))
        raise ZeroDivisionError
    assert take_in(cache) == 1
    assert not left(cache)


def test_a_torn_file_is_passed_over(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    journal_of(cache).add(rows(entry("a", "lamp")))
    folder = tmp_path / "cache/journal/run-1"
    (whole,) = {*folder.glob("*.arrow")} - {folder / "begun.arrow"}
    (folder / ".torn.part").write_bytes(whole.read_bytes()[:99])
    assert take_in(cache) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_paid(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/journal").write_text("a file where the folder should be")
    with pytest.raises(CacheError, match="could not be kept in the journal"):
        journal_of(cache)


def test_the_run_itself_begins_it_where_nobody_did(cache: DeltaCache) -> None:
    """For calls outside of stages that pay: of sources, and of hand-written gets."""
    journal = cache.journal("run-1", size=2)
    assert journal is not None
    journal.add(rows(entry("a", "lamp")))
    assert journal.seen() and take_in(cache) == 1


def test_workers_that_outlive_their_run_add_nothing_that_nobody_takes_in(cache: DeltaCache) -> None:
    orphan = pickle.loads(pickle.dumps(journal_of(cache)))
    assert orphan.seen()
    orphan.add(rows(entry("a", "lamp")))
    assert take_in(cache) == 1
    with pytest.raises(CacheError, match="journal .*run-1 is closed.* No further calls"):
        orphan.add(rows(entry("b", "sofa")))
    assert orphan.seen()  # else it would go on without a journal
    assert not left(cache)


def test_nothing_is_taken_away_while_a_run_may_bring_it_back(cache: DeltaCache) -> None:
    cache.append(rows(entry("a", "lamp")))
    alive = journal_of(cache)
    with alive.opened():
        alive.add(rows(entry("b", "sofa")))
        with pytest.raises(LockedError, match="run run-1 goes on, or was killed a short while ago"):
            invalidate(cache, "Title", None, reason="wrong", now=datetime(2026, 1, 1, tzinfo=UTC))
        alive.add(rows(entry("c", "desk")))
        assert len(cache.ids("Title")) == 1


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "kill_at"),
    [("disk", 1), ("disk", 37), ("disk", 150), ("s3", 37), ("s3 by deltalake", 150)],
    indirect=["cache"],
)
def test_a_killed_run_repeats_no_more_than_twice_the_calls_in_flight(
    cache: DeltaCache, tmp_path: Path, kill_at: int
) -> None:
    log = tmp_path / "calls"
    # What is secret stands in the environment of the process, and is no part of what it is given.
    secrets = {f"SHOP_{name}": text for name, text in cache.storage_options.items()}
    options = {name: f"${{env:SHOP_{name}}}" for name in cache.storage_options}
    command = [sys.executable, "-m", "tests.paid_shop", cache.path, str(log), "160", str(kill_at)]
    environment = {**os.environ, **secrets, "SHOP_OPTIONS": json.dumps(options)}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
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
    assert 100 <= len(before) < 200, "others go on while the write that fails is under way, and not for long"
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


def test_a_newer_answer_to_the_same_request_is_taken_in(cache: DeltaCache) -> None:
    """Asked again after its ttl, a request has the same identity and another answer."""
    old = entry("a", "lamp")
    cache.append(rows(old))
    journal_of(cache).add(rows(replace(old, value=b"light", ts=old.ts + timedelta(days=1))))
    assert take_in(cache) == 1
    assert cache.current("Title", "c1", [old.key])[old.key].entry.value == b"light"
    journal_of(cache).add(rows(replace(old, value=b"older", ts=old.ts - timedelta(days=1))))
    assert take_in(cache) == 0


def test_a_damaged_file_is_put_aside_and_blocks_nobody(cache: DeltaCache, caplog: Any) -> None:
    journal = journal_of(cache)
    journal.add(rows(entry("a", "lamp")))
    journal.folder.write("run-1/torn.arrow", b"ARROW1 and no more")
    assert take_in(cache) == 1
    assert "torn.arrow is damaged" in caplog.text
    assert left(cache) == ["damaged.run-1.torn.arrow"]
    assert take_in(cache) == 0


def test_a_lock_that_a_killed_run_left_goes(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    (tmp_path / "cache/journal").mkdir(parents=True)
    (tmp_path / "cache/journal/.run-9.lock").touch()
    assert take_in(cache) == 0
    assert not left(cache)


def test_invalidated_answers_do_not_come_back(cache: DeltaCache) -> None:
    cache.append(rows(entry("a", "lamp")))
    journal_of(cache).add(rows(entry("b", "sofa")))
    invalidate(cache, "Title", None, reason="wrong", now=datetime(2026, 1, 1, tzinfo=UTC))
    assert take_in(cache) == 0
    assert len(cache.ids("Title")) == 0


# -- where nothing can be locked -----------------------------------------------------------------------------


def test_a_run_without_a_beat_is_over(remote: DeltaCache, store: Store) -> None:
    """A killed run's beat stays behind: its answers are taken in at once, its journal goes once it was silent."""
    killed = journal_of(remote)
    with alive(killed.folder, killed.run_id):
        killed.add(rows(entry("a", "lamp")))
        beat = killed.folder.read(".run-1.alive")
    killed.folder.write(".run-1.alive", beat)
    assert take_in(remote) == 1 and take_in(remote) == 0
    assert ".run-1.alive" in left(remote) and "run-1/begun.arrow" in left(remote)
    store.tell(ahead_s=SILENCE_S + 5)
    assert take_in(remote) == 0
    assert not left(remote)


def test_a_run_that_beats_is_never_over(remote: DeltaCache, store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr("featurekit_spark.cache.liveness.BEAT_S", 0.05)
    journal = journal_of(remote)
    with journal.opened():
        journal.add(rows(entry("a", "lamp")))
        store.tell(ahead_s=SILENCE_S + 5)
        before = journal.folder.info(".run-1.alive").mtime
        for _ in range(100):
            if journal.folder.info(".run-1.alive").mtime > before:
                break
            sleep(0.05)
        assert take_in(remote) == 1
        journal.add(rows(entry("b", "sofa")))
    assert not left(remote)


def test_a_run_that_was_taken_for_dead_keeps_nothing_that_nobody_takes_in(
    remote: DeltaCache, store: Store
) -> None:
    """Its machine slept, say. What it was told is durable is in the cache; the rest it is not told."""
    journal = journal_of(remote)
    with suppress(CacheError), journal.opened():
        journal.add(rows(entry("a", "lamp")))
        store.tell(ahead_s=SILENCE_S + 5)
        assert take_in(remote) == 1
        with pytest.raises(CacheError, match="run-1 is closed.* No further calls"):
            journal.add(rows(entry("b", "sofa")))
        raise CacheError("as the run that it ends")
    assert [row["value"] for row in remote.history("Title").to_pylist()] == [b"lamp"]


def test_a_run_that_begins_while_it_is_taken_for_dead_keeps_what_it_was_told(
    remote: DeltaCache, store: Store, monkeypatch: Any
) -> None:
    """Its machine slept before the first call. Nothing was closed, so that its answers are durable when they come."""
    journal, read_all = remote.journal("run-1", size=2), Folder.read_all

    def wakes(folder: Folder, names: Any) -> Any:
        monkeypatch.setattr(Folder, "read_all", read_all)
        journal.folder.write(".run-1.alive", b"a beat")
        journal.add(rows(entry("a", "lamp")))
        return read_all(folder, names)

    with journal.opened():
        store.tell(ahead_s=SILENCE_S + 5)
        monkeypatch.setattr(Folder, "read_all", wakes)
        assert take_in(remote) == 0
        assert ".run-1.alive" in left(remote), "it goes on, and is seen to"
        journal.add(rows(entry("b", "sofa")))
        assert take_in(remote) == 2
    assert not left(remote)


class AskedMeanwhile(Folder):
    """Another run asks for the time as well, and removes what the first had written to know it."""

    asked = 0

    def info(self, name: str) -> Any:
        if name == ".clock" and AskedMeanwhile.asked > 0:
            AskedMeanwhile.asked -= 1
            self.remove(name)
        return super().info(name)


@pytest.mark.parametrize(("asked", "is_told"), [(0, True), (2, True), (100, False)])
def test_runs_that_begin_together_ask_for_the_time_at_once(
    remote: DeltaCache, store: Store, asked: int, is_told: bool
) -> None:
    assert remote.journals is not None
    folder = AskedMeanwhile(remote.journals.uri, remote.journals.options)
    with alive(folder, "run-1"):
        for ahead_s in (0, SILENCE_S + 5):
            folder.write(".run-1.alive", b"a beat")
            store.tell(ahead_s=ahead_s)
            AskedMeanwhile.asked = asked
            with claimed(folder, "run-1") as is_over:
                assert is_over == (is_told and ahead_s > 0), "nobody is over where the time is not told"
                folder.write(".run-1.alive", b"a beat")
            AskedMeanwhile.asked = 0
        assert left(remote) == [".run-1.alive"]


class ClosedMeanwhile(Journal):
    """Another run takes it in while a file is on its way."""

    def _write(self, name: str, rows: Any) -> None:
        super()._write(name, rows)
        if name != "begun":
            self.close()


def test_what_arrives_while_it_is_taken_in_is_not_acknowledged(cache: DeltaCache) -> None:
    journal = journal_of(cache)
    worker: Any = pickle.loads(pickle.dumps(journal))
    worker.__class__ = ClosedMeanwhile
    with pytest.raises(CacheError, match="run-1 is closed"):
        worker.add(rows(entry("a", "lamp")))
    assert take_in(cache) == 1  # kept all the same


def test_a_file_that_cannot_be_read_stays_where_it_is(
    remote: DeltaCache, store: Store, caplog: Any, monkeypatch: Any
) -> None:
    """An answer that was paid for is not damaged because its storage does not answer."""
    journal_of(remote).add(rows(entry("a", "lamp")))
    journal_of(remote, "run-2").add(rows(entry("b", "sofa")))
    store.tell(refused="GET .*/run-1/")
    assert take_in(remote) == 1
    assert "stays for a later one" in caplog.text
    journal = remote.journal("run-1", size=1)
    with pytest.raises(CacheError, match="cannot be read"):
        journal.find("Title", {"k": "i"})
    store.tell()
    assert take_in(remote) == 1
    assert not left(remote)


def test_a_store_that_refuses_to_write_costs_no_call(
    remote: DeltaCache, store: Store, tmp_path: Path
) -> None:
    counter = Counter(tmp_path / "calls", 20)
    store.tell(refused="PUT .*/journal/")
    with pytest.raises(CacheError, match="cannot be written to") as refused:
        run(remote, counter)
    assert counter.asked() == [] and store.secret_key not in str(refused.value)
    store.tell()
    assert run(remote, counter).status == "ok"
    assert len(counter.asked()) == 20


def test_where_nothing_may_be_removed_runs_go_on(
    remote: DeltaCache, store: Store, tmp_path: Path, caplog: Any
) -> None:
    journal_of(remote, "run-9").add(rows(entry("a", "lamp")))
    counter = Counter(tmp_path / "calls", 20)
    store.tell(refused="^(DELETE|POST) ")
    assert run(remote, counter).status == "ok"
    assert "run-9 stays open" in caplog.text and "is not removed" in caplog.text
    assert len(remote.history("Title")) == 1 and len(counter.asked()) == 20
    store.tell(ahead_s=SILENCE_S + 5, refused="^(DELETE|POST) ")
    assert take_in(remote) == 0
    store.tell(ahead_s=SILENCE_S + 5)
    assert take_in(remote) == 0
    assert not left(remote)


def test_a_store_that_nobody_reaches_costs_no_call(tmp_path: Path) -> None:
    with s3_server() as gone:
        options = {**gone.options, "max_retries": "1", "retry_timeout": "1s"}
    cache, counter = DeltaCache("s3://lake/cache", storage_options=options), Counter(tmp_path / "calls", 20)
    with pytest.raises(CacheError) as unreachable:
        run(cache, counter)
    assert counter.asked() == [] and gone.secret_key not in str(unreachable.value)


class Refusing(Counter):
    """From a call on, the store takes no more answers."""

    def __init__(self, log: Path, prompts: int, store: Store, from_call: int) -> None:
        super().__init__(log, prompts)
        self.store, self.from_call = store, from_call

    def call(self, prompt: str) -> str:
        if self.calls == self.from_call:
            self.store.tell(refused="PUT .*/journal/")
        return super().call(prompt)


def test_a_store_that_takes_no_more_ends_the_run_and_the_calls(
    remote: DeltaCache, store: Store, tmp_path: Path
) -> None:
    first = Refusing(tmp_path / "calls", 200, store, 60)
    with pytest.raises(CacheError, match="could not be kept in the journal.* No further calls"):
        run(remote, first)
    before = first.asked()
    assert 60 <= len(before) <= 60 + 2 * MICRO_BATCH
    store.tell()
    second = Counter(tmp_path / "calls again", 200)
    assert run(remote, second).status == "ok"
    after = second.asked()
    assert set(before) | set(after) == {f"p{i}" for i in range(200)}
    assert len(set(before) & set(after)) <= 3 * MICRO_BATCH
    assert len(after) == len(set(after))


def test_what_travels_to_workers_has_no_secret(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setenv("LAKE_SECRET", store.secret_key)
    options = {**store.options, "AWS_SECRET_ACCESS_KEY": "${env:LAKE_SECRET}"}
    cache = DeltaCache("s3://lake/travels/cache", storage_options=options)
    cache.append(rows(entry("a", "lamp")))
    staging, journal = cache.staging("run-1"), journal_of(cache)
    assert staging is not None
    for one in (cache, staging, journal, Elsewhere(journal.folder, cache)):
        data = pickle.dumps(one)
        assert store.secret_key.encode() not in data and b"LAKE_SECRET" in data
        assert store.secret_key not in repr(one) and store.access_key not in repr(one)
    away: Any = pickle.loads(pickle.dumps(journal))
    away.add(rows(entry("b", "sofa")))
    monkeypatch.delenv("LAKE_SECRET")
    assert not pickle.loads(pickle.dumps(journal)).seen()
    assert pickle.loads(pickle.dumps(staging)).writer() is None
    with pytest.raises(ConfigError, match="'LAKE_SECRET', which is not set"):
        pickle.loads(pickle.dumps(cache)).history("Title")
