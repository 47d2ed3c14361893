"""Entries that workers wrote as files: the same cache, committed later."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.cache.background import BackgroundAppends
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.journal import take_in
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.staged import StagedFile, Staging
from featurekit_spark.errors import CacheError
from featurekit_spark.testing.behaviour import CacheBehaviour, entry, rows


def staged(cache: DeltaCache, table: pa.Table, run_id: str = "run-1") -> tuple[Staging, list[StagedFile]]:
    """`table` written as a worker writes it, not committed yet."""
    staging = cache.staging(run_id)
    assert staging is not None
    writer = staging.writer()
    assert writer is not None
    for start in range(0, len(table), 2):  # several row groups
        writer.add(table.slice(start, 2))
    files = [StagedFile.from_json(file.to_json()) for file in writer.close()]
    staging.close()
    return staging, files


class WrittenByWorkers(DeltaCache):
    """Every entry takes the way through a worker's file."""

    def append(self, entries: pa.Table | None = None, traces: Any = ()) -> None:
        if entries is not None and len(entries):
            found = []
            for run in dict.fromkeys(entries["run_id"].to_pylist()):
                own = entries.filter(pa.compute.equal(entries["run_id"], run))
                found += staged(self, own, run)[1]
            self.append_staged(found)
        super().append(None, traces)


class TestWrittenByWorkers(CacheBehaviour):
    def make_cache(self, folder: Path) -> WrittenByWorkers:
        return WrittenByWorkers(str(folder / "cache"))


def test_a_file_is_no_entry_before_it_is_committed(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    staging, files = staged(cache, rows(entry("a", "lamp"), entry("b", None), entry("a", "x", builder="B")))
    assert len(cache.history("Title")) == 0 and not cache.has("Title")
    assert {file.builder: file.rows for file in files} == {"Title": 2, "B": 1}
    before = DeltaTable(cache.table_path("entries")).version()
    cache.append_staged(files)
    assert DeltaTable(cache.table_path("entries")).version() == before + 1
    assert (
        cache.history("Title")
        .sort_by("key")
        .equals(pa.concat_tables([staging.read(f) for f in files if f.builder == "Title"]).sort_by("key"))
    )


def test_nobody_sees_a_file_that_is_never_committed(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "lamp")))
    staged(cache, rows(entry("b", "chair")))
    assert cache.history("Title")["key"].to_pylist() == ['["a"]']
    DeltaTable(cache.table_path("entries")).vacuum(
        retention_hours=0, enforce_retention_duration=False, dry_run=False
    )
    assert DeltaCache(cache.path).history("Title")["key"].to_pylist() == ['["a"]']


def test_a_stage_is_older_than_what_was_appended_while_it_ran(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    old, new = entry("a", "old", inputs="i1"), entry("a", "new", inputs="i2")
    _, files = staged(cache, rows(old))
    cache.append(rows(new))
    cache.append_staged(files)
    assert cache.current("Title", "c1", [old.key])[old.key].entry.value == b"new"


def test_a_worker_that_sees_another_folder_writes_nothing(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    staging = cache.staging("run-1")
    assert staging is not None
    elsewhere = Staging(str(tmp_path / "elsewhere"), "run-1", 1, staging.mark)
    assert elsewhere.writer() is None
    (tmp_path / "elsewhere").mkdir()
    assert elsewhere.writer() is None
    assert Staging("nowhere://bucket/cache", "run-1", 1).writer() is None
    assert staging.writer() is not None
    staging.close()
    assert staging.writer() is None


def test_inputs_are_handed_over_until_the_stage_ends(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    staging, other = cache.staging("run-1"), cache.staging("run-2")
    assert staging is not None and other is not None
    names = [staging.hand_over(b"one"), staging.hand_over(b"two")]
    kept = other.hand_over(b"other")
    assert [staging.handed_over(name) for name in names] == [b"one", b"two"]
    staging.close()
    for name in names:
        with pytest.raises(FileNotFoundError):
            staging.handed_over(name)
    assert other.handed_over(kept) == b"other" and other.writer() is not None


def test_no_staging_where_nothing_is_stored() -> None:
    assert BackgroundAppends(MemoryCache()).staging("run-1") is None


def test_names_of_builders_that_a_path_cannot_hold(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    name = "Größe a/b=c%20d"
    _, files = staged(cache, rows(entry("a", "lamp", builder=name)))
    cache.append_staged(files)
    cache.append(rows(entry("b", "chair", builder=name)))
    assert sorted(cache.history(name)["key"].to_pylist()) == ['["a"]', '["b"]']


def test_a_path_that_a_uri_spells_otherwise(tmp_path: Path) -> None:
    """As a URI it is percent-encoded; journal, files and tables are in one folder all the same."""
    folder = tmp_path / "a b"
    cache = DeltaCache(f"{folder.as_uri()}/cache")
    _, files = staged(cache, rows(entry("a", "lamp")))
    cache.append_staged(files)
    journal = cache.journal("run-1", size=1)
    journal.begin()
    journal.add(rows(entry("b", "sofa")))
    assert take_in(cache) == 1
    assert sorted(DeltaCache(str(folder / "cache")).history("Title")["key"].to_pylist()) == ['["a"]', '["b"]']
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def test_a_commit_that_fails_is_told(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    _, files = staged(cache, rows(entry("a", "lamp")))
    (tmp_path / "cache" / "entries" / "_delta_log" / f"{0:020}.json").write_text("{}")
    with pytest.raises(CacheError, match=r"entries"):
        DeltaCache(cache.path).append_staged(files)


@pytest.mark.spark
def test_spark_reads_what_workers_wrote(spark: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    long = "lamp " * 20
    odd = entry("a", "x", builder="Größe a/b")
    _, files = staged(cache, rows(entry(long, "lamp"), entry(long + "z", "chair"), entry("a", None), odd))
    cache.append_staged(files)
    frame = spark.read.format("delta").load(cache.table_path("entries"))
    key = entry(long + "z", "").key
    (row,) = frame.where(frame.key == key).collect()
    assert (row.builder, bytes(row.value), row.run_id) == ("Title", b"chair", "run-1")
    assert row.ts.astimezone(UTC) == datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
    assert frame.count() == 4 and frame.where("builder = 'Größe a/b'").count() == 1


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("\U0010ffff", max_size=40)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
def test_bounds_hold_every_key(keys: list[str]) -> None:
    """Whatever the keys are, the statistics do not rule any of them out."""
    with tempfile.TemporaryDirectory() as folder:
        cache = DeltaCache(f"{folder}/cache")
        _, files = staged(cache, rows(*(entry(key, "x") for key in keys)))
        stats = json.loads(files[0].stats)
        texts = [entry(key, "x").key for key in keys]
        assert stats["minValues"]["key"].encode() <= min(texts, key=str.encode).encode()
        assert stats["maxValues"]["key"].encode() >= max(texts, key=str.encode).encode()
        cache.append_staged(files)
        for key in keys:
            wanted = entry(key, "x")
            assert wanted.key in cache.find("Title", "c1", {wanted.key: wanted.entry_id})
