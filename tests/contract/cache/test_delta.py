from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyarrow.parquet import ParquetFile

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import CacheError
from featurekit_spark.testing.behaviour import CacheBehaviour, entry, pointer, rows


class TestDeltaCache(CacheBehaviour):
    def make_cache(self, folder: Path) -> DeltaCache:
        return DeltaCache(str(folder / "cache"))


def test_spark_can_read_and_write_the_tables(tmp_path: Path) -> None:
    """Nothing above protocol (1, 2), partitioned by builder, values first."""
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "lamp")), [pointer(entry("a", "lamp"))])
    for name in ("entries", "traces"):
        table = DeltaTable(cache.table_path(name))
        protocol = table.protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
        assert table.metadata().partition_columns == ["builder"]
        assert table.metadata().configuration["featurekit.schema"] == "1"
    names = [field.name for field in DeltaTable(cache.table_path("entries")).schema().fields]
    assert names[:5] == ["builder", "key", "config_hash", "value", "ts"]


def test_one_append_is_one_commit(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "lamp"), entry("a", "x", builder="Prompt")))
    before = DeltaTable(cache.table_path("entries")).version()
    cache.append(rows(entry("b", "chair"), entry("b", "y", builder="Prompt")))
    assert DeltaTable(cache.table_path("entries")).version() == before + 1


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    DeltaCache(path).append(rows(entry("a", "lamp")))
    table = DeltaTable(f"{path}/entries")
    table.alter.set_table_properties({"featurekit.schema": "99"}, raise_if_not_exists=False)
    with pytest.raises(CacheError, match="schema 99, this library knows 1. Upgrade"):
        DeltaCache(path).history("Title")


def test_a_damaged_file_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "lamp")))
    file = next((tmp_path / "cache" / "entries").rglob("*.parquet"))
    good = file.read_bytes()
    file.write_bytes(b"no parquet here")
    with pytest.raises(CacheError, match="cannot be read"):
        cache.history("Title")
    file.write_bytes(good)
    assert len(cache.history("Title")) == 1


def test_a_reader_keeps_up_after_the_table_was_compacted(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    for key in "abc":
        cache.append(rows(entry(key, key)))
    assert len(cache.history("Title")) == 3
    table = DeltaTable(cache.table_path("entries"))
    table.optimize.compact()
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert isinstance(cache.history("Title"), pa.Table)
    assert len(cache.history("Title")) == 3


def test_a_key_is_in_one_row_group_of_a_file(tmp_path: Path) -> None:
    """A look-up of one key decodes that group alone, however many rows the file has."""
    cache = DeltaCache(str(tmp_path / "cache"))
    keys = [f"k{number * 7919 % 10_000:05d}" for number in range(10_000)]
    cache.append(rows(*(entry(key, key) for key in keys)), [pointer(entry(key, key)) for key in keys])
    for name in ("entries", "traces"):
        (uri,) = DeltaTable(cache.table_path(name)).file_uris()
        file = ParquetFile(uri)
        place = file.schema_arrow.names.index("key")
        bounds = [file.metadata.row_group(i).column(place).statistics for i in range(file.num_row_groups)]
        assert len(bounds) == 3
        assert all(one.max < next_one.min for one, next_one in pairwise(bounds))
    assert {
        found.entry.value for found in cache.candidates("Title", entry("a", "a").config_hash, [])
    } == set()
    one = entry(keys[5_000], keys[5_000])
    assert cache.find("Title", one.config_hash, {one.key: one.entry_id})[one.key].entry.value == one.value


def test_rows_of_one_key_stay_as_they_came(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    many = [entry(f"k{number % 7}", str(number)) for number in range(6_000)]
    cache.append(rows(*many))
    kept = DeltaTable(cache.table_path("entries")).to_pyarrow_table(columns=["key", "value"]).to_pylist()
    for key in {row["key"] for row in kept}:
        assert [r["value"] for r in kept if r["key"] == key] == [e.value for e in many if e.key == key]
