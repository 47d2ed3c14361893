"""Entries that must not answer any more, in real tables."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache import rows as rows_module
from featurekit_spark.cache.base import RunRecord, TraceRow
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.invalidate import invalidate
from featurekit_spark.errors import UsageError
from featurekit_spark.testing.behaviour import NOON, entry, rows

NOW = datetime.now(UTC)
GROUP = '["abt"]'


def target(to: Any, **changed: Any) -> TraceRow:
    row = TraceRow(to.builder, "target", to.key, to.config_hash, NOON, "run-1", group=GROUP)
    return replace(row, **{"entry_id": to.entry_id, **changed})


def record(cache: DeltaCache, group: str, *builders: str) -> None:
    facts = {name: {"config_hash": "c1", "type": "string"} for name in builders}
    cache.record_run(RunRecord("run-1", group, NOON, "ok", {"builders": facts}))


def test_every_entry_of_the_keys_goes_and_no_other(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    key = "\u00e4 \"'\\"
    gone = [entry(key, "x"), entry(key, "y", inputs="i2"), entry(key, "z", config_hash="c2")]
    kept = [entry("b", "x"), entry(key, "x", builder="Other")]
    cache.append(rows(*gone, *kept), [target(gone[0]), target(kept[0])])
    told = invalidate(cache, "Title", [gone[0].key], reason="wrong", now=NOW)
    assert (told["rows"], told["keys"], told["recompute"]["entries"]) == (3, 1, 3)
    assert cache.history("Title")["key"].to_pylist() == [kept[0].key]
    assert len(cache.history("Other")) == 1
    assert cache.find("Title", "c1", {gone[0].key: gone[0].entry_id}) == {}


def test_only_groups_whose_runs_had_the_builder_lose_their_proofs(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    below, one, two = entry("t", "x", builder="Below"), entry("a", "x"), entry("b", "x")
    cache.append(rows(below, one, two), [target(one), target(two, group='["buy"]')])
    record(cache, GROUP, "Title", "Below")
    record(cache, '["buy"]', "Title")
    invalidate(cache, "Below", None, reason="wrong", now=NOW)
    assert len(cache.traces("Title", GROUP)) == 0
    assert len(cache.traces("Title", '["buy"]')) == 1


def test_what_only_a_trace_made_current_stays_current(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    first, second, below = entry("a", "1"), entry("a", "2", inputs="i2"), entry("t", "x", builder="Below")
    null = entry("b", "old")
    cache.append(rows(first, null, below))
    cache.append(rows(second), [target(first), target(null, entry_id=None)])
    assert cache.newest("Title")["value"].to_pylist() == [b"1"]
    invalidate(cache, "Below", None, reason="wrong", now=NOW)
    assert len(cache.traces("Title", GROUP)) == 0
    again = DeltaCache(cache.path)
    assert again.newest("Title")["value"].to_pylist() == [b"1"]
    assert again.current("Title", "c1", [first.key])[first.key].entry.value == b"1"


def test_a_crash_after_the_proofs_is_finished_by_doing_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    lamp = entry("a", "x")
    cache.append(rows(lamp), [target(lamp)])
    real = rows_module.files.remove_rows

    def dies(cache: Any, name: str, *args: Any, **options: Any) -> Any:
        if name == "entries":
            raise KeyboardInterrupt
        return real(cache, name, *args, **options)

    monkeypatch.setattr(rows_module.files, "remove_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        invalidate(cache, "Title", None, reason="wrong", now=NOW)
    assert len(cache.traces("Title", GROUP)) == 0 and len(cache.history("Title")) == 1
    monkeypatch.undo()
    assert invalidate(cache, "Title", None, reason="wrong", now=NOW)["rows"] == 1
    assert len(cache.history("Title")) == 0


def test_nothing_found_changes_nothing(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    lamp = entry("a", "x")
    cache.append(rows(lamp), [target(lamp)])
    told = invalidate(cache, "Title", ['["zz"]'], reason="wrong", now=NOW)
    assert told["rows"] == told["traces"] == 0 and told["keys_without_entries"] == ['["zz"]']
    assert len(cache.traces("Title", GROUP)) == 1
    with pytest.raises(UsageError, match="has no entries.*Known: Title"):
        invalidate(cache, "Titel", None, reason="wrong", now=NOW)
