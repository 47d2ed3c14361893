"""A run that ends before anything is read, and all the reasons for which it must not."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet, Source
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.overlay import OverlayCache
from featurekit_spark.cache.promote import promote
from featurekit_spark.freshness import Freshness
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock


@dataclass
class Shop:
    """Titles by id, at a version, with what was read of them."""

    titles: dict[str, str]
    at: str | None = "1"
    reads: list[str] = field(default_factory=list)
    broken: bool = False


@dataclass(frozen=True)
class ShopContext:
    shop: Shop
    clock: Any = field(default_factory=MovingClock)


class Ids(KeySet):
    key, of, value, version, needs = ("shop",), "id", pa.list_(pa.string()), "1", ("shop",)

    def snapshot_version(self, context: Any) -> str | None:
        return context.shop.at

    def build(self, inputs: Any, config: Any, context: Any) -> list[list[str]]:
        context.shop.reads.append("ids")
        return [sorted(context.shop.titles)] * len(inputs)


class Title(Source[str]):
    key, value, version, needs = ("shop", "id"), pa.string(), "1", ("shop",)

    def snapshot_version(self, context: Any) -> str | None:
        return context.shop.at

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        context.shop.reads.append(inputs["id"])
        if context.shop.broken and inputs["id"] == "a":
            raise OSError("gone")
        return context.shop.titles[inputs["id"]]


class Loud(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Title,), pa.string(), "1"

    @dataclass(frozen=True)
    class Config:
        mark: str = "!"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Title"].upper() + config.mark


class Passing(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Title,), pa.string(), "1"
    freshness = Freshness(ttl=timedelta(hours=1))

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["Title"]


class ByHand(FeatureBuilder[str]):
    key, value, version = ("shop", "id"), pa.string(), "1"

    def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str, str]:
        return controller.get(Title, key).value, ""


@pytest.fixture(params=["memory", "delta"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MemoryCache() if request.param == "memory" else DeltaCache(str(tmp_path / "cache"))


def run(shop: Shop, cache: Any, *targets: Any, clock: Any = None, **more: Any) -> Any:
    """A run of the local engine; `shop.reads` is what this run read."""
    shop.reads.clear()
    context = ShopContext(shop, clock or MovingClock())
    targets = targets or (Loud.over(Ids),)
    return Session(context, cache, engine="local").run(*targets, shop="s", **more)


def shop(**changed: Any) -> Shop:
    return Shop({"a": "lamp", "b": "sofa"}, **changed)


def test_nothing_is_read_where_versions_are_the_same(cache: Any) -> None:
    own = shop()
    first = run(own, cache)
    assert own.reads and not first.unchanged
    again = run(own, cache)
    assert not own.reads and again.unchanged and again.status == "ok" and again.keys == 2
    assert again.builders["Loud"].hit == 2 and again.builders["Title"].hit == 0
    names = ["Loud"]
    assert again.execution.fingerprint(names) == first.execution.fingerprint(names)
    assert not own.reads


def test_values_can_still_be_asked_for(cache: Any) -> None:
    own = shop()
    first = run(own, cache).values("Loud")
    again = run(own, cache)
    assert again.values("Loud") == first == {("s", "a"): "LAMP!", ("s", "b"): "SOFA!"}
    assert own.reads  # checked after all


def test_a_new_version_is_read_and_compared(cache: Any) -> None:
    own = shop()
    run(own, cache)
    own.at = "2"
    same = run(own, cache)
    assert own.reads and same.unchanged  # a price changed, no title did
    run(own, cache)
    assert not own.reads
    own.titles["a"], own.at = "lamps", "3"
    assert run(own, cache).builders["Loud"].computed == 1


def test_a_source_without_a_version_is_read_each_time(cache: Any) -> None:
    own = shop(at=None)
    run(own, cache)
    assert run(own, cache).unchanged and own.reads


class Scan:
    """A reading of the shop, as a table."""

    bytes = 100

    def __init__(self, shop: Shop, *columns: str) -> None:
        self._shop, self._columns = shop, columns

    def to_arrow(self) -> pa.Table:
        self._shop.reads.append("all")
        titles = self._shop.titles
        return pa.table({"id": list(titles), "title": list(titles.values())}).select(self._columns)


class ScannedIds(Ids):
    name = "Ids"

    def scan(self, group: Any, config: Any, context: Any) -> Scan:
        return Scan(context.shop, "id")


class ScannedTitle(Title):
    name = "ScannedTitle"

    def scan(self, group: Any, config: Any, context: Any) -> Scan:
        return Scan(context.shop, "id", "title")


class Quiet(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (ScannedTitle,), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["ScannedTitle"].lower()


@pytest.mark.parametrize("at", [None, "1"])
def test_scans_that_hold_what_they_held_end_a_run(cache: Any, at: str | None) -> None:
    own = shop(at=at)
    target = Quiet.over(ScannedIds)
    first = run(own, cache, target)
    own.at = at and "2"
    again = run(own, cache, target)
    assert own.reads == ["all", "all"] and again.unchanged and again.keys == 2
    assert len(cache.runs('["s"]')) == 1  # nothing was checked key by key
    assert again.execution.fingerprint(["Quiet"]) == first.execution.fingerprint(["Quiet"])
    run(own, cache, target)
    assert own.reads == ([] if at else ["all", "all"])  # the version of today is remembered
    own.titles["a"], own.at = "Lamps", at and "3"
    changed = run(own, cache, target)
    assert own.reads == ["all", "all"]  # what was compared is not read again
    assert changed.builders["Quiet"].computed == 1 and changed.values("Quiet")["s", "a"] == "lamps"
    own.titles, own.at = {"b": "sofa", "a": "Lamps"}, at and "4"
    assert run(own, cache, target).unchanged  # in another order every key is checked
    assert len(cache.runs('["s"]')) == 3


def test_an_expired_answer_is_built_though_scans_hold_what_they_held(cache: Any) -> None:
    class Brief(Quiet):
        name = "Brief"
        freshness = Freshness(ttl=timedelta(hours=1))

    own, clock = shop(at=None), MovingClock()
    run(own, cache, Brief.over(ScannedIds), clock=clock)
    clock.advance(hours=2)
    assert run(own, cache, Brief.over(ScannedIds), clock=clock).builders["Brief"].computed == 2


def test_another_config_is_another_run(cache: Any) -> None:
    own = shop()
    run(own, cache)
    assert run(own, cache, configs={Loud: Loud.Config("?")}).builders["Loud"].computed == 2
    assert run(own, cache).builders["Loud"].hit == 2 and own.reads  # back: found by identity
    run(own, cache)
    assert not own.reads


def test_each_set_of_targets_has_a_mark_of_its_own(cache: Any) -> None:
    own = shop()
    run(own, cache)
    run(own, cache, Loud.over(Ids), Title.over(Ids))
    assert own.reads
    run(own, cache)  # the mark was dropped before the other targets were computed
    assert own.reads
    for targets in ((Loud.over(Ids),), (Loud.over(Ids), Title.over(Ids))):
        assert run(own, cache, *targets).unchanged and not own.reads


def test_what_failed_is_tried_again(cache: Any) -> None:
    own = shop(broken=True)
    assert run(own, cache).status == "partial"
    own.broken = False
    assert run(own, cache).builders["Loud"].computed == 1
    run(own, cache)
    assert not own.reads


def test_what_expires_is_computed_again(cache: Any) -> None:
    own, clock = shop(), MovingClock()
    first = run(own, cache, Passing.over(Ids), clock=clock)
    clock.now = first.ts + timedelta(minutes=59)
    assert run(own, cache, Passing.over(Ids), clock=clock).unchanged and not own.reads
    clock.now = first.ts + timedelta(hours=1)
    assert run(own, cache, Passing.over(Ids), clock=clock).builders["Passing"].computed == 2


def test_a_hand_written_get_is_always_asked(cache: Any) -> None:
    own = shop()
    run(own, cache, ByHand.over(Ids))
    run(own, cache, ByHand.over(Ids))
    assert own.reads


def test_a_cache_that_lost_its_tables_vouches_for_nothing(tmp_path: Path) -> None:
    import shutil

    own, cache = shop(), DeltaCache(str(tmp_path / "cache"))
    run(own, cache)
    shutil.rmtree(tmp_path / "cache" / "entries")
    assert run(own, DeltaCache(cache.path)).builders["Loud"].computed == 2


def test_a_damaged_mark_is_none(tmp_path: Path) -> None:
    own, cache = shop(), DeltaCache(str(tmp_path / "cache"))
    run(own, cache)
    marks = list((tmp_path / "cache" / "state").glob("*.json"))
    for text in ("", "[]", "{}", '{"name": "other", "mark": {}}'):
        for mark in marks:
            mark.write_text(text)
        assert run(own, cache).unchanged and own.reads


def test_a_session_that_cannot_start_is_not_needed(tmp_path: Path) -> None:
    own, cache = shop(), DeltaCache(str(tmp_path / "cache"))
    run(own, cache)

    def start() -> Any:
        raise AssertionError("a session was started")

    own.reads.clear()
    warm = Session(ShopContext(own), cache, engine="spark", spark=start)
    assert warm.run(Loud.over(Ids), shop="s").unchanged and not own.reads


class FirstIds(Ids):
    name = "FirstIds"

    @dataclass(frozen=True)
    class Config:
        limit: int = 1

    def build(self, inputs: Any, config: Any, context: Any) -> list[list[str]]:
        return [sorted(context.shop.titles)[: config.limit]] * len(inputs)


def test_another_config_of_a_key_set_is_another_run(cache: Any) -> None:
    own = shop()
    assert run(own, cache, Loud.over(FirstIds)).keys == 1
    more = run(own, cache, Loud.over(FirstIds), configs={FirstIds: FirstIds.Config(2)})
    assert more.keys == 2 and more.builders["Loud"].computed == 1


def test_members_are_read_again_when_their_key_set_has_expired(cache: Any) -> None:
    class BriefIds(Ids):
        name = "BriefIds"
        freshness = Freshness(ttl=timedelta(hours=1))

        def snapshot_version(self, context: Any) -> str | None:
            return None

    own, clock = shop(), MovingClock()
    assert run(own, cache, Loud.over(BriefIds), clock=clock).keys == 2
    own.titles["c"] = "rug"
    assert run(own, cache, Loud.over(BriefIds), clock=clock).keys == 2
    clock.advance(hours=2)
    assert run(own, cache, Loud.over(BriefIds), clock=clock).keys == 3


class OneId(Ids):
    name = "OneId"

    def build(self, inputs: Any, config: Any, context: Any) -> list[list[str]]:
        return [["a"]] * len(inputs)


class Reference(Source[str]):
    key, value, version, needs = ("shop", "id"), pa.string(), "1", ("shop",)

    def snapshot_version(self, context: Any) -> str | None:
        return "always"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return "b"


class OwnTitle(Title):
    name = "OwnTitle"

    def snapshot_version(self, context: Any) -> str | None:
        return None

    def scan(self, group: Any, config: Any, context: Any) -> Scan:
        return Scan(Shop({"a": context.shop.titles["a"]}), "id", "title")


class Pair(FeatureBuilder[str]):
    """Of a title that a scan shows, and one that a value leads to."""

    key, value, version = ("shop", "id"), pa.string(), "1"
    deps = (OwnTitle, OwnTitle.on(id=Reference).named("there"))

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return inputs["OwnTitle"] + inputs["there"]


def test_a_scan_says_nothing_of_what_a_value_led_to(cache: Any) -> None:
    own = shop()
    assert run(own, cache, Pair.over(OneId)).values("Pair") == {("s", "a"): "lampsofa"}
    own.titles["b"] = "rug"
    assert run(own, cache, Pair.over(OneId)).values("Pair") == {("s", "a"): "lamprug"}


@pytest.mark.parametrize("at", [None, "1"])
def test_a_request_in_between_leaves_no_mark(cache: Any, at: str | None) -> None:
    own, target = shop(at=at), Quiet.over(ScannedIds)
    run(own, cache, target)
    own.titles["a"], own.at = "Urn", at and "2"
    assert cache(Quiet).get(key=("s", "a"), context=ShopContext(own)) == "urn"
    own.titles["a"], own.at = "lamp", at
    run(own, cache, target)
    current = {row["key"]: row["value"] for row in cache.newest("Quiet").to_pylist()}
    assert current['["s","a"]'] == b"lamp"


def test_runs_on_the_base_of_an_overlay_end_no_run_above(tmp_path: Path) -> None:
    base, mine = DeltaCache(str(tmp_path / "base")), DeltaCache(str(tmp_path / "mine"))
    over, own = OverlayCache(base, mine), shop()
    run(own, over)
    run(Shop({"a": "urn", "b": "sofa"}, "9"), base)
    run(own, over)
    assert {row["value"] for row in over.newest("Loud").to_pylist()} == {b"LAMP!", b"SOFA!"}
    promote(mine, base)
    run(Shop({"a": "urn", "b": "sofa"}, "9"), base)
    assert {row["value"] for row in base.newest("Loud").to_pylist()} == {b"URN!", b"SOFA!"}
