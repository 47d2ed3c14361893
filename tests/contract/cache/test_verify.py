"""Every kind of value and every kind of damage, in real tables; and what is timed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import Entry, RunRecord
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.gc import GcOptions, collect
from featurekit_spark.cache.show import export, parse_key_text, show
from featurekit_spark.cache.stats import cache_stats
from featurekit_spark.cache.verify import verify
from featurekit_spark.errors import UsageError
from featurekit_spark.testing.behaviour import NOON, entry, pointer, rows
from featurekit_spark.values import codec, value_type, vector

KINDS: list[tuple[Any, Any]] = [
    (pa.string(), "\u00e4 lamp"),
    (pa.binary(), b"\x00\xff"),
    (pa.int64(), -7),
    (pa.int8(), 7),
    (pa.float64(), 0.1),
    (pa.bool_(), True),
    (pa.date32(), date(2026, 1, 31)),
    (pa.timestamp("us", tz="UTC"), NOON),
    (pa.decimal128(10, 2), "1.50"),
    (pa.list_(pa.string()), ["a", "\u00e4"]),
    (pa.struct([("x", pa.int64())]), {"x": 1}),
    (pa.map_(pa.string(), pa.int64()), [("b", 2), ("a", 1)]),
    (vector(3), np.array([0.1, -2.5, 3.0], "f4")),
    (vector(grid=0.01), np.array([0.1, -2.5], "f4")),
    (codec(lambda v: v.encode(), bytes.decode, name="mine"), "own"),
]


def typed(spec: Any, value: Any, key: str = "a") -> Entry:
    kind = value_type(spec)
    if pa.types.is_decimal(kind.arrow):
        from decimal import Decimal

        value = Decimal(value)
    checked = kind.checked(value)
    payload = kind.encode(checked)
    return replace(entry(key, "x"), value=payload, value_hash=kind.hash(checked, payload))


def recorded(cache: DeltaCache, text: str, builder: str = "Title") -> None:
    facts = {builder: {"config_hash": "c1", "type": text}}
    cache.record_run(RunRecord("run-1", '["abt"]', NOON, "ok", {"builders": facts}))


@pytest.mark.parametrize(("spec", "value"), KINDS, ids=[value_type(s).text for s, _ in KINDS])
def test_every_type_is_hashed_by_its_recorded_text(tmp_path: Path, spec: Any, value: Any) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    good = typed(spec, value)
    cache.append(rows(good))
    recorded(cache, value_type(spec).text)
    found = verify(cache)
    assert (found.rows, found.values, found.untyped, found.damage) == (1, 1, 0, ())
    assert show(cache, "Title", good.key)["entries"][0]["current"]
    assert export(cache, "Title", tmp_path / "x.jsonl") == 1
    # The same entry with another value: found, by the text as by the class.
    bad = replace(typed(spec, value, "b"), value=good.value, value_hash="0" * 32)
    cache.append(rows(bad))
    cls = type("Title", (FeatureBuilder,), {"key": ("text",), "value": spec, "build_one": lambda *_: None})
    for classes in (None, {"Title": cls}):
        (damage,) = verify(cache, classes).damage
        assert damage.key == bad.key and "its value_hash is 0000" in damage.what


def test_each_damage_is_told_with_its_place(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    lamp = entry("lamp", "x")
    wrong = [
        replace(entry("b", "x"), entry_id="0" * 32),
        replace(entry("c", "x"), inputs_hash="other"),
        replace(entry("d", None), value_hash="0" * 32),
        replace(entry("e", "x"), key='["e", "f"]'),
        replace(entry("f", "x"), key="no json"),
        replace(entry("g", "x"), status="odd"),  # type: ignore[arg-type]
    ]
    failed = replace(entry("z", None), status="error", value_hash=None, error="no", entry_id=None)  # type: ignore[arg-type]
    cache.append(rows(lamp, failed, *wrong))
    recorded(cache, "string")
    found = verify(cache)
    assert {damage.key for damage in found.damage} == {one.key for one in wrong}
    assert all(Path(damage.file).is_file() and damage.builder == "Title" for damage in found.damage)
    assert verify(cache, only="Other").rows == 0


def test_what_a_log_and_a_file_say_must_agree(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "x"), entry("b", "x")))
    cache.append(rows(entry("c", "x")))
    first, second = sorted(Path(cache.path, "entries").rglob("*.parquet"), key=lambda p: p.stat().st_size)
    second.write_bytes(first.read_bytes())
    (damage,) = verify(cache).damage
    assert damage.key is None and "the table's log says" in damage.what


def test_types_that_nothing_tells_and_traces_that_lead_nowhere(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "x")), [pointer(entry("b", "gone"))])
    found = verify(cache)
    assert (found.rows, found.values, found.untyped, found.dangling) == (1, 0, 1, 1)
    assert found.damage == ()


def test_a_cache_goes_on_without_a_damaged_file(tmp_path: Path) -> None:
    """As docs/design/care.md says."""
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "x")))
    cache.append(rows(entry("b", "x")))
    damaged = sorted(Path(cache.path, "entries").rglob("*.parquet"))[0]
    damaged.write_bytes(b"")
    (damage,) = verify(cache).damage
    assert damage.file == str(damaged)
    damaged.rename(tmp_path / "aside.parquet")
    DeltaTable(cache.table_path("entries")).repair()
    assert len(DeltaCache(cache.path).history("Title")) == 1
    assert verify(DeltaCache(cache.path)).damage == ()


def test_a_pointer_to_an_entry_that_has_just_gone_is_healed(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    gone, there = entry("a", "gone", inputs="i1"), entry("a", "there", inputs="i2")
    cache.append(rows(gone))
    cache.append(rows(there))
    later = datetime.max.replace(tzinfo=UTC, year=2100)
    collect(cache, GcOptions(older_than=NOON - NOON, include_paid=True), now=later)
    cache.append(None, [pointer(gone)])  # by somebody who looked it up before
    found = cache.find("Title", "c1", {there.key: there.entry_id})[there.key]
    assert not found.current  # so whoever reads it points to it again
    cache.append(None, [pointer(there)])
    assert cache.newest("Title")["value"].to_pylist() == [b"there"]


def test_stats_of_a_cache_by_hand(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    old = entry("a", "x", inputs="i1", seconds=1.0)
    cheap = entry("a", "x", builder="Cheap", seconds=1e-9, tokens=None, usd=None)
    failed = replace(entry("b", None), status="error", value_hash=None, error="no")
    cache.append(rows(old, cheap, failed))
    cache.append(rows(entry("a", "y", inputs="i2", seconds=2.0, usd=None)))
    cache.append(rows(entry("a", "y", inputs="i2", seconds=2.0, usd=None)))
    ticks = iter(range(100))
    stats = cache_stats(cache, clock=lambda: next(ticks))
    title = stats["builders"]["Title"]
    assert {name: title[name] for name in ("entries", "rows", "keys", "current", "errors", "configs")} == {
        "entries": 2, "rows": 4, "keys": 2, "current": 1, "errors": 1, "configs": 1,
    }  # fmt: skip
    assert title["cost"] == {"entries": 2, "seconds": 3.0, "tokens": 14, "usd": 0.5}
    assert title["saves"] == {"entries": 1, "seconds": 2.0, "tokens": 7, "usd": None}
    assert title["oldest"] == title["newest"] == NOON
    assert title["time"]["lookup"] == 1.0 and not title["time"]["better_inline"]
    assert stats["builders"]["Cheap"]["time"]["better_inline"]
    files = sum(path.stat().st_size for path in Path(cache.path, "entries").rglob("*.parquet"))
    assert sum(facts["bytes"] for facts in stats["builders"].values()) == pytest.approx(files, abs=5)
    assert cache_stats(DeltaCache(str(tmp_path / "none")))["builders"] == {}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('["abt", "US","\\u00e4"]', '["abt","US","\u00e4"]'),
        ("a lamp", '["a lamp"]'),
        ("7", '["7"]'),
        ("[7]", "[7]"),
        ("[red] lamp", '["[red] lamp"]'),
    ],
)
def test_keys_as_they_are_typed(text: str, key: str) -> None:
    assert parse_key_text(text) == key


@pytest.mark.parametrize("text", ["[]", "[1.5]", "[null]", '[["a"]]'])
def test_no_keys(text: str) -> None:
    with pytest.raises(UsageError, match="write a JSON array"):
        parse_key_text(text)
