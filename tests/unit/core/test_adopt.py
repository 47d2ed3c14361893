"""Adoption, over both caches: what is bound, what is refused, and that nothing is computed or paid on the way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.adopt import Adoption, AdoptionStatus, adopt, adopted_hashes
from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.changes import changed_builders
from featurekit_spark.errors import CacheError, UsageError
from featurekit_spark.freshness import Freshness
from featurekit_spark.graph import Graph
from featurekit_spark.session import RunResult, Session
from tests import shop
from tests.shop import PRODUCT, Product, ProductIds, Title

ABT = {"merchant": "abt", "market": "US"}
ADOPTED, WOULD, NOTHING, REFUSED = AdoptionStatus


class Cut(FeatureBuilder[str]):
    """The first words of a title."""

    key, deps, value, needs = PRODUCT, (Title,), pa.string(), ("world",)

    @dataclass(frozen=True)
    class Config:
        words: int = 2

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        context.world.done(self, inputs["Title"])
        kept = []
        for word in inputs["Title"].split():
            if len(kept) < config.words:
                kept.append(word)
        return " ".join(kept)


class Commented(Cut):
    name = "Cut"
    version = None


class Sliced(FeatureBuilder[str]):
    """The same values, said shorter."""

    name = "Cut"
    key, deps, value, needs, Config = PRODUCT, (Title,), pa.string(), ("world",), Cut.Config

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        context.world.done(self, inputs["Title"])
        return " ".join(inputs["Title"].split()[: config.words])


class Shouted(Sliced):
    """Other values for what is longer than three letters."""

    name = "Cut"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        cut = super().build_one(inputs, config, context)
        return cut.upper() if len(cut) > 4 else cut


def above(cut: type[FeatureBuilder[str]]) -> type[FeatureBuilder[str]]:
    """A target over one of the versions; its own code is the same."""

    class Shown(FeatureBuilder[str]):
        key, deps, value, needs, version = PRODUCT, (cut,), pa.string(), ("world",), "1"

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
            context.world.done(self, inputs["Cut"])
            return f"<{inputs['Cut']}>"

    return Shown


@dataclass
class Desk:
    """A shop, its cache, and what its builders built."""

    cache: FeatureCache
    world: shop.World = field(default_factory=shop.World)

    def __post_init__(self) -> None:
        for name, title in {"p1": "red table lamp", "p2": "sofa", "p3": "big red chair"}.items():
            self.put(name, title)
        self.context = shop.ShopContext(self.world)

    def put(self, name: str, title: str | None) -> None:
        self.world.products["abt", "US", name] = Product(title)

    def run(self, target: Any, **kwargs: Any) -> tuple[RunResult, Counter[str]]:
        before = self.world.built.copy()
        session = Session(self.context, self.cache, engine="local")
        result = session.run(target.over(ProductIds), **ABT, **kwargs)
        return result, self.built(before)

    def built(self, before: Counter[Any]) -> Counter[str]:
        found: Counter[str] = Counter()
        for (name, _), count in (self.world.built - before).items():
            found[name] += count
        return found

    def adopt(self, target: Any, name: str = "Cut", **kwargs: Any) -> Adoption:
        graph = Graph([target, ProductIds])
        bindings = Bindings(self.context, kwargs.pop("configs", None)).bind_all(graph)
        bindings.group_fields |= set(ProductIds.key)
        return adopt(
            graph[name],
            graph=graph,
            bindings=bindings,
            context=self.context,
            cache=self.cache,
            group=ABT,
            **kwargs,
        )

    def rows(self, name: str = "Cut") -> list[dict[str, Any]]:
        return self.cache.history(name).to_pylist()  # type: ignore[no-any-return]


@pytest.fixture(params=["memory", "delta"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(MemoryCache() if request.param == "memory" else DeltaCache(str(tmp_path / "cache")))


def test_a_comment_is_no_change(desk: Desk) -> None:
    desk.run(above(Cut))
    found = desk.adopt(above(Cut))
    assert (found.status, found.before) == (NOTHING, None)
    assert "its code is what it was in the last run" in found.said


def test_code_that_computes_the_same(desk: Desk) -> None:
    first, _ = desk.run(above(Cut))
    before = desk.rows()
    found = desk.adopt(above(Sliced), reason="shorter")
    assert (found.status, found.entries, found.sampled, found.agreed) == (ADOPTED, 3, 3, 3)
    assert found.said == "3 of 3 sampled keys agree; 3 entries were adopted"
    second, built = desk.run(above(Sliced))
    assert built == Counter()
    assert second.builders["Cut"].hit == second.builders["Shown"].hit == 3
    assert second.values("Shown") == first.values("Shown")
    third, _ = desk.run(above(Sliced))
    assert third.unchanged

    old = {row["key"]: row for row in before}
    new = [row for row in desk.rows() if row["config_hash"] == found.after]
    assert len(new) == 3
    for row in new:
        for name in ("value", "value_hash", "ts", "inputs_hash"):
            assert row[name] == old[row["key"]][name]
        assert row["entry_id"] != old[row["key"]]["entry_id"]
        assert row["seconds"] is row["tokens"] is row["usd"] is None
        assert row["run_id"] == found.run_id
    assert found.run_id is not None and found.run_id.startswith("adopt-")


def test_an_adoption_is_recorded_beside_the_runs(desk: Desk) -> None:
    ran, _ = desk.run(above(Cut))
    found = desk.adopt(above(Sliced), reason="shorter")
    (record,) = desk.cache.runs('["abt","US","adopted"]')
    assert (record.run_id, record.status) == (found.run_id, "adopted")
    facts = record.record
    assert (facts["reason"], facts["sampled"], facts["agreed"], facts["forced"]) == ("shorter", 3, 3, False)
    assert (facts["builder"], facts["before"], facts["after"]) == ("Cut", found.before, found.after)
    last = desk.cache.last_run('["abt","US"]')
    assert last is not None and last.run_id == ran.run_id

    graph = Graph([above(Sliced), ProductIds])
    bindings = Bindings(desk.context).bind_all(graph)
    (change,) = changed_builders(graph, bindings, last, adopted=adopted_hashes(desk.cache, ABT))
    assert (change.builder, change.adopted) == ("Cut", True)


def test_a_run_that_stopped_is_no_last_run(desk: Desk) -> None:
    """It has the new code on record, and entries of the old one are what there is to adopt."""
    desk.run(above(Cut))
    new = Desk(MemoryCache())
    new.run(above(Sliced))
    (record,) = new.cache.runs('["abt","US"]')
    desk.cache.record_run(replace(record, status="stopped"))
    assert desk.adopt(above(Sliced)).entries == 3


def test_a_first_run_that_stopped_says_what_to_adopt_from(desk: Desk) -> None:
    desk.run(above(Cut))
    (record,) = desk.cache.runs('["abt","US"]')
    begun = MemoryCache()
    begun.append(desk.cache.history("Cut"))
    begun.record_run(replace(record, status="stopped"))
    desk.cache = begun
    assert desk.adopt(above(Sliced)).before == record.record["builders"]["Cut"]["config_hash"]


def test_without_an_adoption_it_is_computed(desk: Desk) -> None:
    """What the test above would be worth nothing without."""
    desk.run(above(Cut))
    _, built = desk.run(above(Sliced))
    assert built == Counter({"Cut": 3})  # and no more: equal values stop it there


def test_code_that_computes_something_else(desk: Desk) -> None:
    desk.run(above(Cut))
    before = desk.rows()
    found = desk.adopt(above(Shouted))
    assert (found.status, found.entries, found.sampled, found.agreed) == (REFUSED, 0, 3, 1)
    assert {(d.key, d.old, d.new) for d in found.disagreements} == {
        ('["abt","US","p1"]', "'red table'", "'RED TABLE'"),
        ('["abt","US","p3"]', "'big red'", "'BIG RED'"),
    }
    assert found.said.startswith("the new code computes other values for 2 of 3 keys; nothing was adopted")
    assert desk.rows() == before
    assert desk.cache.runs('["abt","US","adopted"]') == []
    second, built = desk.run(above(Shouted))
    assert built == Counter({"Cut": 3, "Shown": 2})
    assert second.values("Shown")["abt", "US", "p1"] == "<RED TABLE>"


def test_forced(desk: Desk) -> None:
    first, _ = desk.run(above(Cut))
    found = desk.adopt(above(Shouted), force=True, reason="only new products matter")
    assert (found.status, found.entries, found.agreed, found.forced) == (ADOPTED, 3, 1, True)
    assert len(found.disagreements) == 2
    second, built = desk.run(above(Shouted))
    assert (built, second.values("Shown")) == (Counter(), first.values("Shown"))
    (record,) = desk.cache.runs('["abt","US","adopted"]')
    assert record.record["forced"] and len(record.record["disagreements"]) == 2


def test_a_dry_run_writes_nothing(desk: Desk) -> None:
    desk.run(above(Cut))
    before = desk.rows()
    found = desk.adopt(above(Sliced), dry_run=True)
    assert (found.status, found.entries, found.run_id) == (WOULD, 3, None)
    assert found.said.endswith("3 entries would be adopted")
    assert desk.rows() == before and desk.cache.runs('["abt","US","adopted"]') == []


def test_interrupted_before_the_append(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run(above(Cut))
    before = desk.rows()

    def killed(*args: Any) -> None:
        raise CacheError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(desk.cache, "append", killed)
        with pytest.raises(CacheError):
            desk.adopt(above(Sliced))
    assert desk.rows() == before and desk.cache.runs('["abt","US","adopted"]') == []
    assert desk.adopt(above(Sliced)).entries == 3


def test_twice_is_once(desk: Desk) -> None:
    desk.run(above(Cut))
    desk.adopt(above(Sliced))
    rows = desk.rows()
    found = desk.adopt(above(Sliced))
    assert found.status is NOTHING and "3 entries are bound" in found.said
    assert desk.rows() == rows


def test_only_keys_whose_inputs_are_the_same_are_compared(desk: Desk) -> None:
    """A changed title is no sign of other code."""
    desk.run(above(Cut))
    desk.put("p1", "a green table lamp")
    desk.put("p2", None)
    desk.world.broken.add(("abt", "US", "p3"))
    found = desk.adopt(above(Sliced))
    assert (found.status, found.sampled) == (REFUSED, 0)
    assert found.skipped == {
        "its inputs are others now": 1,
        "an input is null now": 1,
        "an input failed, or would have to be paid for": 1,
    }
    assert "no key could be compared (1: " in found.said
    assert desk.adopt(above(Sliced), force=True).entries == 3


def test_a_sample_is_no_larger_than_asked(desk: Desk) -> None:
    for number in range(40):
        desk.put(f"q{number}", f"lamp number {number}")
    desk.run(above(Cut))
    before = desk.world.built.copy()
    found = desk.adopt(above(Sliced), sample=5)
    assert (found.sampled, found.entries) == (5, 43)
    assert desk.built(before) == Counter({"Cut": 5})
    assert desk.run(above(Sliced))[1] == Counter()


def test_the_current_entry_stays_the_current_one(desk: Desk) -> None:
    """Of several entries of a key; also where it is the older one again, and where the value became null."""
    for title in ("one lamp", "two lamps", "one lamp"):
        desk.put("p1", title)
        desk.put("p2", title if title == "one lamp" else "three sofas")
        desk.run(above(Cut))
    desk.put("p3", None)
    desk.run(above(Cut))
    found = desk.adopt(above(Sliced))
    assert found.entries == 5
    keys = [f'["abt","US","{name}"]' for name in ("p1", "p2", "p3")]
    assert found.before is not None and found.after is not None
    old = desk.cache.current("Cut", found.before, keys)
    new = desk.cache.current("Cut", found.after, keys)
    assert {key: hit.entry.value for key, hit in new.items()} == dict.fromkeys(keys[:2], b"one lamp")
    assert {key: hit.entry.value for key, hit in old.items()} == {k: h.entry.value for k, h in new.items()}
    assert {row["key"] for row in desk.cache.newest("Cut").to_pylist()} == set(keys[:2])
    desk.put("p1", "two lamps")
    assert desk.run(above(Sliced))[1] == Counter()  # the older entries came along


def test_what_the_new_code_computed_itself_stays(desk: Desk) -> None:
    desk.run(above(Cut))
    desk.put("p1", "a new lamp")
    Session(desk.context, desk.cache).get(above(Sliced), ("abt", "US", "p1"))
    found = desk.adopt(above(Sliced))
    assert (found.status, found.entries, found.sampled) == (ADOPTED, 3, 2)
    assert found.after is not None
    key = '["abt","US","p1"]'
    assert desk.cache.current("Cut", found.after, [key])[key].entry.value == b"a new"


def test_entries_of_other_groups_go_along(desk: Desk) -> None:
    desk.world.products["buy", "US", "b1"] = Product("old lamp")
    desk.run(above(Cut))
    session = Session(desk.context, desk.cache, engine="local")
    session.run(above(Cut).over(ProductIds), merchant="buy", market="US")
    found = desk.adopt(above(Sliced))
    assert (found.entries, found.sampled, found.skipped) == (4, 3, {"another group's key": 1})
    before = desk.world.built.copy()
    session.run(above(Sliced).over(ProductIds), merchant="buy", market="US")
    assert desk.built(before) == Counter()


def test_another_config_is_no_code(desk: Desk) -> None:
    desk.run(above(Cut))
    configs = {"Cut": {"words": 1}}
    with pytest.raises(UsageError, match="its config changed from .*words=2.* to .*words=1.*pass --force"):
        desk.adopt(above(Sliced), configs=configs)
    assert desk.adopt(above(Sliced), configs=configs, force=True).agreed == 1


def test_another_type_cannot_be_adopted(desk: Desk) -> None:
    class Counted(FeatureBuilder[int]):
        name = "Cut"
        key, deps, value, Config = PRODUCT, (Title,), pa.int64(), Cut.Config

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> int:
            return len(inputs["Title"])

    desk.run(Cut)
    for force in (False, True):
        with pytest.raises(UsageError, match="its values are int64 and were string"):
            desk.adopt(Counted, force=force)


def test_without_a_run_the_newest_entries_count(desk: Desk) -> None:
    session = Session(desk.context, desk.cache)
    session.get(above(Cut), ("abt", "US", "p1"))
    found = desk.adopt(above(Sliced))
    assert (found.status, found.entries) == (ADOPTED, 1)
    before = desk.world.built.copy()
    session.get(above(Sliced), ("abt", "US", "p1"))
    assert desk.built(before) == Counter()


def test_nothing_in_the_cache(desk: Desk) -> None:
    found = desk.adopt(above(Sliced))
    assert (found.status, found.said) == (NOTHING, "there are no entries of an earlier code")


def test_code_that_fails_does_not_agree(desk: Desk) -> None:
    class Broken(Sliced):
        name = "Cut"

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
            raise ValueError("no idea")

    desk.run(above(Cut))
    found = desk.adopt(above(Broken))
    assert (found.status, found.agreed) == (REFUSED, 0)
    assert all("no idea" in d.new for d in found.disagreements)


def test_the_ttl_goes_on(desk: Desk) -> None:
    class Old(Cut):
        name, freshness = "Cut", Freshness(ttl="2h")

    class New(Sliced):
        name, freshness = "Cut", Freshness(ttl="2h")

    desk.run(above(Old))
    desk.context.clock.advance(hours=1)  # type: ignore[attr-defined]
    assert desk.adopt(above(New)).status is ADOPTED
    assert desk.run(above(New))[1] == Counter()
    desk.context.clock.advance(hours=1)  # type: ignore[attr-defined]
    assert desk.run(above(New))[1]["Cut"] == 3


# -- what is paid --------------------------------------------------------------------------------------------


class Answer(FeatureBuilder[str]):
    key, value, needs, paid, version = ("prompt",), pa.string(), ("world",), True, "1"

    async def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Metered[str]:
        context.world.done(self, inputs["prompt"])
        return Metered(inputs["prompt"].upper(), tokens=3, usd=0.5)


class Answer2(Answer):
    name, version = "Answer", "2"


class Answer3(Answer):
    name, version = "Answer", "3"

    async def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Metered[str]:
        context.world.done(self, inputs["prompt"])
        return Metered(inputs["prompt"].title(), tokens=3, usd=0.5)


def asking(answer: Any, edition: str = "1") -> type[FeatureBuilder[str]]:
    class Asked(FeatureBuilder[str]):
        key, deps, value, version = PRODUCT, (answer.on(prompt=Title),), pa.string(), edition

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
            return str(inputs["Answer"])

    return Asked


def test_a_paid_builder_is_not_called(desk: Desk) -> None:
    desk.run(asking(Answer))
    before = desk.world.built.copy()
    found = desk.adopt(asking(Answer2), "Answer")
    assert (found.status, found.sampled) == (REFUSED, 0)
    assert "--sample-paid makes as many calls as keys are sampled" in found.said
    assert desk.adopt(asking(Answer2), "Answer", force=True).entries == 3
    desk.run(asking(Answer2))
    assert desk.built(before) == Counter()


def test_a_paid_sample_on_demand(desk: Desk) -> None:
    desk.run(asking(Answer))
    found = desk.adopt(asking(Answer2), "Answer", sample_paid=True, sample=2)
    assert (found.status, found.sampled, found.calls, found.tokens, found.usd) == (ADOPTED, 2, 2, 6, 1.0)
    assert found.entries == 1  # the two that were paid for are there
    before = desk.world.built.copy()
    desk.run(asking(Answer2))
    assert desk.built(before) == Counter()


def test_answers_that_a_sample_paid_for_are_kept(desk: Desk) -> None:
    desk.run(asking(Answer))
    found = desk.adopt(asking(Answer3), "Answer", sample_paid=True)
    assert (found.status, len(found.disagreements), found.calls) == (REFUSED, 3, 3)
    before = desk.world.built.copy()
    result, _ = desk.run(asking(Answer3))
    assert desk.built(before) == Counter()
    assert result.values("Asked")["abt", "US", "p2"] == "Sofa"


def test_a_sample_never_pays_for_inputs(desk: Desk) -> None:
    desk.run(asking(Answer))
    before = desk.world.built.copy()
    found = desk.adopt(asking(Answer2, "2"), "Asked", sample_paid=True)
    assert (found.status, found.sampled) == (REFUSED, 0)
    assert found.skipped == {"an input failed, or would have to be paid for": 3}
    assert desk.built(before) == Counter()
    desk.adopt(asking(Answer2, "2"), "Answer", force=True)
    assert desk.adopt(asking(Answer2, "2"), "Asked").agreed == 3
    assert desk.built(before) == Counter()


# -- other kinds ---------------------------------------------------------------------------------------------


def again(builder: type[FeatureBuilder[Any]], **changed: Any) -> type[FeatureBuilder[Any]]:
    """The same feature as another version of its code."""
    return type(builder.__name__, (builder,), {"name": builder.name, "version": "again", **changed})


def test_a_feature_of_the_whole_group(desk: Desk) -> None:
    def searched(matrix: Any) -> Any:
        class Found(FeatureBuilder[list[str]]):
            key, deps, version = PRODUCT, (matrix, shop.Embed.on(text=Title)), "1"
            value, needs = pa.list_(pa.string()), ("world",)

            def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
                context.world.done(self, tuple(inputs["Embed"]))
                return shop.nearest(inputs["Matrix"], inputs["Embed"])

        return Found

    new = again(shop.Matrix)
    desk.run(searched(shop.Matrix))
    before = desk.world.built.copy()
    # What reads the matrix cannot be tried before there is one under the new code.
    other = again(searched(new))
    with pytest.raises(UsageError, match="Matrix was never built.*adopt that first"):
        desk.adopt(other, "Found")
    found = desk.adopt(searched(new), "Matrix")
    assert (found.status, found.sampled, found.entries) == (ADOPTED, 1, 1)
    assert desk.built(before) == Counter({"Matrix": 1})  # the sample
    assert desk.adopt(other, "Found").agreed == 3
    before = desk.world.built.copy()
    desk.run(other)
    assert desk.built(before) == Counter()


def test_a_get_by_hand(desk: Desk) -> None:
    first, _ = desk.run(shop.ByHand)
    new = again(shop.ByHand)
    found = desk.adopt(new, "ByHand")
    assert (found.status, found.sampled, found.entries) == (ADOPTED, 3, 3)
    second, built = desk.run(new)
    assert built == Counter()
    assert second.values("ByHand") == first.values("ByHand")


def test_a_get_by_hand_with_configs_of_its_own(desk: Desk) -> None:
    class Own(FeatureBuilder[str]):
        key, value, version = PRODUCT, pa.string(), "1"

        def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
            return self.hashed(controller.get(Cut, key, {Cut: {"words": 1}}).require())

    desk.run(Own)
    rows = len(desk.rows())
    found = desk.adopt(again(Own), "Own")
    assert found.skipped == {"its get reads with configs of its own, or gathers": 3}
    assert len(desk.rows()) == rows


def test_sources(desk: Desk) -> None:
    def reading(source: Any) -> Any:
        class Read(FeatureBuilder[str]):
            key, deps, value, version = PRODUCT, (source,), pa.string(), "1"

            def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
                return str(next(iter(inputs.values())))

        return Read

    desk.run(reading(Title))
    found = desk.adopt(reading(again(Title)), "Title")
    assert found.status is NOTHING and "every run reads it again" in found.said

    desk.run(reading(shop.Stock))
    found = desk.adopt(reading(again(shop.Stock)), "Stock")
    assert found.status is REFUSED and found.said.startswith("it is a source")
    assert desk.adopt(reading(again(shop.Stock)), "Stock", force=True).entries == 3


def test_inline(desk: Desk) -> None:
    found = desk.adopt(shop.Loud, "Loud")
    assert found.status is NOTHING and "it is never cached" in found.said


def test_every_outcome_is_plain_data(desk: Desk) -> None:
    desk.run(above(Cut))
    for target in (above(Cut), above(Sliced), above(Shouted)):
        facts = json.loads(json.dumps(asdict(desk.adopt(target, dry_run=True))))
        assert facts["builder"] == "Cut"
