"""Why a key would be computed again: told from traces and earlier entries, in both caches, and nothing built for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import UsageError
from featurekit_spark.hindsight import why_in_run
from featurekit_spark.reasons import Step, Why
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.shop import PRODUCT, Product, ProductIds

P1, P2 = ("abt", "US", "p1"), ("abt", "US", "p2")
ABT = {"merchant": "abt", "market": "US"}


@dataclass
class Place:
    """A session over a small shop, whose questions are checked to leave no mark."""

    cache: FeatureCache
    world: shop.World = field(default_factory=shop.World)
    clock: MovingClock = field(default_factory=MovingClock)

    def __post_init__(self) -> None:
        for name, title in {"p1": "red lamp", "p2": "sofa", "p3": "red chair"}.items():
            self.put(name, Product(title))
        self.world.slogans["acme"] = "it works"
        self.session = Session(shop.ShopContext(self.world, self.clock), self.cache, engine="local")

    def put(self, name: str, product: Product) -> None:
        self.world.products["abt", "US", name] = product

    def run(self, target: type[FeatureBuilder[Any]], **kwargs: Any) -> dict[Any, Any]:
        return self.session.run(target.over(ProductIds), **ABT, **kwargs).values(target)

    def why(self, target: type[FeatureBuilder[Any]], key: Any = P1, **kwargs: Any) -> Why:
        built, rows = self.world.built.copy(), self.rows()
        try:
            return self.session.why(target.over(ProductIds), key, **kwargs)
        finally:
            assert self.world.built == built, "a question built something"
            assert self.rows() == rows, "a question wrote something"

    def rows(self) -> int:
        names = ("Title", "Prompt", "Answer", "Embed", "Matrix", "Logic", "Card", "Price")
        return sum(len(self.cache.history(name)) for name in names)


@pytest.fixture(params=["memory", "delta"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(MemoryCache() if request.param == "memory" else DeltaCache(str(tmp_path / "cache")))


@pytest.fixture
def abt() -> Place:
    return Place(MemoryCache())


def steps(why: Why) -> dict[str, Step]:
    """Steps by Name[key]."""
    found: dict[str, Step] = {}

    def walk(step: Step) -> None:
        if not step.again:
            found[step.builder + step.key] = step
        for inner in step.inputs:
            walk(inner)

    walk(why.step)
    return found


def told(why: Why) -> dict[str, str]:
    """What the trace's parts say that changed."""
    assert why.proof is not None
    return {part.name: part.said for part in why.proof.parts if part.changed}


def forget(place: Place, builder: str) -> None:
    """Drop a builder's entries, as a collection of garbage would."""
    cache: Any = place.cache
    cache._entries = {at: entry for at, entry in cache._entries.items() if at[0] != builder}


def test_the_first_time(place: Place) -> None:
    why = place.why(shop.Logic)
    assert (why.state, why.cause, why.proof) == ("unknown", "never computed", None)
    found = steps(why)
    assert found['Prompt["abt","US","p1"]'].state == "miss"
    assert found['Prompt["abt","US","p1"]'].cause == "never computed"
    assert found['Title["abt","US","p1"]'].cause == "never read before"
    assert 'Prompt["abt","US","p1"] would have to be built first' in found['Logic["abt","US","p1"]'].cause


def test_a_hit(place: Place) -> None:
    place.run(shop.Logic)
    why = place.why(shop.Logic)
    assert (why.state, why.cause) == ("hit", "proven unchanged since 2026-01-31T12:00:00Z")
    assert {step.state for step in steps(why).values()} == {"hit"}
    assert told(why) == {}


def test_a_changed_title(place: Place) -> None:
    place.run(shop.Label)
    old = place.cache.current("Title", bound_hash(place, shop.Title), ['["abt","US","p1"]'])
    place.put("p1", Product("red lamps"))
    why = place.why(shop.Label)
    before = old['["abt","US","p1"]'].entry.value_hash
    now = steps(why)['Title["abt","US","p1"]'].value_hash
    assert before is not None and now is not None
    assert told(why) == {"Title": f"Title changed: value hash {before[:8]} -> {now[:8]}"}
    assert why.cause == told(why)["Title"]
    prompt = steps(why)['Prompt["abt","US","p1"]']
    assert (prompt.state, prompt.cause, prompt.own) == ("miss", told(why)["Title"], False)
    parts = {part.name: (part.old, part.new, part.changed) for part in prompt.parts}
    assert parts["Title"] == (before, now, True)
    assert parts["Greeting"][2] is False
    assert place.why(shop.Label, P2).state == "hit"


def bound_hash(place: Place, builder: type[FeatureBuilder[Any]]) -> str:
    return next(str(row["config_hash"]) for row in place.cache.history(builder.name).to_pylist())


def test_a_changed_config(place: Place) -> None:
    place.run(shop.Label)
    why = place.why(shop.Label, configs={shop.Prompt: {"template": "{title}?"}})
    old, new = "Prompt.Config(template='{greeting}: {title}')", "Prompt.Config(template='{title}?')"
    expected = f"its config changed ({old} -> {new})"
    assert told(why) == {"Prompt": f"Prompt: {expected}"}
    prompt = steps(why)['Prompt["abt","US","p1"]']
    assert (prompt.cause, prompt.own) == (expected, True)
    assert prompt.before is not None
    assert prompt.before.config_hash != prompt.config_hash
    assert steps(why)['Title["abt","US","p1"]'].state == "hit"


def loud(version_: str) -> type[FeatureBuilder[str]]:
    class Shout(FeatureBuilder[str]):
        key, deps, value, version = PRODUCT, (shop.Title,), pa.string(), version_

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return str(inputs["Title"]).upper()

    return Shout


def test_changed_code(place: Place) -> None:
    place.run(loud("1"))
    why = place.why(loud("2"))
    assert why.cause == "Shout: its code changed (version 1 -> 2)"
    assert (why.step.state, why.step.cause) == ("miss", "its code changed (version 1 -> 2)")
    assert place.why(loud("1")).state == "hit"


def test_an_expired_ttl(place: Place) -> None:
    place.run(shop.Card)
    place.clock.advance(hours=1, minutes=30)
    why = place.why(shop.Card)
    assert (why.state, why.cause) == ("hit", "expired at 2026-01-31T13:00:00Z; yet its entry answers")
    stock = steps(why)['Stock["abt","US","p1"]']
    assert (stock.state, stock.cause) == ("stale", "expired at 2026-01-31T13:00:00Z, read again: equal")
    assert steps(why)['Price["abt","US","p1"]'].state == "hit"
    place.clock.advance(hours=1)
    price = steps(place.why(shop.Card))['Price["abt","US","p1"]']
    assert (price.state, price.cause) == ("stale", "expired at 2026-01-31T14:00:00Z")


def test_a_member_of_the_group_changed(place: Place) -> None:
    place.run(shop.Logic)
    place.put("p2", Product("settee"))
    place.put("p4", Product("stool"))
    del place.world.products["abt", "US", "p3"]
    why = place.why(shop.Logic)
    said = "1 member added (p4), 1 member removed (p3), 1 member changed (p2)"
    assert why.cause == f"the group changed: {said} in Title over ProductIds"
    matrix = steps(why)['Matrix["abt","US"]']
    assert matrix.state == "unknown"
    assert matrix.cause.startswith(f"the group changed: {said}; Embed[")
    ids = steps(why)['ProductIds["abt","US"]']
    assert ids.cause == "its members changed: 1 member added (p4), 1 member removed (p3)"
    assert steps(why)['Suggestions["abt","US","p1"]'].state == "hit"


def test_back_to_an_old_input_is_a_hit_by_identity(place: Place) -> None:
    place.run(shop.Label)
    place.put("p1", Product("red lamps"))
    place.run(shop.Label)
    place.put("p1", Product("red lamp"))
    why = place.why(shop.Label)
    assert why.state == "hit"
    assert why.cause.startswith("Title changed: value hash ")
    assert why.cause.endswith("; yet its entry answers")
    title = steps(why)['Title["abt","US","p1"]']
    assert title.state == "hit"
    assert title.cause.endswith("back to what was read before")
    place.run(shop.Label)
    assert place.why(shop.Label).cause.startswith("proven unchanged")
    place.put("p1", Product("blue lamp"))
    # What was read last is an older entry than another: the old hash is the right one all the same.
    back = steps(why)['Title["abt","US","p1"]'].value_hash
    assert back is not None
    assert told(place.why(shop.Label))["Title"].startswith(f"Title changed: value hash {back[:8]} -> ")


def test_a_failing_source(place: Place) -> None:
    place.run(shop.Label)
    place.world.broken.add(P1)
    why = place.why(shop.Label)
    assert why.state == "error"
    assert why.cause.startswith('Title["abt","US","p1"]: OSError: the disk is on fire')
    assert steps(why)['Prompt["abt","US","p1"]'].state == "error"
    assert steps(why)['Title["abt","US","p1"]'].cause.startswith("OSError: the disk is on fire")


def test_a_key_that_failed_last_time(place: Place) -> None:
    place.world.failing.add("hello: red lamp")
    place.run(shop.Logic)
    why = place.why(shop.Logic)
    assert "it failed in run" in told(why)["answer"]
    assert "no answer" in told(why)["answer"]
    answer = steps(why)['Answer["hello: red lamp"]']
    assert answer.state == "miss"
    assert answer.cause.startswith("failed last time: Answer")


def test_a_fan_out(place: Place) -> None:
    """Each item's search is told, and the matrix below them once."""
    place.run(shop.Logic)
    place.world.slogans["acme"] = "it still works"
    why = place.why(shop.Logic)
    found = steps(why)
    assert {name for name in found if name.startswith("Search")} == {
        'Search["abt","US","red"]',
        'Search["abt","US","lamp"]',
    }
    assert why.cause.startswith('Slogan["acme"] changed: value hash ')
    assert (why.step.state, why.step.cause[:31]) == ("miss", "Slogan.on(brand=Brand) changed:")
    parts = {part.name: part.changed for part in why.step.parts}
    assert parts["Search.on(text=each(Suggestions))"] is False
    assert str(why).count('Matrix["abt","US"] (told above)') == 1


def test_a_hand_written_get(place: Place) -> None:
    place.run(shop.ByHand)
    assert place.why(shop.ByHand).state == "hit"
    place.put("p1", Product("red lamps"))
    why = place.why(shop.ByHand)
    assert why.step.state == "miss"
    assert why.step.cause.startswith('Title["abt","US","p1"] changed: value hash ')


def test_a_null_input(place: Place) -> None:
    place.put("p1", Product(None))
    place.run(shop.Label)
    why = place.why(shop.Label)
    assert why.state == "hit"
    assert steps(why)['Prompt["abt","US","p1"]'].state == "empty"


def test_an_entry_that_is_gone_is_said(abt: Place) -> None:
    abt.run(shop.Label)
    forget(abt, "Label")
    assert told(abt.why(shop.Label)) == {"entry": "its entry is gone"}


def test_a_key_that_is_no_member(abt: Place) -> None:
    abt.run(shop.Label)
    why = abt.why(shop.Label, ("abt", "US", "p9"))
    assert why.note == "ProductIds does not list this key now, so a run does not compute it"


def test_a_key_of_other_fields(abt: Place) -> None:
    with pytest.raises(UsageError, match=r"key fields .'merchant', 'market', 'product_id'."):
        abt.why(shop.Label, ("abt", "US"))


def test_a_feature_that_is_no_target(abt: Place) -> None:
    abt.run(shop.Logic)
    why = abt.session.why(shop.Answer, ("hello: red lamp",), **ABT)
    assert (why.state, why.proof) == ("hit", None)
    why = abt.session.why(shop.Answer, ("hello: green lamp",), **ABT)
    assert (why.state, why.cause) == ("miss", "never computed")
    abt.put("p2", Product("settee"))
    why = abt.session.why(shop.Matrix, ("abt", "US"), **ABT)
    assert why.cause.startswith("the group changed: 1 member changed (p2)")


def test_what_cannot_be_reproduced_is_not_said(abt: Place) -> None:
    """An old title whose entry is gone: that the title changed is known, from what is not."""
    abt.run(shop.Label)
    forget(abt, "Title")
    abt.put("p1", Product("red lamps"))
    why = abt.why(shop.Label)
    assert told(why) == {
        "own sources": "a source at its key changed; which of them, and from what, cannot be told"
    }
    prompt = steps(why)['Prompt["abt","US","p1"]']
    assert prompt.cause == "what it reads changed, in what cannot be told"


def test_the_text_is_the_same_each_time(place: Place) -> None:
    place.run(shop.Logic, run_id="r1")
    place.put("p1", Product("red lamps"))
    assert str(place.why(shop.Logic)) == str(place.why(shop.Logic))
    assert "its trace of 2026-01-31T12:00:00Z (run r1)" in str(place.why(shop.Logic))


def test_light_builders_are_evaluated(abt: Place) -> None:
    light = type("Prompt", (shop.Prompt,), {"light": True, "version": "1", "__module__": __name__})
    answer: Callable[..., Any] = shop.Answer.on
    reply = type(
        "Suggestions",
        (shop.Suggestions,),
        {"deps": (answer(prompt=light),), "version": "1", "__module__": __name__},
    )
    abt.run(reply)
    abt.put("p1", Product("red lamps"))
    found = steps(abt.why(reply))
    assert found['Prompt["abt","US","p1"]'].state == "miss"
    reached = found['Answer["hello: red lamps"]']
    assert (reached.state, reached.cause) == (
        "miss",
        "never computed for this key, which another value leads to",
    )
    abt.put("p1", Product("sofa"))  # another product's title: its prompt is paid for
    assert steps(abt.why(reply))['Answer["hello: sofa"]'].state == "hit"


def in_run(place: Place, run_id: str, key: Any = P1, target: type[FeatureBuilder[Any]] = shop.Logic) -> Why:
    context = place.session.context
    return why_in_run(target, key, run_id, context=context, cache=place.cache, keyset=ProductIds)


def test_what_a_run_did(place: Place) -> None:
    place.run(shop.Logic, run_id="r1")
    place.put("p1", Product("red lamps"))
    place.run(shop.Logic, run_id="r2")
    place.put("p1", Product("green lamps"))  # what happens later does not matter
    place.run(shop.Logic, run_id="r3")
    first, second = in_run(place, "r1"), in_run(place, "r2")
    assert (first.state, first.cause) == ("computed", "never computed")
    assert {step.state for step in steps(first).values()} == {"computed"}
    prompt = steps(second)['Prompt["abt","US","p1"]']
    assert (prompt.state, prompt.before.run_id if prompt.before else None) == ("computed", "r1")
    assert prompt.cause.startswith("Title changed: value hash ")
    assert steps(second)['Title["abt","US","p1"]'].cause.startswith("what it reads changed: value hash ")
    assert steps(second)['Answer["hello: red lamps"]'].state == "computed"
    # The value came out equal: nothing was recomputed above.
    assert steps(second)['Search["abt","US","red"]'].cause.endswith("; its value came out equal")
    assert steps(second)['Embed["red"]'].cause == "computed at 2026-01-31T12:00:00Z by run r1"
    other = steps(in_run(place, "r2", P2))
    assert other['Suggestions["abt","US","p2"]'].state == "hit"
    assert other['Matrix["abt","US"]'].cause.startswith("the group changed: 1 member changed (p1)")


def test_a_config_that_a_run_had(place: Place) -> None:
    place.run(shop.Label, run_id="r1")
    place.run(shop.Label, run_id="r2", configs={shop.Prompt: {"template": "{title}?"}})
    prompt = steps(in_run(place, "r2", target=shop.Label))['Prompt["abt","US","p1"]']
    assert prompt.state == "computed"
    assert prompt.cause.startswith("its config changed (Prompt.Config(template='{greeting}: {title}') -> ")
    first = steps(in_run(place, "r1", target=shop.Label))['Prompt["abt","US","p1"]']
    assert (first.state, first.cause) == ("computed", "never computed before")


def test_a_key_that_failed_in_a_run(abt: Place) -> None:
    abt.world.failing.add("hello: red lamp")
    abt.run(shop.Logic, run_id="r1")
    answer = steps(in_run(abt, "r1"))['Answer["hello: red lamp"]']
    assert answer.state == "error"
    assert "no answer" in answer.cause


def test_a_run_that_is_not_known(abt: Place) -> None:
    abt.run(shop.Logic, run_id="r1")
    with pytest.raises(UsageError, match=r"no record of a run 'r2' .* Known: r1\."):
        in_run(abt, "r2")
