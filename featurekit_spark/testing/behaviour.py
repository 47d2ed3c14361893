"""What every cache promises, as a test class: subclass it beside your implementation and pytest runs all
of it.

Knows the protocol in `cache/base.py` and no implementation. Needs pytest only as the thing that collects it.
"""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import (
    ENTRY_SCHEMA,
    LATER_COLUMNS,
    TRACE_SCHEMA,
    Entry,
    FeatureCache,
    RunRecord,
    TraceRow,
)
from featurekit_spark.errors import UsageError
from featurekit_spark.fingerprint import entry_id, key_json
from featurekit_spark.values import NULL_HASH, value_type

__all__ = ["CacheBehaviour", "entry", "pointer", "rows", "target"]

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
_TEXT = value_type(str)


def entry(key: str, value: str | None, *, inputs: str = "i1", **changed: Any) -> Entry:
    """An ok entry of the builder `Title` under the config `c1`, identified as the library does."""
    builder, config = changed.get("builder", "Title"), changed.get("config_hash", "c1")
    made = Entry(
        builder=builder,
        key=key_json((key,)),
        config_hash=config,
        value=None if value is None else value.encode(),
        ts=NOON,
        entry_id=entry_id(builder, config, key_json((key,)), inputs),
        inputs_hash=inputs,
        value_hash=NULL_HASH if value is None else _TEXT.hash(value),
        run_id="run-1",
        seconds=0.25,
        tokens=7,
        usd=0.5,
        attempts=2,
        estimated_tokens=3,
    )
    return replace(made, **changed)


def rows(*entries: Entry) -> pa.Table:
    """Entries as `append` takes them: ENTRY_SCHEMA without `recorded`."""
    schema = pa.schema([f for f in ENTRY_SCHEMA if f.name != "recorded"])
    return pa.table({name: [getattr(e, name) for e in entries] for name in schema.names}, schema=schema)


def pointer(to: Entry, *, reads: str | None = None) -> TraceRow:
    """The row that makes an existing entry current again."""
    return TraceRow(
        to.builder, "pointer", to.key, to.config_hash, NOON, "run-2", entry_id=to.entry_id, reads=reads
    )


def target(to: Entry, group: str = '["abt"]') -> TraceRow:
    """The row by which a run proves a target's key."""
    return replace(pointer(to), kind="target", group=group, plan_hash="p", keyed_trace="k")


class CacheBehaviour:
    """Subclass it as `TestMyCache` and give `make_cache`.

    `durable`: whether a second `make_cache` of the same folder, or another process, sees what the first
    wrote.
    """

    durable: ClassVar[bool] = True

    def make_cache(self, folder: Path) -> FeatureCache:
        """The cache kept in `folder`, which exists; called again for the same folder, it is opened anew."""
        raise UsageError(f"{type(self).__name__} defines no make_cache(folder)")

    # -- look-up ---------------------------------------------------------------------------------------------

    def test_it_is_a_cache(self, tmp_path: Path) -> None:
        assert isinstance(self.make_cache(tmp_path), FeatureCache)

    def test_an_empty_cache_answers_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        assert cache.find("Title", "c1", {'["a"]': "0" * 32}) == {}
        assert cache.find("Title", "c1", {}) == {}
        assert cache.current("Title", "c1", ['["a"]']) == {}
        assert cache.current("Title", "c1", []) == {}
        assert cache.candidates("Title", "c1", ['["a"]']) == []
        assert cache.by_id("Title", ["0" * 32]) == {}
        assert cache.ids("Title").to_pylist() == []
        assert cache.last_run('["abt"]') is None
        for table, schema in (
            (cache.traces("Title", '["abt"]'), TRACE_SCHEMA),
            (cache.history("Title"), ENTRY_SCHEMA),
            (cache.newest("Title"), ENTRY_SCHEMA),
        ):
            assert len(table) == 0
            assert table.schema.equals(schema)

    def test_an_entry_comes_back_as_it_was_written(self, tmp_path: Path) -> None:
        cache, lamp = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(rows(lamp))
        found = cache.find("Title", "c1", {lamp.key: lamp.entry_id})[lamp.key]
        assert replace(found.entry, recorded=0) == lamp
        assert found.entry.ts.tzinfo is UTC
        assert found.current
        assert found.reads is None
        assert cache.by_id("Title", [lamp.entry_id, "0" * 32]) == {lamp.entry_id: found.entry}
        assert cache.ids("Title").to_pylist() == [lamp.entry_id]

    def test_rows_of_before_some_columns_are_taken(self, tmp_path: Path) -> None:
        cache, lamp = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(rows(lamp).drop(list(LATER_COLUMNS)))
        found = cache.find("Title", "c1", {lamp.key: lamp.entry_id})[lamp.key]
        assert replace(found.entry, recorded=0) == replace(lamp, attempts=None, estimated_tokens=None)

    def test_an_entry_answers_for_its_own_identity_only(self, tmp_path: Path) -> None:
        cache, lamp, other = self.make_cache(tmp_path), entry("a", "lamp"), entry("a", "lamp", inputs="i2")
        cache.append(rows(lamp))
        assert cache.find("Title", "c1", {lamp.key: other.entry_id}) == {}
        assert cache.find("Title", "c1", {'["b"]': lamp.entry_id}) == {}

    def test_configs_are_apart(self, tmp_path: Path) -> None:
        cache, one, two = (
            self.make_cache(tmp_path),
            entry("a", "lamp"),
            entry("a", "Lampe", config_hash="c2"),
        )
        cache.append(rows(one, two))
        assert _value(cache, "Title", "c1", one.key) == b"lamp"
        assert _value(cache, "Title", "c2", two.key) == b"Lampe"
        assert cache.find("Title", "c1", {two.key: two.entry_id}) == {}

    def test_builders_are_apart(self, tmp_path: Path) -> None:
        cache, one, two = self.make_cache(tmp_path), entry("a", "lamp"), entry("a", "x", builder="Prompt")
        cache.append(rows(one, two))
        assert _value(cache, "Title", "c1", one.key) == b"lamp"
        assert _value(cache, "Prompt", "c1", two.key) == b"x"
        assert len(cache.history("Title")) == len(cache.newest("Prompt")) == 1
        assert cache.by_id("Prompt", [one.entry_id]) == {}

    def test_keys_are_taken_byte_for_byte(self, tmp_path: Path) -> None:
        """Composed and decomposed letters, quotes, separators and blanks are all different keys."""
        cache = self.make_cache(tmp_path)
        keys = [
            "caf\u00e9",
            "cafe\u0301",
            "a\nb",
            "a/b",
            "a'b",
            'a"b',
            "a\\b",
            "",
            " ",
            "%",
            "\u65e5\u672c",
            "\U0001f600",
        ]
        cache.append(rows(*(entry(key, f"{number}") for number, key in enumerate(keys))))
        wanted = {entry(key, None).key: entry(key, None).entry_id for key in keys}
        assert len(wanted) == len(keys)
        found = cache.find("Title", "c1", wanted)
        assert [found[key_json((key,))].entry.value for key in keys] == [
            f"{number}".encode() for number in range(len(keys))
        ]

    def test_builder_names_are_taken_as_they_are(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        names = ["Title", "title", "Ti tle", "Ti/tle=1", "T\u00eftle"]
        cache.append(rows(*(entry("a", name, builder=name) for name in names)))
        assert [_value(cache, name, "c1", '["a"]') for name in names] == [name.encode() for name in names]

    def test_null_and_empty_are_different_values(self, tmp_path: Path) -> None:
        cache, null, empty = self.make_cache(tmp_path), entry("a", None), entry("b", "")
        cache.append(rows(null, empty))
        found = cache.find("Title", "c1", {e.key: e.entry_id for e in (null, empty)})
        assert found[null.key].entry.value is None
        assert found[empty.key].entry.value == b""

    def test_many_keys_at_once(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        many = [entry(f"p{number:05}", f"v{number}") for number in range(6_000)]
        cache.append(rows(*many))
        assert len(cache.find("Title", "c1", {e.key: e.entry_id for e in many})) == len(many)
        assert len(cache.current("Title", "c1", [e.key for e in many[::2]])) == len(many) // 2

    # -- what is current -------------------------------------------------------------------------------------

    def test_the_last_append_is_current_whatever_its_clock_says(self, tmp_path: Path) -> None:
        cache, old = self.make_cache(tmp_path), entry("a", "old")
        new = entry("a", "new", inputs="i2", ts=NOON - timedelta(days=1))
        cache.append(rows(old))
        cache.append(rows(new))
        assert _value(cache, "Title", "c1", old.key) == b"new"
        assert not cache.find("Title", "c1", {old.key: old.entry_id})[old.key].current
        assert [row["value"] for row in cache.newest("Title").to_pylist()] == [b"new"]

    def test_a_pointer_makes_an_old_entry_current_again(self, tmp_path: Path) -> None:
        cache, one, two = self.make_cache(tmp_path), entry("a", "A"), entry("a", "B", inputs="i2")
        cache.append(rows(one))
        cache.append(rows(two))
        cache.append(None, [pointer(one, reads='[["s","k","h"]]')])
        found = cache.current("Title", "c1", [one.key])[one.key]
        assert (found.entry.value, found.current, found.reads) == (b"A", True, '[["s","k","h"]]')
        assert not cache.find("Title", "c1", {two.key: two.entry_id})[two.key].current
        assert [row["value"] for row in cache.newest("Title").to_pylist()] == [b"A"]
        cache.append(rows(two))
        assert _value(cache, "Title", "c1", one.key) == b"B"

    def test_a_pointer_in_the_append_of_its_entry_counts_after_it(self, tmp_path: Path) -> None:
        cache, one, two = self.make_cache(tmp_path), entry("a", "A"), entry("a", "B", inputs="i2")
        cache.append(rows(one, two), [pointer(one, reads="[]")])
        found = cache.current("Title", "c1", [one.key])[one.key]
        assert (found.entry.value, found.reads) == (b"A", "[]")

    def test_a_target_row_points_too(self, tmp_path: Path) -> None:
        cache, one, two = self.make_cache(tmp_path), entry("a", "A"), entry("a", "B", inputs="i2")
        cache.append(rows(one))
        cache.append(rows(two))
        cache.append(None, [replace(pointer(one), kind="target", group='["abt"]', value_hash=one.value_hash)])
        assert _value(cache, "Title", "c1", one.key) == b"A"

    def test_a_pointer_to_nothing_is_no_answer(self, tmp_path: Path) -> None:
        cache, one = self.make_cache(tmp_path), entry("a", "A")
        cache.append(rows(one), [replace(pointer(one), entry_id="0" * 32)])
        assert cache.current("Title", "c1", [one.key]) == {}
        assert cache.find("Title", "c1", {one.key: one.entry_id})[one.key].entry.value == b"A"

    def test_an_entry_made_again_answers_with_its_newest_row(self, tmp_path: Path) -> None:
        """After its ttl an entry is computed anew under the same identity."""
        cache, old = self.make_cache(tmp_path), entry("a", "monday")
        new = replace(entry("a", "tuesday"), ts=NOON + timedelta(days=1))
        assert old.entry_id == new.entry_id
        cache.append(rows(old))
        cache.append(rows(new))
        found = [
            cache.find("Title", "c1", {old.key: old.entry_id})[old.key].entry,
            cache.current("Title", "c1", [old.key])[old.key].entry,
            cache.by_id("Title", [old.entry_id])[old.entry_id],
            *(f.entry for f in cache.candidates("Title", "c1", [old.key])),
        ]
        assert [(e.value, e.ts) for e in found] == [(b"tuesday", new.ts)] * 4
        assert [row["value"] for row in cache.newest("Title").to_pylist()] == [b"tuesday"]

    def test_duplicates_are_harmless(self, tmp_path: Path) -> None:
        cache, lamp = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(rows(lamp, lamp))
        cache.append(rows(lamp), [pointer(lamp), pointer(lamp)])
        assert len(cache.candidates("Title", "c1", [lamp.key])) == 1
        assert len(cache.newest("Title")) == 1
        assert set(cache.ids("Title").to_pylist()) == {lamp.entry_id}
        assert _value(cache, "Title", "c1", lamp.key) == b"lamp"
        assert len(cache.history("Title")) == 3

    def test_candidates_are_all_ok_entries_of_a_key(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        one, two, other = entry("a", "A"), entry("a", "B", inputs="i2"), entry("b", "C")
        cache.append(rows(one, two, other, entry("a", "D", config_hash="c2")))
        cache.append(None, [pointer(one, reads="[]")])
        found = {f.entry.entry_id: (f.current, f.reads) for f in cache.candidates("Title", "c1", [one.key])}
        assert found == {one.entry_id: (True, "[]"), two.entry_id: (False, None)}

    def test_an_error_answers_nothing_and_hides_nothing(self, tmp_path: Path) -> None:
        cache, good = self.make_cache(tmp_path), entry("a", "lamp")
        failed = entry("a", None, inputs="i2", status="error", error="no answer", value_hash=None)
        cache.append(rows(good))
        cache.append(rows(failed))
        assert cache.find("Title", "c1", {failed.key: failed.entry_id}) == {}
        assert _value(cache, "Title", "c1", good.key) == b"lamp"
        assert [f.entry.value for f in cache.candidates("Title", "c1", [good.key])] == [b"lamp"]
        assert cache.by_id("Title", [failed.entry_id]) == {}
        assert cache.ids("Title").to_pylist() == [good.entry_id]
        assert [row["value"] for row in cache.newest("Title").to_pylist()] == [b"lamp"]
        assert {row["error"] for row in cache.history("Title").to_pylist()} == {None, "no answer"}

    def test_a_value_that_became_null_is_current_no_more(self, tmp_path: Path) -> None:
        """A pointer or target row without an entry: an input is null, so nothing was built."""
        cache, a, b = self.make_cache(tmp_path), entry("a", "lamp"), entry("b", "sofa")
        cache.append(rows(a, b))
        cache.append(None, [replace(pointer(a), entry_id=None), replace(target(b), entry_id=None)])
        assert cache.current("Title", "c1", [a.key, b.key]) == {}
        assert [found.current for found in cache.candidates("Title", "c1", [a.key, b.key])] == [False, False]
        assert not cache.find("Title", "c1", {a.key: a.entry_id})[a.key].current
        assert len(cache.newest("Title")) == 0
        cache.append(None, [pointer(a)])
        cache.append(rows(entry("b", "settee", inputs="i2")))
        assert {row["key"]: row["value"] for row in cache.newest("Title").to_pylist()} == {
            a.key: b"lamp",
            b.key: b"settee",
        }
        assert set(cache.current("Title", "c1", [a.key, b.key])) == {a.key, b.key}

    def test_a_key_is_named_by_a_target_row_that_has_no_entry(self, tmp_path: Path) -> None:
        """An inline target: its rows name entries that nobody keeps."""
        cache, a = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(None, [target(a)])
        assert cache.current("Title", "c1", [a.key]) == {}
        assert len(cache.newest("Title")) == 0
        assert cache.traces("Title", '["abt"]')["status"].to_pylist() == ["ok"]

    def test_a_trace_is_superseded_once_another_entry_is_current(self, tmp_path: Path) -> None:
        """Such a key is walked again, so that what the run answers becomes current again."""
        cache, a, b = self.make_cache(tmp_path), entry("a", "lamp"), entry("b", "sofa")
        other = entry("a", "big lamp", inputs="i2")
        group = TraceRow("Title", "group", '["abt"]', "c1", NOON, "run-1", group='["abt"]')
        cache.append(rows(other))
        cache.append(rows(a, b, entry("a", "Lampe", config_hash="c2")), [target(a), target(b), group])

        def status() -> dict[str, str]:
            found = cache.traces("Title", '["abt"]').to_pylist()
            return {row["key"]: row["status"] for row in found}

        assert status() == {a.key: "ok", b.key: "ok", '["abt"]': "ok"}
        cache.append(rows(entry("a", "Lampe", inputs="i2", config_hash="c2")), [pointer(b)])
        cache.append(rows(entry("b", None, inputs="i2", status="error", value_hash=None)))
        assert status() == {a.key: "ok", b.key: "ok", '["abt"]': "ok"}
        cache.append(None, [pointer(other), replace(pointer(b), entry_id=None)])
        assert status() == {a.key: "superseded", b.key: "superseded", '["abt"]': "ok"}
        cache.append(None, [target(a), replace(target(b), entry_id=None)])
        assert status() == {a.key: "ok", b.key: "ok", '["abt"]': "ok"}
        cache.append(rows(other))
        assert status() == {a.key: "superseded", b.key: "ok", '["abt"]': "ok"}

    # -- traces, history, runs -------------------------------------------------------------------------------

    def test_traces_are_the_newest_rows_of_one_group(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        old = TraceRow(
            "Title",
            "target",
            '["a"]',
            "c1",
            NOON,
            "run-1",
            group='["abt"]',
            plan_hash="p",
            keyed_trace="k1",
            reads='[["s","k","h"]]',
            epoch=2,
            valid_until=NOON + timedelta(hours=1),
            entry_id="e1",
            value_hash="v1",
        )
        new = replace(old, keyed_trace="k2", status="error", valid_until=None, entry_id=None)
        group = TraceRow("Title", "group", '["abt"]', "c1", NOON, "run-1", group='["abt"]', group_trace="g1")
        elsewhere = replace(old, group='["buy"]')
        cache.append(None, [old, group, elsewhere])
        cache.append(None, [new, replace(group, group_trace="g2"), pointer(entry("a", "lamp"))])
        found = sorted(cache.traces("Title", '["abt"]').to_pylist(), key=lambda row: row["kind"])
        assert [row["kind"] for row in found] == ["group", "target"]
        assert found[0]["group_trace"] == "g2"
        assert {name: found[1][name] for name in TraceRow.__slots__ if name != "recorded"} == {
            name: getattr(new, name) for name in TraceRow.__slots__ if name != "recorded"
        }
        assert [row["keyed_trace"] for row in cache.traces("Title", '["buy"]').to_pylist()] == ["k1"]
        assert cache.traces("Title", '["buy"]')["valid_until"].to_pylist() == [old.valid_until]
        assert len(cache.traces("Prompt", '["abt"]')) == 0

    def test_traces_are_taken_as_a_table_too(self, tmp_path: Path) -> None:
        cache, one, two = self.make_cache(tmp_path), entry("a", "A"), entry("a", "B", inputs="i2")
        cache.append(rows(one))
        cache.append(rows(two))
        mark = pointer(one)
        table = {name: [getattr(mark, name)] for name in TRACE_SCHEMA.names}
        cache.append(None, pa.table(table, schema=TRACE_SCHEMA))
        assert _value(cache, "Title", "c1", one.key) == b"A"

    def test_appending_nothing_changes_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        cache.append()
        cache.append(rows(), [])
        cache.append(None, TRACE_SCHEMA.empty_table())
        assert len(cache.history("Title")) == 0

    def test_history_keeps_everything_in_order_of_appends(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for number in range(3):
            cache.append(rows(entry("a", f"v{number}", inputs=f"i{number}")))
        history = cache.history("Title").sort_by("recorded").to_pylist()
        assert [row["value"] for row in history] == [b"v0", b"v1", b"v2"]
        assert len({row["recorded"] for row in history}) == 3

    def test_newest_is_one_row_for_each_key(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        cache.append(rows(entry("a", "old"), entry("b", "lamp")))
        cache.append(rows(entry("a", "new", config_hash="c2")))
        newest = cache.newest("Title")
        assert newest.schema.equals(ENTRY_SCHEMA)
        assert {row["key"]: row["value"] for row in newest.to_pylist()} == {'["a"]': b"new", '["b"]': b"lamp"}
        assert len(newest) == 2

    def test_it_is_read_back_as_the_builder_types_it(self, tmp_path: Path) -> None:
        class Typed(FeatureBuilder[list[str]]):
            key, name, value, version = ("id",), "Typed", pa.list_(pa.string()), "1"

            def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
                return []

        cache = self.make_cache(tmp_path)
        assert cache.read(Typed).schema.field("value").type == pa.list_(pa.string())
        cache.append(rows(entry("1", '["x"]', builder="Typed")))
        cache.append(
            rows(
                entry("1", '["y","z"]', inputs="i2", builder="Typed"),
                entry("2", None, builder="Typed"),
            )
        )
        found = {row["id"]: row["value"] for row in cache.read(Typed).to_pylist()}
        assert found == {"1": ["y", "z"], "2": None}

    def test_the_last_run_of_a_group(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        first = RunRecord("r1", '["abt"]', NOON, "ok", {"keys": 3, "builders": {"Title": {"hit": 1}}})
        cache.record_run(first)
        cache.record_run(RunRecord("r2", '["abt"]', NOON - timedelta(days=1), "partial", {"keys": 4}))
        cache.record_run(replace(first, run_id="r3", group='["buy"]'))
        last = cache.last_run('["abt"]')
        assert last is not None
        assert (last.run_id, last.status, last.record) == ("r2", "partial", {"keys": 4})
        other = cache.last_run('["buy"]')
        assert other is not None
        assert replace(other, recorded=0) == replace(first, run_id="r3", group='["buy"]')
        assert [record.run_id for record in cache.runs('["abt"]')] == ["r2", "r1"]
        assert cache.runs('["other"]') == []
        cache.record_run(replace(first, run_id="r4", status="stopped"))
        cache.record_run(replace(first, run_id="r5", status="failed"))
        last = cache.last_run('["abt"]')
        assert last is not None
        assert last.run_id == "r2"
        assert [record.run_id for record in cache.runs('["abt"]')] == ["r5", "r4", "r2", "r1"]

    # -- many writers ----------------------------------------------------------------------------------------

    def test_threads_lose_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda writer: append_some(cache, writer, 3), range(4)))
        assert len(cache.history("Title")) == 4 * 3 * 2
        assert len(cache.newest("Title")) == 4 * 3 * 2

    def test_a_reader_sees_whole_appends_while_others_write(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        writer = threading.Thread(target=append_some, args=(cache, 0, 6))
        writer.start()
        seen = []
        while writer.is_alive():
            seen.append(len(cache.history("Title")))
        writer.join()
        assert seen == sorted(seen)
        assert all(count % 2 == 0 for count in seen)
        assert len(cache.history("Title")) == 12

    def test_a_pickled_cache_still_answers(self, tmp_path: Path) -> None:
        cache, lamp = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(rows(lamp))
        travelled = pickle.loads(pickle.dumps(cache))
        assert _value(travelled, "Title", "c1", lamp.key) == b"lamp"

    def test_it_is_there_when_opened_again(self, tmp_path: Path) -> None:
        cache, lamp = self.make_cache(tmp_path), entry("a", "lamp")
        cache.append(rows(lamp), [pointer(lamp, reads="[]")])
        again = self.make_cache(tmp_path)
        if self.durable:
            assert again.current("Title", "c1", [lamp.key])[lamp.key].reads == "[]"
            again.append(rows(entry("b", "chair")))
            assert _value(cache, "Title", "c1", '["b"]') == b"chair"

    def test_processes_lose_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        if self.durable:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(2, mp_context=context) as pool:
                list(pool.map(append_some, [cache, cache], [1, 2], [4, 4]))
            assert len(cache.history("Title")) == len(cache.newest("Title")) == 2 * 4 * 2
            stamps: Sequence[int] = cache.history("Title")["recorded"].to_pylist()
            assert len(set(stamps)) == 2 * 4  # one for each append, so that "newest" is never a tie


def append_some(cache: FeatureCache, writer: int, appends: int) -> None:
    """Appends of two entries each, all with keys of their own."""
    for number in range(appends):
        keys: Iterable[str] = (f"{writer}-{number}-{half}" for half in "ab")
        cache.append(rows(*(entry(key, key) for key in keys)))


def _value(cache: FeatureCache, builder: str, config: str, key: str) -> bytes | None:
    found = cache.current(builder, config, [key])
    return found[key].entry.value
