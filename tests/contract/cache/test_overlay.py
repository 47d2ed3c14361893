"""One cache over another: the behaviour of any cache, and what shines through from below."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import Context, Session
from featurekit_spark.apps.product_recs import LLMLogic, ProductIds
from featurekit_spark.cache.base import FeatureCache, RunRecord, TraceRow
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.overlay import OverlayCache
from featurekit_spark.errors import UsageError
from featurekit_spark.testing.behaviour import NOON, CacheBehaviour, entry, pointer, rows
from featurekit_spark.testing.fakes import CountingLLM, MovingClock, ProductDBFake

Make = Callable[[Path], FeatureCache]


def memory(folder: Path) -> MemoryCache:
    return MemoryCache()


def delta(folder: Path) -> DeltaCache:
    return DeltaCache(str(folder))


class TestOverlayOfTables(CacheBehaviour):
    def make_cache(self, folder: Path) -> OverlayCache:
        return OverlayCache(delta(folder / "base"), delta(folder / "own"))


class TestOverlayInMemory(CacheBehaviour):
    durable = False

    def make_cache(self, folder: Path) -> OverlayCache:
        return OverlayCache(MemoryCache(), MemoryCache())


class TestOverlayOfAnOverlay(CacheBehaviour):
    durable = False

    def make_cache(self, folder: Path) -> OverlayCache:
        return OverlayCache(OverlayCache(MemoryCache(), MemoryCache()), MemoryCache())


class Split(OverlayCache):
    """Every second append goes below, as if production ran in between."""

    turn = 0

    def append(self, entries: Any = None, traces: Any = ()) -> None:
        self.turn += 1
        (self.base if self.turn % 2 else self.own).append(entries, traces)


class TestRowsOfBothAreOneCache(CacheBehaviour):
    """Whichever layer a row is in, the answers are those of one cache with all of the rows."""

    durable = False

    def make_cache(self, folder: Path) -> Split:
        return Split(MemoryCache(), MemoryCache())


class TestTablesOfBothAreOneCache(CacheBehaviour):
    durable = False  # another process has a count of its own

    def make_cache(self, folder: Path) -> Split:
        return Split(delta(folder / "base"), delta(folder / "own"))


@pytest.fixture(params=[memory, delta], ids=["memory", "delta"])
def layers(request: Any, tmp_path: Path) -> tuple[FeatureCache, FeatureCache, OverlayCache]:
    """(base, own, one over the other)."""
    base, own = request.param(tmp_path / "base"), request.param(tmp_path / "own")
    return base, own, OverlayCache(base, own)


Layers = tuple[FeatureCache, FeatureCache, OverlayCache]
ONE, TWO = entry("a", "A"), entry("a", "B", inputs="i2")


def value_now(cache: FeatureCache) -> bytes | None:
    """The value of the key `a`, by every way that tells it."""
    found = cache.current("Title", "c1", [ONE.key])[ONE.key]
    (newest,) = cache.newest("Title").to_pylist()
    (current,) = [f for f in cache.candidates("Title", "c1", [ONE.key]) if f.current]
    assert found.current and newest["value"] == current.entry.value == found.entry.value
    return found.entry.value


def test_what_base_has_is_read_through(layers: Layers) -> None:
    base, own, over = layers
    base.append(rows(ONE), [pointer(ONE, reads="[]")])
    assert over.find("Title", "c1", {ONE.key: ONE.entry_id})[ONE.key].reads == "[]"
    assert value_now(over) == b"A"
    assert over.has("Title") and not own.has("Title")
    assert list(over.by_id("Title", [ONE.entry_id])) == over.ids("Title").to_pylist() == [ONE.entry_id]
    assert over.builders() == ["Title"] and own.builders() == []  # type: ignore[attr-defined]


def test_what_is_new_is_written_aside(layers: Layers) -> None:
    base, own, over = layers
    base.append(rows(ONE))
    over.append(rows(TWO), [pointer(TWO)])
    over.record_run(RunRecord("r1", '["abt"]', NOON, "ok", {}))
    over.put_mark("m", {"format": 1})
    assert value_now(over) == b"B" and value_now(base) == b"A" and value_now(own) == b"B"
    assert len(base.history("Title")) == 1 and len(over.history("Title")) == 2
    assert base.last_run('["abt"]') is None and base.mark("m") is None


def test_a_pointer_leads_to_an_entry_of_the_other_layer(layers: Layers) -> None:
    base, own, over = layers
    base.append(rows(ONE))
    base.append(rows(TWO))
    over.append(None, [pointer(ONE, reads="[1]")])
    assert value_now(over) == b"A"
    assert over.current("Title", "c1", [ONE.key])[ONE.key].reads == "[1]"
    assert value_now(base) == b"B" and own.current("Title", "c1", [ONE.key]) == {}


def test_what_happens_below_later_is_newer(layers: Layers) -> None:
    base, _, over = layers
    over.append(rows(ONE))
    assert value_now(over) == b"A"
    base.append(rows(TWO))
    assert value_now(over) == b"B"
    over.append(None, [pointer(ONE)])
    assert value_now(over) == b"A"


def test_an_entry_made_again_answers_with_the_newer_row(layers: Layers) -> None:
    base, own, over = layers
    again = replace(ONE, value=b"later")
    own.append(rows(ONE))
    base.append(rows(again))
    assert over.by_id("Title", [ONE.entry_id])[ONE.entry_id].value == value_now(over) == b"later"
    assert over.ids("Title").to_pylist() == [ONE.entry_id]


def test_traces_and_runs_of_both(layers: Layers) -> None:
    base, _, over = layers
    old = TraceRow("Title", "target", '["a"]', "c1", NOON, "r1", group='["abt"]', keyed_trace="k1")
    base.append(None, [old, replace(old, key='["b"]')])
    over.append(None, [replace(old, keyed_trace="k2")])
    found = {row["key"]: row["keyed_trace"] for row in over.traces("Title", '["abt"]').to_pylist()}
    assert found == {'["a"]': "k2", '["b"]': "k1"}

    run = RunRecord("r1", '["abt"]', NOON, "ok", {})
    base.record_run(run)
    assert (over.last_run('["abt"]') or run).run_id == "r1"
    over.record_run(replace(run, run_id="r2"))
    base.record_run(replace(run, run_id="r3"))
    assert [record.run_id for record in over.runs('["abt"]')] == ["r3", "r2", "r1"]
    assert (over.last_run('["abt"]') or run).run_id == "r3"


def test_workers_write_files_of_the_upper_cache(tmp_path: Path) -> None:
    base, own = delta(tmp_path / "base"), delta(tmp_path / "own")
    base.append(rows(ONE))
    over = OverlayCache(base, own)
    staging = over.staging("run-1")
    assert staging is not None and staging.uri.rstrip("/").endswith("own/entries")
    writer = staging.writer()
    assert writer is not None
    writer.add(rows(TWO))
    over.append_staged(writer.close())
    staging.close()
    assert value_now(over) == b"B" and len(base.history("Title")) == 1
    assert OverlayCache(base, MemoryCache()).staging("run-1") is None


def test_a_cache_that_hides_its_rows_is_no_layer(tmp_path: Path) -> None:
    class Hidden:
        pass

    with pytest.raises(UsageError, match="own is a Hidden, which does not give its rows"):
        OverlayCache(MemoryCache(), Hidden())  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


TITLES = {"p1": "Desk Lamp", "p2": "Floor Lamp", "p3": "Espresso Machine", "p4": "Coffee Grinder"}


def run(cache: FeatureCache, titles: dict[str, str], llm: CountingLLM) -> Any:
    context = Context(
        product_db=ProductDBFake({product: {"title": title} for product, title in titles.items()}),
        merchant_config={"top_k": 2},
        llm=llm,
        clock=MovingClock(),
    )
    session = Session(context, cache, engine="local")
    result = session.run(LLMLogic.over(ProductIds), merchant="abt", market="US")
    return result, result.values(LLMLogic)


def test_a_development_run_pays_nothing_for_what_production_has(tmp_path: Path) -> None:
    llm = CountingLLM()
    prod, dev = delta(tmp_path / "prod"), delta(tmp_path / "dev")
    _, answers = run(prod, TITLES, llm)
    assert sum(llm.calls.values()) == len(TITLES)
    before = files_below(tmp_path / "prod")

    result, seen = run(OverlayCache(prod, dev), TITLES, llm)
    assert seen == answers and sum(counts.computed for counts in result.builders.values()) == 0
    assert sum(llm.calls.values()) == len(TITLES)

    edited = {**TITLES, "p1": "Table Lamp"}
    result, seen = run(OverlayCache(prod, dev), edited, llm)
    assert sum(llm.calls.values()) == len(TITLES) + 1
    assert result.builders["ProductEmbedding"].computed > 0
    _, alone = run(MemoryCache(), edited, CountingLLM())
    assert seen == alone

    # There and back: everything is found again, here and there.
    _, seen = run(OverlayCache(prod, dev), TITLES, llm)
    assert seen == answers and sum(llm.calls.values()) == len(TITLES) + 1
    # A copy that travelled reads both.
    copy = pickle.loads(pickle.dumps(OverlayCache(prod, dev)))
    assert len(copy.newest("LLMLogic")) == len(TITLES)
    assert files_below(tmp_path / "prod") == before
