"""What goes down from an overlay: what was new above, once, and the cache below then answers as both did."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import Entry, TraceRow
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.overlay import OverlayCache
from featurekit_spark.cache.promote import Promoted, promote
from featurekit_spark.errors import UsageError
from featurekit_spark.testing.behaviour import NOON, entry, pointer, rows
from featurekit_spark.values import NULL_HASH

ONE, TWO = entry("a", "A"), entry("a", "B", inputs="i2")


def memory(folder: Path) -> Any:
    return MemoryCache()


def delta(folder: Path) -> Any:
    return DeltaCache(str(folder))


@pytest.fixture(params=[memory, delta], ids=["memory", "delta"])
def layers(request: Any, tmp_path: Path) -> tuple[Any, Any]:
    """(own, base)."""
    return request.param(tmp_path / "own"), request.param(tmp_path / "base")


Layers = tuple[Any, Any]
NULL = replace(pointer(ONE), entry_id=None, value_hash=NULL_HASH)


class Title(FeatureBuilder[str]):
    key, value = ("product_id",), pa.string()

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return str(inputs["product_id"])


def value_now(cache: Any, key: str = "a") -> bytes | None:
    asked = entry(key, None).key
    found = cache.current("Title", "c1", [asked])
    return found[asked].entry.value if asked in found else None


def test_what_base_lacks_goes_down_once(layers: Layers) -> None:
    own, base = layers
    base.append(rows(ONE))
    own.append(rows(ONE, TWO, entry("b", "C"), entry("c", "x", builder="Prompt")))
    told = promote(own, base)
    assert told == {"Prompt": Promoted(entries=1), "Title": Promoted(entries=2)}
    assert value_now(base) == b"B" and value_now(base, "b") == b"C"
    assert len(base.history("Title")) == 3
    (found,) = base.by_id("Title", [TWO.entry_id]).values()
    assert replace(found, recorded=0) == TWO

    assert promote(own, base) == {"Prompt": Promoted(), "Title": Promoted()}
    assert len(base.history("Title")) == 3


def test_nothing_happens_in_a_dry_run(layers: Layers) -> None:
    own, base = layers
    own.append(rows(ONE), [pointer(ONE, reads="[]")])
    assert promote(own, base, dry_run=True) == {"Title": Promoted(entries=1, pointers=1)}
    assert len(base.history("Title")) == 0 and base.builders() == []


def test_a_pointer_goes_down_with_its_reads(layers: Layers) -> None:
    own, base = layers
    base.append(rows(ONE))
    base.append(rows(TWO))
    own.append(None, [pointer(ONE, reads="[7]")])
    assert promote(own, base) == {"Title": Promoted(pointers=1)}
    found = base.current("Title", "c1", [ONE.key])[ONE.key]
    assert (found.entry.value, found.reads) == (b"A", "[7]")
    assert promote(own, base) == {"Title": Promoted()}


def test_a_value_that_became_null_is_null_below(layers: Layers) -> None:
    """Its pointer points to nothing, so what it says of run, time and value is all there is."""
    own, base = layers
    base.append(rows(ONE))
    own.append(None, [NULL])
    assert promote(own, base) == {"Title": Promoted(pointers=1)}
    assert value_now(base) is None
    (found,) = base.trace_rows("Title").to_pylist()
    told = {name: value for name, value in found.items() if name != "recorded"}
    assert told == {name: getattr(NULL, name) for name in told}
    assert promote(own, base) == {"Title": Promoted()}
    own.append(None, [pointer(ONE)])
    assert promote(own, base) == {"Title": Promoted(pointers=1)}
    assert value_now(base) == b"A"


def test_an_entry_and_its_end_go_down_together(layers: Layers) -> None:
    own, base = layers
    own.append(rows(ONE, entry("b", "B")))
    own.append(None, [NULL])
    assert promote(own, base) == {"Title": Promoted(entries=2, pointers=1)}
    assert value_now(base) is None and value_now(base, "b") == b"B"
    assert base.read(Title)["value"].to_pylist() == ["B"]


def test_what_base_learnt_later_stays_current(layers: Layers) -> None:
    own, base = layers
    own.append(rows(ONE))
    base.append(rows(TWO))
    assert promote(own, base) == {"Title": Promoted(entries=1, pointers=1)}
    assert value_now(base) == b"B"
    assert set(base.ids("Title").to_pylist()) == {ONE.entry_id, TWO.entry_id}
    assert promote(own, base) == {"Title": Promoted()}


def test_an_answer_that_was_refreshed_goes_down(layers: Layers) -> None:
    """The same identity, computed again after its ttl."""
    own, base = layers
    later = replace(ONE, value=b"later", ts=NOON + timedelta(days=1))
    base.append(rows(ONE))
    own.append(rows(later))
    assert promote(own, base) == {"Title": Promoted(entries=1)}
    assert value_now(base) == b"later"
    assert promote(own, base) == {"Title": Promoted()}


def test_an_older_answer_does_not_hide_a_newer_one(layers: Layers) -> None:
    own, base = layers
    own.append(rows(ONE))
    base.append(rows(replace(ONE, value=b"later", ts=NOON + timedelta(days=1))))
    assert promote(own, base) == {"Title": Promoted()}
    assert value_now(base) == b"later"


def test_errors_stay_where_they_are(layers: Layers) -> None:
    own, base = layers
    own.append(rows(entry("a", None, status="error", error="no answer", value_hash=None)))
    assert promote(own, base) == {"Title": Promoted()}
    assert len(base.history("Title")) == 0


def test_some_builders_and_one_run(layers: Layers) -> None:
    own, base = layers
    second = replace(TWO, run_id="run-2")
    own.append(rows(ONE, entry("a", "x", builder="Prompt")))
    own.append(rows(second))
    assert promote(own, base, builders=["Title"], run_id="run-2") == {"Title": Promoted(entries=1)}
    assert base.builders() == ["Title"] and base.ids("Title").to_pylist() == [TWO.entry_id]
    assert promote(own, base, builders=["Title"]) == {"Title": Promoted(entries=1, pointers=1)}
    assert value_now(base) == b"B"
    with pytest.raises(UsageError, match=r"builder 'Titel' has nothing to promote.*Did you mean 'Title'"):
        promote(own, base, builders=["Titel"])


def test_traces_go_down_where_asked(layers: Layers) -> None:
    own, base = layers
    target = TraceRow(
        *("Title", "target", ONE.key, "c1", NOON, "run-1"),
        group='["abt"]',
        keyed_trace="k1",
        entry_id=ONE.entry_id,
    )
    group = TraceRow("Title", "group", '["abt"]', "c1", NOON, "run-1", group='["abt"]', group_trace="g")
    own.append(rows(ONE), [target, group])
    assert promote(own, base, dry_run=True) == {"Title": Promoted(entries=1)}
    assert promote(own, base, traces=True) == {"Title": Promoted(entries=1, traces=2)}
    assert sorted(row["kind"] for row in base.traces("Title", '["abt"]').to_pylist()) == ["group", "target"]
    assert promote(own, base, traces=True) == {"Title": Promoted()}
    base.append(None, [replace(target, keyed_trace="k2")])
    assert promote(own, base, traces=True) == {"Title": Promoted()}


def test_it_is_one_commit(tmp_path: Path) -> None:
    own, base = delta(tmp_path / "own"), delta(tmp_path / "base")
    base.append(rows(entry("z", "z")), [pointer(entry("z", "z"))])
    for number in range(3):
        own.append(rows(entry("a", f"{number}", inputs=f"i{number}"), entry("p", "x", builder="Prompt")))
        own.append(None, [pointer(entry("a", "0", inputs="i0"), reads="[]")])
    versions = [DeltaTable(base.table_path(name)).version() for name in ("entries", "traces")]
    promote(own, base)
    after = [DeltaTable(base.table_path(name)).version() for name in ("entries", "traces")]
    assert after == [version + 1 for version in versions]
    assert value_now(base) == b"0"


def steps() -> Any:
    """Appends of entries and pointers, to own (True) or base, of two keys and three inputs; None: it became null."""
    inputs = st.sampled_from(["i1", "i2", "i3", None])
    step = st.tuples(st.booleans(), st.sampled_from("ab"), inputs, st.booleans())
    return st.lists(step, max_size=12)


def seen(cache: Any) -> dict[str, tuple[bytes | None, str | None]]:
    keys = [entry(key, None).key for key in "ab"]
    return {k: (f.entry.value, f.reads) for k, f in cache.current("Title", "c1", keys).items()}


@given(steps(), st.booleans())
def test_base_then_answers_what_both_did(
    history: list[tuple[bool, str, str | None, bool]], traces: bool
) -> None:
    own, base = MemoryCache(), MemoryCache()
    both, made = OverlayCache(base, own), set[Entry]()
    for above, key, inputs, point in history:
        layer = own if above else base
        if inputs is None:
            layer.append(None, [replace(NULL, key=entry(key, None).key)])
            continue
        one = entry(key, f"{key} of {inputs}", inputs=inputs)
        if point and one in made:
            layer.append(None, [pointer(one, reads=f"[{len(history)}]")])
        else:
            made.add(one)
            layer.append(rows(one))
    before = seen(both)
    if own.builders():
        promote(own, base, traces=traces)
    # A pointer of base to what only own had is a pointer to nothing no more.
    assert seen(both) == before == seen(base)
    assert set(base.ids("Title").to_pylist()) == {one.entry_id for one in made}
    if own.builders():
        assert set(promote(own, base, traces=traces).values()) == {Promoted()}
