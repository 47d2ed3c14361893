"""Going back to an earlier state: nothing is computed or walked, and every reader sees the earlier entries again."""

from __future__ import annotations

import json
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.builder import FeatureBuilder, Source
from featurekit_spark.cache.current import moved_since
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.freshness import Freshness
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests.unit.core.test_unchanged import Ids, Shop, ShopContext, Title


class Named(Source[str]):
    """A title, null where it is empty."""

    key, value, version, needs = ("shop", "id"), pa.string(), "1", ("shop",)

    def snapshot_version(self, context: Any) -> str | None:
        return context.shop.at

    def build_one(self, inputs: Any, config: Any, context: Any) -> str | None:
        return context.shop.titles[inputs["id"]] or None


class Plain(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Title,), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Title"].lower()


class All(FeatureBuilder[str]):
    key, deps, value, version = ("shop",), (Plain.over(Ids),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return " ".join(inputs["Plain"].values)


class Place(FeatureBuilder[int]):
    key, deps, value, version = ("shop", "id"), (Plain, All), pa.int64(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> int:
        return int(inputs["All"].split(" ").index(inputs["Plain"]))


class Folded(FeatureBuilder[str]):
    """Of a title alone, whoever has it."""

    key, value, version = ("text",), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["text"].casefold()


class Shared(FeatureBuilder[str]):
    """Of a text, by all shops: which entry is current is not one shop's to say."""

    key, deps, value, version = ("text",), (Folded,), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Folded"]


class Seen(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Shared.on(text=Title), Plain), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Shared"] + inputs["Plain"]


@pytest.fixture
def cache(tmp_path: Path) -> DeltaCache:
    return DeltaCache(str(tmp_path / "cache"))


def run(own: Shop, cache: Any, target: Any = Place, name: str = "s", **more: Any) -> Any:
    own.reads.clear()
    session = Session(ShopContext(own, more.pop("clock", None) or MovingClock()), cache, engine="local")
    return session.run(target.over(Ids), shop=name, **more)


def current(cache: DeltaCache, *builders: type[FeatureBuilder[Any]]) -> dict[str, dict[str, Any]]:
    """What readers see, by builder and key."""
    return {b.name: {row["key"]: row["value"] for row in cache.newest(b.name).to_pylist()} for b in builders}


ALL = (Ids, Title, Plain, All, Place)


def test_the_earlier_state_is_current_again(cache: DeltaCache) -> None:
    own = Shop({"a": "Lamp", "b": "Sofa", "c": "Rug"}, "1")
    run(own, cache)
    before = current(cache, *ALL)
    own.titles, own.at = {"a": "Zebra", "b": "Sofa", "d": "Urn"}, "2"
    changed = run(own, cache).values("Place")
    assert changed["s", "d"] == 2
    own.titles, own.at = {"a": "Lamp", "b": "Sofa", "c": "Rug"}, "1"
    back = run(own, cache)
    assert back.values("Place") == {("s", "a"): 0, ("s", "b"): 1, ("s", "c"): 2}
    assert back.builders["Place"].hit == 3 and back.builders["Plain"].keys == 0  # proven, not walked
    assert not back.unchanged and not any(
        c.computed for n, c in back.builders.items() if n not in ("Ids", "Title")
    )
    now = current(cache, *ALL)
    for name, values in before.items():
        assert {key: now[name].get(key) for key in values} == values, name
    again = run(own, cache)
    assert again.unchanged and not own.reads
    own.titles, own.at = {"a": "Zebra", "b": "Sofa", "d": "Urn"}, "2"
    assert run(own, cache).values("Place") == changed  # and forth
    assert current(cache, All)["All"]['["s"]'] == b"zebra sofa urn"


class Titled(FeatureBuilder[str]):
    """Null, without a build, where there is no title."""

    key, deps, value, version = ("shop", "id"), (Named,), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Named"].title()


def test_what_was_null_is_null_again(cache: DeltaCache) -> None:
    own = Shop({"a": "", "b": "Sofa"}, "1")
    run(own, cache, Titled)
    own.titles, own.at = {"a": "urn", "b": "Sofa"}, "2"
    run(own, cache, Titled)
    assert set(current(cache, Titled)["Titled"]) == {'["s","a"]', '["s","b"]'}
    own.titles, own.at = {"a": "", "b": "Sofa"}, "1"
    back = run(own, cache, Titled)
    assert back.builders["Titled"].hit == 2  # proven, not walked
    assert set(current(cache, Titled)["Titled"]) == {'["s","b"]'}


def test_other_groups_keep_what_is_theirs(cache: DeltaCache) -> None:
    own, other = Shop({"a": "Lamp"}, "1"), Shop({"a": "Lamp"}, "1")
    run(own, cache), run(other, cache, name="t")
    own.titles, own.at, other.titles, other.at = {"a": "Urn"}, "2", {"a": "Vase"}, "2"
    run(own, cache), run(other, cache, name="t")
    own.titles, own.at = {"a": "Lamp"}, "1"
    run(own, cache)
    assert current(cache, Plain)["Plain"] == {'["s","a"]': b"lamp", '["t","a"]': b"vase"}


def test_a_group_whose_name_begins_alike_keeps_what_is_its_own(cache: DeltaCache) -> None:
    own, other = Shop({"a": "Lamp"}, "1"), Shop({"a": "Lamp"}, "1")
    names: tuple[Any, Any] = (1, 12)
    run(other, cache, name=names[1]), run(own, cache, name=names[0])
    own.titles, own.at, other.titles, other.at = {"a": "Urn"}, "2", {"a": "Vase"}, "2"
    run(other, cache, name=names[1]), run(own, cache, name=names[0])
    own.titles, own.at = {"a": "Lamp"}, "1"
    run(own, cache, name=names[0])
    assert current(cache, Plain)["Plain"] == {'[1,"a"]': b"lamp", '[12,"a"]': b"vase"}


def test_what_groups_share_is_walked(cache: DeltaCache) -> None:
    own = Shop({"a": "Lamp"}, "1")
    run(own, cache, Seen)
    own.titles, own.at = {"a": "Urn"}, "2"
    run(own, cache, Seen)
    own.titles, own.at = {"a": "Lamp"}, "1"
    back = run(own, cache, Seen)
    assert back.values("Seen") == {("s", "a"): "lamplamp"} and not back.builders["Seen"].computed


def test_what_expired_in_between_is_built_again(cache: DeltaCache) -> None:
    class Brief(Place):
        name = "Brief"
        freshness = Freshness(ttl=timedelta(hours=3))

    clock = MovingClock()
    own = Shop({"a": "Lamp"}, "1")
    run(own, cache, Brief, clock=clock)
    clock.advance(hours=2)
    own.titles, own.at = {"a": "Urn"}, "2"
    run(own, cache, Brief, clock=clock)
    clock.advance(hours=2)
    own.titles, own.at = {"a": "Lamp"}, "1"
    assert run(own, cache, Brief, clock=clock).builders["Brief"].computed == 1


def test_entries_that_were_taken_out_are_built_again(cache: DeltaCache) -> None:
    from featurekit_spark.cache.invalidate import invalidate

    own = Shop({"a": "Lamp"}, "1")
    run(own, cache)
    own.titles, own.at = {"a": "Urn"}, "2"
    run(own, cache)
    invalidate(cache, "Place", None, reason="a test", now=MovingClock()())
    own.titles, own.at = {"a": "Lamp"}, "1"
    assert run(own, cache).builders["Place"].computed == 1


rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, "x", "y"])), max_size=20)


@settings(max_examples=300)
@given(rows, rows)
def test_moved_is_what_differs_between_then_and_now(before: list[Any], later: list[Any]) -> None:
    everything = [*before, *later]
    table = pa.table(
        {
            "key": pa.array([key for key, _ in everything], pa.string()),
            "entry_id": pa.array([entry for _, entry in everything], pa.string()),
            "recorded": pa.array(range(len(everything)), pa.int64()),
        }
    )
    then, now = dict(before), dict(everything)
    found = moved_since(table, len(before) - 1)
    told = dict(zip(found["key"].to_pylist(), found["entry_id"].to_pylist(), strict=True))
    assert told == {key: entry for key, entry in then.items() if now[key] != entry}
    all_moved = moved_since(table, len(before) - 1, emptied=True)
    told = dict(zip(all_moved["key"].to_pylist(), all_moved["entry_id"].to_pylist(), strict=True))
    assert told == {key: then.get(key) for key, entry in now.items() if then.get(key) != entry}


TITLES = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["Lamp", "Sofa", "Urn"]), min_size=1)


@settings(max_examples=15, deadline=None)
@given(st.lists(TITLES, min_size=2, max_size=3), st.lists(st.integers(0, 2), min_size=4, max_size=7))
def test_readers_see_what_a_run_from_nothing_makes(states: list[dict[str, str]], visits: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = DeltaCache(folder)
        for visit in visits:
            titles = states[visit % len(states)]
            own = Shop(dict(titles), json.dumps(titles, sort_keys=True))
            fresh = MemoryCache()
            assert run(own, cache).values("Place") == run(own, fresh).values("Place")
            seen, expected = current(cache, *ALL), current(fresh, *ALL)
            for name, values in expected.items():
                assert {key: seen[name].get(key) for key in values} == values, name
