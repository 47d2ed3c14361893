"""Whole runs on the local engine: what is computed, what is proven, what a run says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    DataError,
    DefinitionError,
    ServiceError,
    UsageError,
)
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.shop import Product, ProductIds

ABT = {"merchant": "abt", "market": "US"}


class Shop:
    """A session over a small shop, and what its runs built."""

    def __init__(self, **products: Product) -> None:
        keys = {("abt", "US", name): product for name, product in products.items()}
        self.world = shop.World(products=keys, slogans={"acme": "it works"})
        self.clock = MovingClock()
        self.cache = MemoryCache()
        self.session = Session(shop.ShopContext(self.world, self.clock), self.cache, engine="local")

    def run(self, *targets: Any, **kwargs: Any) -> tuple[RunResult, dict[str, int]]:
        """The result, and how many values each builder built."""
        before = self.world.built.copy()
        result = self.session.run(*(t.over(ProductIds) for t in targets), **{**ABT, **kwargs})
        built: dict[str, int] = {}
        for (name, _), count in (self.world.built - before).items():
            built[name] = built.get(name, 0) + count
        return result, built

    def products(self) -> dict[str, Product]:
        return {name: product for (_, _, name), product in self.world.products.items()}

    def put(self, name: str, product: Product) -> None:
        self.world.products["abt", "US", name] = product


@pytest.fixture
def abt() -> Shop:
    return Shop(p1=Product("red lamp"), p2=Product("sofa"), p3=Product("red chair"))


def test_cold_then_warm(abt: Shop) -> None:
    cold, built = abt.run(shop.Logic)
    assert (cold.status, cold.keys, cold.unchanged) == ("ok", 3, False)
    assert built["Answer"] == built["Suggestions"] == built["Logic"] == 3
    assert built["Matrix"] == 1
    assert cold.builders["Answer"].calls == 3
    assert (cold.builders["Answer"].tokens, cold.builders["Answer"].usd) == (9, 1.5)
    warm, built = abt.run(shop.Logic)
    assert built == {}
    assert (warm.status, warm.unchanged) == ("ok", True)
    assert warm.builders["Logic"].hit == 3
    assert sum(counts.computed for counts in warm.builders.values()) == 0
    assert sum(counts.calls for counts in warm.builders.values()) == 0
    assert warm.values(shop.Logic) == cold.values("Logic")


def test_a_warm_run_appends_nothing(abt: Shop) -> None:
    abt.run(shop.Logic)
    appended = []
    abt.cache.append = lambda *args: appended.append(args)  # type: ignore[method-assign,assignment]
    abt.run(shop.Logic)
    assert appended == []


def test_equal_prompts_are_one_call() -> None:
    own = Shop(p1=Product("lamp"), p2=Product("lamp"), p3=Product("sofa"))
    result, built = own.run(shop.Logic)
    assert built["Answer"] == 2
    assert result.builders["Answer"].calls == 2


def test_a_changed_key_recomputes_what_it_reaches(abt: Shop) -> None:
    abt.run(shop.Label)
    abt.put("p2", Product("settee"))
    result, _ = abt.run(shop.Label)
    assert result.builders["Label"].hit == 2
    assert result.builders["Label"].computed == 1
    assert result.builders["Prompt"].computed == 1
    assert result.values("Label")["abt", "US", "p2"] == "hello: settee / it works"


def test_an_equal_value_stops_the_recomputation(abt: Shop) -> None:
    """A new title changes the matrix, but not whom the search finds for most texts."""
    abt.run(shop.Logic)
    abt.put("p2", Product("sofa", brand="bolt"))
    _, built = abt.run(shop.Logic)
    assert "Answer" not in built and "Matrix" not in built and "Search" not in built
    assert built == {"Logic": 1}


def test_values_follow_the_group_where_they_can(abt: Shop) -> None:
    """A new product is merged into the lists that were there; a list that loses one is made anew."""
    abt.run(shop.Logic)
    abt.put("p4", Product("red lamps"))
    result, built = abt.run(shop.Logic)
    found = result.builders["Search"]
    assert (found.computed, found.updated, found.hit) == (1, 4, 0)  # "lamps" was never searched before
    assert (found.keys, built["Search"]) == (5, 5)
    assert result.values(shop.Logic) == Shop(**abt.products()).run(shop.Logic)[0].values(shop.Logic)

    del abt.world.products["abt", "US", "p4"]
    result, _ = abt.run(shop.Logic)
    assert result.builders["Search"].hit == 4  # the matrix is one that was there before

    abt.put("p3", Product("sofas!"))  # in nobody's list of the matrix before the last one
    result, _ = abt.run(shop.Logic)
    found = result.builders["Search"]
    assert (found.computed, found.updated) == (1, 3)
    assert result.values(shop.Logic) == Shop(**abt.products()).run(shop.Logic)[0].values(shop.Logic)

    abt.put("p1", Product("lamp"))  # in most lists
    result, _ = abt.run(shop.Logic)
    assert result.builders["Search"].computed
    assert result.values(shop.Logic) == Shop(**abt.products()).run(shop.Logic)[0].values(shop.Logic)


def test_what_update_cannot_do_is_built(abt: Shop, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("no")

    abt.run(shop.Logic)
    abt.put("p4", Product("red lamps"))
    monkeypatch.setattr(shop.Search, "update", broken)
    result, _ = abt.run(shop.Logic)
    assert (result.status, result.builders["Search"].computed) == ("ok", 5)
    assert "Search.update failed" in caplog.text


def test_going_back_is_a_hit(abt: Shop) -> None:
    first, _ = abt.run(shop.Logic)
    abt.put("p2", Product("settee"))
    abt.run(shop.Logic)
    abt.put("p2", Product("sofa"))
    back, built = abt.run(shop.Logic)
    assert built == {}
    assert back.values("Logic") == first.values("Logic")
    current = {row["key"]: row["value"] for row in abt.cache.newest("Title").to_pylist()}
    assert current['["abt","US","p2"]'] == b"sofa"


def test_configs_and_back(abt: Shop) -> None:
    other = {shop.Prompt: {"template": "{title}?"}}
    first, _ = abt.run(shop.Logic)
    second, built = abt.run(shop.Logic, configs=other)
    assert built["Answer"] == 3
    assert second.values("Logic") != first.values("Logic")
    for configs, expected in ((None, first), (other, second)):
        again, built = abt.run(shop.Logic, configs=configs)
        assert built == {}
        assert again.values("Logic") == expected.values("Logic")


def test_deleted_members_leave_and_come_back(abt: Shop) -> None:
    first, _ = abt.run(shop.Logic)
    gone = abt.world.products.pop(("abt", "US", "p2"))
    result, built = abt.run(shop.Logic)
    assert list(result.values("Logic")) == [("abt", "US", "p1"), ("abt", "US", "p3")]
    assert built["Matrix"] == 1
    assert all("p2" not in str(value) for value in result.values("Logic").values())
    abt.put("p2", gone)
    back, built = abt.run(shop.Logic)
    assert built == {}
    assert back.values("Logic") == first.values("Logic")


def test_a_member_that_was_away_while_its_group_moved(abt: Shop) -> None:
    """It was not checked against the group as it is now."""
    abt.world.featured["abt", "US"] = ["p1"]
    abt.run(shop.Card)
    gone = abt.world.products.pop(("abt", "US", "p2"))
    abt.world.featured["abt", "US"] = ["p1", "p3"]
    abt.run(shop.Card)
    abt.put("p2", gone)
    result, _ = abt.run(shop.Card)
    assert "'p3'" in result.values("Card")["abt", "US", "p2"]


def test_a_member_that_was_away_while_the_config_changed(abt: Shop) -> None:
    other = {shop.Prompt: {"template": "{title}?"}}
    abt.run(shop.Label)
    gone = abt.world.products.pop(("abt", "US", "p2"))
    abt.run(shop.Label, configs=other)
    abt.put("p2", gone)
    result, _ = abt.run(shop.Label, configs=other)
    assert result.values("Label")["abt", "US", "p2"] == "sofa? / it works"


def test_a_scanned_source_read_by_a_value_too(abt: Shop) -> None:
    abt.put("p1", Product("red lamp", brand="p2"))
    abt.run(shop.Logic)
    abt.put("p2", Product("sofa", brand="bolt"))
    result, _ = abt.run(shop.Logic)
    assert result.values("Logic")["abt", "US", "p1"].endswith("sofa bolt")


def test_errors_are_tried_again_and_make_a_run_partial(abt: Shop) -> None:
    abt.world.failing.add("hello: sofa")
    result, built = abt.run(shop.Logic)
    assert result.status == "partial"
    assert list(result.errors) == ['["abt","US","p2"]']
    assert result.errors['["abt","US","p2"]'].startswith(
        'Answer["hello: sofa"]: [retryable, 1 attempt] TimeoutError: no answer'
    )
    assert result.builders["Logic"].error == 1
    assert built["Logic"] == 2
    again, built = abt.run(shop.Logic)
    assert (again.status, built, again.unchanged) == ("partial", {}, False)
    assert again.builders["Answer"].calls == 1
    abt.world.failing.clear()
    healed, built = abt.run(shop.Logic)
    assert healed.status == "ok"
    assert built["Answer"] == built["Logic"] == 1


def test_a_member_that_failed_in_a_gather_is_tried_again(abt: Shop) -> None:
    abt.world.failing.add("sofa")
    first, _ = abt.run(shop.Logic)
    assert first.status == "partial"
    assert abt.run(shop.Logic)[0].status == "partial"
    abt.world.failing.clear()
    healed, built = abt.run(shop.Logic)
    assert healed.status == "ok"
    assert built["Matrix"] == 1


def test_sources_reached_by_a_value(abt: Shop) -> None:
    abt.put("p2", Product("sofa", brand="bolt"))
    abt.run(shop.Label)
    abt.world.slogans["bolt"] = "fast"
    result, _ = abt.run(shop.Label)
    assert result.builders["Label"].hit == 2
    assert result.values("Label")["abt", "US", "p2"] == "hello: sofa / fast"


def test_a_source_of_the_whole_group(abt: Shop) -> None:
    abt.run(shop.Label)
    abt.world.greetings["abt"] = "hi"
    result, _ = abt.run(shop.Label)
    assert result.builders["Label"].computed == 3
    assert abt.run(shop.Label)[0].unchanged


def test_a_run_ends_with_the_earliest_expiry_of_what_it_read(abt: Shop) -> None:
    abt.world.featured["abt", "US"] = ["p1"]
    start = abt.clock.now
    abt.run(shop.Card)
    rows = abt.cache.traces("Card", '["abt","US"]').to_pylist()
    assert {row["valid_until"].isoformat() for row in rows} == {start.replace(hour=13).isoformat()}
    abt.clock.advance(minutes=59)
    assert abt.run(shop.Card)[0].unchanged
    abt.clock.advance(minutes=1)
    abt.put("p1", Product("red lamp", stock=5))
    result, _ = abt.run(shop.Card)
    assert not result.unchanged
    assert result.builders["Stock"].computed == 3
    assert "[hello {'p1': 'red lamp'} [5] []]" in result.values("Card")["abt", "US", "p3"]


def test_a_group_without_members() -> None:
    own = Shop()
    result, built = own.run(shop.Logic, shop.Card)
    assert (result.status, result.keys, built) == ("ok", 0, {})
    table = result.table(shop.Logic)
    assert len(table) == 0
    assert table.schema.field("value").type == pa.string()
    assert table.column_names[:4] == ["merchant", "market", "product_id", "value"]
    assert own.run(shop.Logic, shop.Card)[0].status == "ok"


def test_groups_are_apart(abt: Shop) -> None:
    abt.world.products["buy", "US", "p1"] = Product("sofa")
    abt.run(shop.Logic)
    other, built = abt.run(shop.Logic, merchant="buy")
    assert list(other.values("Logic")) == [("buy", "US", "p1")]
    assert "Answer" not in built  # the prompt was paid for by the other merchant
    assert abt.run(shop.Logic)[0].unchanged
    assert abt.run(shop.Logic, merchant="buy")[0].unchanged


def test_several_targets_share_what_is_below(abt: Shop) -> None:
    result, built = abt.run(shop.Logic, shop.Label)
    assert built["Answer"] == 3
    assert result.builders["Prompt"].computed == 3
    assert len(result.values("Label")) == 3


def test_tables_are_typed_and_tell_failures(abt: Shop) -> None:
    abt.world.broken.add(("abt", "US", "p1"))
    result, _ = abt.run(shop.Price, shop.Label)
    prices, labels = result.table("Price"), result.table(shop.Label)
    assert prices.schema.field("value").type == pa.int64()
    assert prices["value"].to_pylist() == [1, 1, 1]
    assert labels["status"].to_pylist() == ["error", "ok", "ok"]
    assert labels["value"][0].as_py() is None
    assert "the disk is on fire" in labels["error"][0].as_py()


def test_a_run_is_recorded(abt: Shop) -> None:
    result, _ = abt.run(shop.Logic, run_id="run-7")
    record = abt.cache.last_run('["abt","US"]')
    assert record is not None
    assert (record.run_id, record.status) == ("run-7", "ok")
    assert record.record["builders"]["Logic"]["computed"] == 3
    assert record.record["builders"]["Logic"]["type"] == "string"
    assert set(abt.cache.history("Logic")["run_id"].to_pylist()) == {result.run_id} == {"run-7"}


def test_a_stop_keeps_what_was_paid_for(abt: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise BudgetError("spent")

    monkeypatch.setattr(shop.Suggestions, "build_one", stop)
    with pytest.raises(BudgetError):
        abt.run(shop.Logic)
    assert len(abt.cache.ids("Answer")) == 3
    monkeypatch.undo()
    _, built = abt.run(shop.Logic)
    assert "Answer" not in built
    assert built["Logic"] == 3


# -- what is refused before anything ran ---------------------------------------------------------------------


def _session() -> Session:
    return Shop(p1=Product()).session


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.run(**ABT), UsageError, "nothing to run: pass at least one target"),
        (lambda s: s.run(shop.Logic, **ABT), DefinitionError, r"Logic.over\(SomeKeySet\)"),
        (lambda s: s.run(shop.Logic.over(ProductIds), merchant="abt"), UsageError, "needs the group fields"),
        (
            lambda s: s.run(shop.Logic.over(ProductIds), configs={"Promt": {}}, **ABT),
            DefinitionError,
            "Did you mean 'Prompt'",
        ),
    ],
)
def test_refusals(call: Callable[[Session], Any], error: type[Exception], message: str) -> None:
    session = _session()
    with pytest.raises(error, match=message):
        call(session)
    assert session.context.world.built == {}


def test_an_unknown_engine() -> None:
    with pytest.raises(UsageError, match="engine 'flink' is unknown; choose 'spark' or 'local'"):
        Session(None, MemoryCache(), engine="flink")  # type: ignore[arg-type]


class Twins(KeySet):
    key, of, value = ("merchant", "market"), "product_id", pa.list_(pa.string())

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        if inputs["merchant"] == "broken":
            raise OSError("no catalog")
        return ["p1", "p2", "p1"]


def test_a_key_set_yields_each_key_once() -> None:
    with pytest.raises(DataError, match="Twins lists members twice: .'p1'.; a key set yields each key once"):
        _session().run(shop.Title.over(Twins), **ABT)


def test_keys_that_cannot_be_read_stop_the_run() -> None:
    with pytest.raises(BuildError, match="could not be read: Twins.*no catalog"):
        _session().run(shop.Title.over(Twins), merchant="broken", market="US")


def test_a_keyed_builder_may_gather() -> None:
    class Share(FeatureBuilder[str]):
        key, value = shop.PRODUCT, pa.string()
        deps = (shop.Title, shop.Title.over(ProductIds).named("all"))

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return f"{inputs['Title']} of {len(inputs['all'].keys)}"

    own = Shop(p1=Product("lamp"), p2=Product("sofa"))
    result, _ = own.run(Share)
    assert set(result.values(Share).values()) == {"lamp of 2", "sofa of 2"}
    assert own.run(Share)[0].unchanged
    own.put("p3", Product("chair"))
    assert set(own.run(Share)[0].values(Share).values()) == {"lamp of 3", "sofa of 3", "chair of 3"}


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    own = Shop(p1=Product("lamp"), p2=Product("sofa"), p3=Product("x"))
    session = Session(
        own.session.context,
        MemoryCache(),
        engine="local",
        limits=Limits(batch_rows=2),
        progress=lambda *event: told.append(event),
    )
    session.run(shop.Label.over(ProductIds), **ABT)
    assert [event[1:] for event in told if "Label" in event[0]] == [(2, 3), (3, 3)]


def test_a_key_set_that_cannot_be_read_says_so_in_its_own_words() -> None:
    class Away(KeySet):
        key, of, value = ("merchant",), "product_id", pa.list_(pa.string())

        def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
            raise ServiceError("the catalog's server does not answer")

    class Name(FeatureBuilder[str]):
        key, value = ("merchant", "product_id"), pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return str(inputs["product_id"])

    with pytest.raises(ServiceError, match="does not answer"):
        Session(None, MemoryCache(), engine="local").run(Name.over(Away), merchant="abt")
