"""Taking entries out of real tables: what goes, what stays, in which order, and who must not be reading."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from featurekit_spark.cache import files
from featurekit_spark.cache import rows as rows_module
from featurekit_spark.cache.base import RunRecord, TraceRow
from featurekit_spark.cache.care import alone, reading
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.gc import GcOptions, collect
from featurekit_spark.cache.upkeep import unused_files
from featurekit_spark.errors import CacheError, LockedError
from featurekit_spark.fingerprint import key_json
from featurekit_spark.locks import file_lock
from featurekit_spark.testing.behaviour import NOON, entry, pointer, rows

LATER = datetime.now(UTC) + timedelta(days=40)
OLD = GcOptions(older_than=timedelta(days=30), include_paid=True)
UNICODE = ("Gr\u00f6\u00dfe", "a b/c%d", "\u5546\u54c1'\"")


def cache_in(folder: Path) -> DeltaCache:
    return DeltaCache(str(folder / "warehouse" / "cache"))


def free(key: str, value: str, **changed: Any) -> Any:
    return entry(key, value, **{"tokens": None, "usd": None, **changed})


def target(to: Any, **changed: Any) -> TraceRow:
    facts: dict[str, Any] = {"group": '["abt"]', "entry_id": to.entry_id, "value_hash": to.value_hash}
    return TraceRow(to.builder, "target", to.key, to.config_hash, NOON, "run-1", **{**facts, **changed})


def values(cache: DeltaCache, builder: str = "Title") -> list[tuple[str, bytes]]:
    found = cache.history(builder)
    return sorted(zip(found["key"].to_pylist(), found["value"].to_pylist(), strict=True))


def run_record(**configs: str) -> RunRecord:
    builders = {name: {"config_hash": config, "type": "string"} for name, config in configs.items()}
    return RunRecord("run-1", '["abt"]', NOON, "ok", {"builders": builders})


@pytest.mark.parametrize("builder", ["Title", *UNICODE])
def test_what_is_old_and_not_current_goes(tmp_path: Path, builder: str) -> None:
    cache = cache_in(tmp_path)
    first = entry("\u00e4 '\"\\", "first", builder=builder, inputs="i1")
    second = entry("\u00e4 '\"\\", "second", builder=builder, inputs="i2")
    cache.append(rows(first, entry("b", "only", builder=builder)))
    cache.append(rows(second))
    report = collect(cache, OLD, now=LATER)
    assert report["rows"] == 1 and report["recompute"] == {
        "entries": 1, "seconds": 0.25, "tokens": 7, "usd": 0.5
    }  # fmt: skip
    assert [value for _, value in values(cache, builder)] == [b"only", b"second"]
    assert len(DeltaCache(cache.path).newest(builder)) == 2
    assert collect(cache, OLD, now=LATER)["rows"] == 0


def test_what_pointers_and_traces_name_stays(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    first, second = entry("a", "first", inputs="i1"), entry("a", "second", inputs="i2")
    one, two = entry("b", "one", inputs="i1"), entry("b", "two", inputs="i2")
    matrix = entry("abt", "m1", builder="Matrix", inputs="i1")
    cache.append(rows(first, one, matrix), [target(one)])
    cache.append(rows(second, two, entry("abt", "m2", builder="Matrix", inputs="i2")))
    reads = f'[["Matrix", "[\\"abt\\"]", "{matrix.entry_id}"]]'
    group = TraceRow("Title", "group", '["abt"]', "c1", NOON, "run-2", group='["abt"]', reads=reads)
    cache.append(None, [pointer(first), group])
    assert collect(cache, OLD, now=LATER)["rows"] == 1  # `second`: a pointer made `first` current again
    assert [value for _, value in values(cache)] == [b"first", b"one", b"two"]
    assert len(cache.history("Matrix")) == 2


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(entry("a", "x", inputs="i1")))
    cache.append(rows(entry("a", "y", inputs="i2")))
    cache.put_mark("m", {"x": 1})

    def all_files() -> dict[str, bytes]:
        found = (path for path in Path(cache.path).rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in found}

    before = all_files()
    promised = collect(cache, OLD, now=LATER, dry_run=True)
    assert all_files() == before
    done = collect(cache, OLD, now=LATER)
    assert all_files() != before
    for report in (promised, done):
        del report["dry_run"]
    assert promised == done


def test_marks_of_runs_are_forgotten(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(entry("a", "x", inputs="i1")))
    cache.append(rows(entry("a", "y", inputs="i2")))
    cache.put_mark("m", {"x": 1})
    assert cache.mark("m") is not None
    collect(cache, OLD, now=LATER)
    assert cache.mark("m") is None


def test_paid_entries_stay_unless_asked(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(entry("a", "paid", inputs="i1"), free("b", "free", inputs="i1")))
    cache.append(rows(entry("a", "new", inputs="i2"), free("b", "new", inputs="i2")))
    options = GcOptions(older_than=timedelta(days=30))
    report = collect(cache, options, now=LATER)
    assert report["rows"] == 1
    assert report["kept_paid"] == {"entries": 1, "seconds": 0.25, "tokens": 7, "usd": 0.5}
    assert values(cache) == [('["a"]', b"new"), ('["a"]', b"paid"), ('["b"]', b"new")]


def test_calls_that_runs_counted_are_paid_as_well(tmp_path: Path) -> None:
    """A provider may report neither tokens nor a price."""
    cache = cache_in(tmp_path)
    cache.append(rows(free("a", "old", inputs="i1")))
    cache.append(rows(free("a", "new", inputs="i2")))
    facts = {"Title": {"config_hash": "c1", "calls": 1}}
    cache.record_run(RunRecord("run-1", '["abt"]', NOON, "ok", {"builders": facts}))
    assert collect(cache, GcOptions(older_than=timedelta(days=30)), now=LATER)["rows"] == 0


def test_configs_that_no_newest_run_has(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    old, new = free("a", "old", config_hash="c1"), free("a", "new", config_hash="c2")
    other = free("a", "of the other group", config_hash="c3")
    unknown = free("a", "in-process", builder="Unknown", config_hash="c9")
    cache.append(rows(old, new, other, unknown), [target(old), target(new)])
    cache.record_run(run_record(Title="c1"))
    cache.record_run(run_record(Title="c2"))
    cache.record_run(RunRecord("r", '["buy"]', NOON, "ok", {"builders": {"Title": {"config_hash": "c3"}}}))
    cache.record_run(RunRecord("r", '["abt","US","published"]', NOON, "ok", {"sinks": {}}))
    report = collect(cache, GcOptions(stale_configs=True), now=LATER)
    assert report["reasons"] == {"repeated": 0, "stale_config": 1, "age": 0}
    assert [value for _, value in values(cache)] == [b"new", b"of the other group"]
    assert len(cache.history("Unknown")) == 1


def test_a_stopped_run_makes_no_config_stale_and_keeps_its_own(tmp_path: Path) -> None:
    """What the run before it computed is what stands, and what it has computed is for the run that goes on."""
    cache = cache_in(tmp_path)
    whole, begun, gone = (free("a", text, config_hash=text) for text in ("c2", "c3", "c1"))
    cache.append(rows(gone, whole, begun))
    cache.record_run(replace(run_record(Title="c1"), status="stopped"))
    cache.record_run(run_record(Title="c2"))
    cache.record_run(replace(run_record(Title="c3"), status="stopped"))
    collect(cache, GcOptions(stale_configs=True), now=LATER)
    assert [value for _, value in values(cache)] == [b"c2", b"c3"]
    cache.record_run(run_record(Title="c3"))
    collect(cache, GcOptions(stale_configs=True), now=LATER)
    assert [value for _, value in values(cache)] == [b"c3"]


def test_oldest_first_down_to_a_size(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    for i in range(4):
        cache.append(rows(free("a", f"v{i}", inputs=f"i{i}")))
    each = files.rows_of(cache, "entries", ["key"])["bytes"].to_pylist()
    report = collect(cache, GcOptions(max_bytes=int(sum(each[:2])) + 10), now=LATER)
    assert report["rows"] == 2 and not report["still_over"]
    assert [value for _, value in values(cache)] == [b"v2", b"v3"]
    report = collect(cache, GcOptions(max_bytes=1), now=LATER)
    assert report["rows"] == 1 and report["still_over"]  # the current one stays
    assert collect(cache, GcOptions(max_bytes=1, include_current=True), now=LATER)["bytes_left"] == 0


def test_no_older_answer_becomes_current_again(tmp_path: Path) -> None:
    """The current entry would go, an older one that was paid for stays: then the current one stays as well."""
    cache = cache_in(tmp_path)
    cache.append(rows(entry("a", "paid", inputs="i1")))
    cache.append(rows(free("a", "free", inputs="i2")))
    options = GcOptions(older_than=timedelta(days=30), include_current=True)
    assert collect(cache, options, now=LATER)["rows"] == 0
    assert cache.newest("Title")["value"].to_pylist() == [b"free"]


def test_a_targets_older_traces_go_with_its_newest(tmp_path: Path) -> None:
    """Left behind, one of them would be taken for what holds now."""
    cache = cache_in(tmp_path)
    kept, dropped = entry("a", "kept", config_hash="c2"), free("a", "dropped", config_hash="c1")
    cache.append(rows(kept, dropped), [target(kept)])
    cache.append(None, [target(dropped)])
    cache.record_run(run_record(Title="c2"))
    collect(cache, GcOptions(stale_configs=True), now=LATER)
    assert len(cache.history("Title")) == 1
    assert len(cache.traces("Title", '["abt"]')) == 0


def test_repeated_rows_go_always(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    failed = {"status": "error", "value_hash": None, "error": "no answer"}
    cache.append(rows(entry("a", "x"), entry("b", None, **failed), entry("c", None, **failed)))
    cache.append(rows(entry("a", "x"), entry("b", "y")))
    report = collect(cache, GcOptions(), now=LATER)
    assert report["reasons"]["repeated"] == 2 and report["recompute"]["entries"] == 0
    found = cache.history("Title").sort_by("key")
    assert found["key"].to_pylist() == ['["a"]', '["b"]', '["c"]']
    assert found["status"].to_pylist() == ["ok", "ok", "error"]  # why `c` has no value is still told


def test_a_crash_between_leaves_a_trace_less_and_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path)
    old = free("a", "old", config_hash="c1")
    cache.append(rows(old, free("a", "new", config_hash="c2")), [target(old), pointer(old)])
    cache.record_run(run_record(Title="c2"))
    asked = []
    real = files.remove_rows

    def dies_at_entries(cache: Any, name: str, *args: Any, **options: Any) -> Any:
        asked.append(name)
        if name == "entries":
            raise KeyboardInterrupt
        return real(cache, name, *args, **options)

    monkeypatch.setattr(rows_module.files, "remove_rows", dies_at_entries)
    with pytest.raises(KeyboardInterrupt):
        collect(cache, GcOptions(stale_configs=True), now=LATER)
    assert asked == ["traces", "entries"]
    assert len(cache.history("Title")) == 2 and len(cache.traces("Title", '["abt"]')) == 0
    alive = {*cache.ids("Title").to_pylist()}
    assert {*files.rows_of(cache, "traces", ["entry_id"])["entry_id"].to_pylist()} <= alive
    monkeypatch.undo()
    assert collect(cache, GcOptions(stale_configs=True), now=LATER)["rows"] == 1


def test_appends_go_on_meanwhile(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    for i in range(5):
        cache.append(rows(*(free(f"k{k}", f"v{i}", inputs=f"i{i}") for k in range(20))))
    writer = DeltaCache(cache.path)
    stop, written = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            made = free(f"new{len(written)}", "x")
            writer.append(rows(made), [pointer(made)])
            written.append(made.key)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            collect(cache, OLD, now=LATER)
    finally:
        stop.set()
        thread.join()
    found = DeltaCache(cache.path).history("Title")["key"].to_pylist()
    assert written and set(written) <= set(found)
    assert sorted(set(found) - set(written)) == sorted(key_json((f"k{k}",)) for k in range(20))
    assert len(found) == 20 + len(written)


def test_files_compacted_in_between_are_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    for i in range(3):
        cache.append(rows(free("a", f"v{i}", inputs=f"i{i}"), free(f"b{i}", "x")))
    real, tries = files._swapped, []

    def compacted_first(cache: DeltaCache, name: str, actions: Any) -> bool:
        if not tries:
            DeltaTable(cache.table_path(name)).optimize.compact()
        tries.append(name)
        return real(cache, name, actions)

    monkeypatch.setattr(files, "_swapped", compacted_first)
    assert collect(cache, OLD, now=LATER)["rows"] == 2
    assert tries == ["entries", "entries"]
    assert [value for _, value in values(cache)] == [b"v2", b"x", b"x", b"x"]
    assert unused_files(cache, "entries", now=LATER, remove=False) == []


def test_what_is_left_is_pruned_and_written_as_before(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    long = "k" * 50
    cache.append(rows(free("a", "x", inputs="i1"), free(long, "y")))
    cache.append(rows(free("a", "z", inputs="i2")))
    collect(cache, OLD, now=LATER)
    table = DeltaTable(cache.table_path("entries"))
    assert (table.protocol().min_reader_version, table.protocol().min_writer_version) == (1, 2)
    kept = entry(long, "y")
    assert cache.find("Title", "c1", {kept.key: kept.entry_id})[kept.key].entry.value == b"y"
    assert table.optimize.compact()["numFilesRemoved"] == 2
    assert len(DeltaCache(cache.path).history("Title")) == 2


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    with file_lock(folder / "warehouse" / "locks" / "abt" / "US.lock", timeout_s=0, owner="abt in US"):
        yield


def test_not_while_a_run_reads(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(free("a", "x", inputs="i1")))
    cache.append(rows(free("a", "y", inputs="i2")))
    with run_lock(tmp_path):
        with pytest.raises(LockedError, match="these runs may be reading them: abt/US"):
            collect(cache, OLD, now=LATER)
        assert collect(cache, OLD, now=LATER, dry_run=True)["rows"] == 1
        with pytest.raises(LockedError, match="abt/US"):
            collect(cache, OLD, now=LATER, warehouse=str(tmp_path / "warehouse"))
    with reading(cache.path), pytest.raises(LockedError):
        collect(cache, OLD, now=LATER)
    assert len(cache.history("Title")) == 2
    assert collect(cache, OLD, now=LATER)["rows"] == 1


def test_runs_read_together_and_wait_for_care(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    order = []

    def read() -> None:
        with reading(cache.path):
            order.append("run")

    with reading(cache.path), reading(cache.path):
        pass
    thread = threading.Thread(target=read)
    with alone(cache, owner="cache gc"):
        thread.start()
        thread.join(0.1)
        order.append("care")
    thread.join()
    assert order == ["care", "run"]


def test_files_that_no_commit_names(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(free("a", "x")))
    staging = cache.staging("run-1")
    assert staging is not None
    writers = [staging.writer(), staging.writer()]
    lost = []
    for writer in writers:
        assert writer is not None
        writer.add(rows(free("b", "y")))
        lost += [Path(cache.table_path("entries"), file.path) for file in writer.close()]
    mark = Path(cache.table_path("entries"), staging.mark)
    for path in (lost[0], mark):
        os.utime(path, (1, 1))
    now = datetime.now(UTC)
    assert collect(cache, GcOptions(), now=now, dry_run=True)["unused_files"] == 2
    assert lost[0].exists()
    assert collect(cache, GcOptions(), now=now)["unused_files"] == 2
    assert not lost[0].exists() and not mark.exists()
    assert lost[1].exists()  # a run may be about to commit it


def test_damage_is_told_and_nothing_is_taken_out(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    cache.append(rows(free("a", "x", inputs="i1")))
    cache.append(rows(free("a", "y", inputs="i2")))
    damaged = sorted(Path(cache.path, "entries").rglob("*.parquet"))[0]
    damaged.write_bytes(b"PAR1 not any more PAR1")
    with pytest.raises(CacheError, match="cannot be read"):
        collect(cache, OLD, now=LATER)
    assert len(files.data_files(DeltaTable(cache.table_path("entries")))) == 2


def test_an_empty_cache(tmp_path: Path) -> None:
    report = collect(cache_in(tmp_path), GcOptions(older_than=timedelta(0), max_bytes=0), now=LATER)
    assert report["rows"] == report["traces"] == report["unused_files"] == 0
