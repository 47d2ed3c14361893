"""Table by table: the same answers, entries, traces and counts as through the driver, whatever became of the cache."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.apps.product_recs import LLMLogic, ProductIds, SimilarProducts
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.context import Context
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.engines.tables import TableExecution
from featurekit_spark.errors import BudgetError, DataError, UsageError
from featurekit_spark.execute import Execution
from featurekit_spark.search.matrix import MatrixStore
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.testing.fakes import CountingLLM, MovingClock
from tests import shop
from tests.shop import Product

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}
BY_TABLES = Limits(collect_mb=0, batch_rows=2)
TITLES = {
    "a": "red lamp",
    "b": "big red lamp",
    "c": "sofa",
    "d": "red sofa",
    'caf\u00e9 "1"': "chair",
    "e": "",
}


def dump(cache: DeltaCache, *builders: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What a cache holds, less what may differ between two runs: entries by id, the newest trace rows by key."""
    entries, traces = {}, {}
    for name in builders:
        for row in cache.history(name).to_pylist():
            entries[name, row["entry_id"], row["ts"]] = [
                row[column]
                for column in ("key", "config_hash", "inputs_hash", "value_hash", "value", "status", "error")
            ]
        where = cache._read("traces", name, [])
        for row in sorted(where.to_pylist(), key=lambda row: row["recorded"]):
            told = {c: v for c, v in row.items() if c not in ("run_id", "recorded", "ts")}
            traces[name, row["kind"], row["key"]] = told
    return entries, traces


def assert_equal_runs(by_tables: RunResult, by_driver: RunResult, targets: list[Any]) -> None:
    """Two runs that did the same, one on tables, one through the driver."""
    assert isinstance(by_tables.execution, TableExecution)
    assert type(by_driver.execution) is Execution
    for name in ("status", "keys", "unchanged"):
        assert getattr(by_tables, name) == getattr(by_driver, name), name
    assert by_tables.errors == by_driver.errors
    names = [target.name for target in targets]
    assert by_tables.execution.fingerprint(names) == by_driver.execution.fingerprint(names)
    assert by_tables.execution.kept(names) == by_driver.execution.kept(names)
    for name in names:
        found, expected = by_tables.execution.answers(name).toArrow(), by_driver.execution.answers(name)
        assert answers(found) == answers(expected)


def answers(table: pa.Table) -> list[Any]:
    """Rows in an order of their own. When a null was last found depends on whether it was proven or walked."""
    rows = [row if row["value"] is not None else {**row, "ts": None} for row in table.to_pylist()]
    return sorted(rows, key=str)


def counts(result: RunResult, *leave_out: str) -> dict[str, Any]:
    """Counts by builder; time is not compared."""
    return {
        name: {**vars(found), "seconds": 0}
        for name, found in result.builders.items()
        if name not in leave_out
    }


@dataclass
class Shop:
    """A catalog file and two caches of it: one for runs on tables, one for runs through the driver."""

    spark: Any
    folder: Path

    def __post_init__(self) -> None:
        self.caches = {way: DeltaCache(str(self.folder / way)) for way in ("tables", "driver")}
        self.clock, self.llm = MovingClock(), CountingLLM(log=self.folder / "calls")
        self.titles = dict(TITLES)
        self.targets = [LLMLogic, SimilarProducts]

    def run(self, way: str, on: str | None = None) -> RunResult:
        with (self.folder / "abt_US.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("product_id", "title"), *self.titles.items()])
        cache = self.caches[on or way]
        context = Context(
            product_db=FileProductDB(self.folder, merchant="abt", market="US"),
            llm=self.llm,
            embedder=HashingEmbedder(16),
            matrices=MatrixStore(self.folder / "matrices"),
            clock=self.clock,
        )
        session = (
            Session(context, cache, spark=self.spark, limits=BY_TABLES)
            if way == "tables"
            else Session(context, cache, engine="local")
        )
        self.clock.advance(seconds=1)
        result = session.run(*(target.over(ProductIds) for target in self.targets), **ABT)
        self.clock.advance(seconds=-1)
        return result

    def step(self, *, goes_back: bool = False) -> tuple[RunResult, RunResult]:
        """One run each way, after checking that they did and left the same. `goes_back`: to an earlier state, which is
        walked by tables and restored by the driver."""
        on_tables, by_driver = self.run("tables"), self.run("driver")
        self.clock.advance(seconds=1)
        assert_equal_runs(on_tables, by_driver, self.targets)
        # Where a builder without inputs is evaluated within its reader's stage, it is looked up once more there.
        names = [name for name in on_tables.builders if name != "ProductIds"]
        if goes_back:
            by_tables, by_process = (current(self.caches[way], *names) for way in ("tables", "driver"))
            assert by_tables == by_process
        else:
            assert counts(on_tables, "ProductEmbedding") == counts(by_driver, "ProductEmbedding")
            assert dump(self.caches["tables"], *names) == dump(self.caches["driver"], *names)
        on_tables.execution.close()
        return on_tables, by_driver


def current(cache: DeltaCache, *names: str) -> dict[str, dict[str, Any]]:
    """What every reader sees."""
    rows = {name: cache.newest(name).to_pylist() for name in names}
    return {name: {row["key"]: (row["entry_id"], row["value"]) for row in own} for name, own in rows.items()}


@pytest.fixture
def abt(spark: Any, tmp_path: Path) -> Shop:
    return Shop(spark, tmp_path)


@pytest.fixture
def elsewhere(spark: Any) -> Iterator[None]:
    """A session whose time zone is another, with casts that do not fail."""
    before = {name: spark.conf.get(name) for name in ("spark.sql.session.timeZone", "spark.sql.ansi.enabled")}
    spark.conf.set("spark.sql.session.timeZone", "America/St_Johns")
    spark.conf.set("spark.sql.ansi.enabled", "false")
    yield
    for name, value in before.items():
        spark.conf.set(name, value)


def test_a_catalog_through_its_changes(abt: Shop) -> None:
    cold, _ = abt.step()
    assert (cold.status, cold.keys) == ("ok", 6)
    assert cold.builders["LLMCompletion"].calls == 5
    abt.llm.failures["get recommendations for armchair"] = TimeoutError("no answer")
    abt.titles |= {'caf\u00e9 "1"': "armchair", "a": " ", "e": "stool", "f": "sofa"}
    gone = abt.titles.pop("b")
    moved, by_driver = abt.step()
    assert moved.status == "partial"
    assert list(moved.errors) == ['["abt","US","caf\u00e9 \\"1\\""]']
    assert by_driver.execution.kept(["LLMLogic"]) == 1

    abt.titles = {**TITLES, "b": gone}
    back, by_driver = abt.step(goes_back=True)
    assert back.status == "ok"
    assert back.builders["LLMCompletion"].calls == 0
    assert back.builders["LLMLogic"].computed == 0
    assert staged(abt.caches["tables"]) == []

    # A cache that was written by one is a hit for the other.
    for way, on in (("tables", "driver"), ("driver", "tables")):
        result = abt.run(way, on)
        assert result.unchanged
        computed = {name: found.computed for name, found in result.builders.items() if found.computed}
        # The long list of members is an entry only where it went through the driver.
        assert computed == ({} if way == "tables" else {"ProductIds": 1})
        assert result.execution.fingerprint(["LLMLogic"]) == by_driver.execution.fingerprint(["LLMLogic"])


class Kiosk(FeatureBuilder[str]):
    """Its name is no identifier; it gathers by itself, per product."""

    name, key, value = "its-own.kiosk", shop.PRODUCT, pa.string()
    deps = (shop.Title, shop.Stock.over(shop.ProductIds).named("all"))

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        stocks = inputs["all"]
        return f"{inputs['Title']} of {list(stocks.keys)} {list(stocks.values)}"


def test_sources_with_a_ttl_hand_written_gets_and_gathers(
    spark: Any, tmp_path: Path, elsewhere: None
) -> None:
    products = {
        "p1": Product("red lamp", "acme", 3),
        "p2": Product("sofa", "bolt", 1),
        "caf\u00e9": Product('sofa\t"x"', "p1", None),
        "p4": Product(None, None, 2),
        "p6": Product("", "acme", 1),
    }
    world = shop.World(
        products={("abt", "US", name): product for name, product in products.items()},
        featured={("abt", "US"): ["p2", "p1", "gone"]},
        slogans={"acme": "it works"},
        broken={("abt", "US", "p6")},
    )
    clock = MovingClock()
    context = shop.ShopContext(world, clock)
    caches = [DeltaCache(str(tmp_path / way)) for way in ("tables", "driver")]
    targets = [shop.Card, Kiosk]

    def step() -> RunResult:
        on_tables = Session(context, caches[0], spark=spark, limits=BY_TABLES)
        by_driver = Session(context, caches[1], engine="local")
        over = [target.over(shop.ProductIds) for target in targets]
        one, other = on_tables.run(*over, **ABT), by_driver.run(*over, **ABT)
        assert_equal_runs(one, other, targets)
        names = [name for name in one.builders if not issubclass(one.execution.graph[name], shop.KeySet)]
        assert dump(caches[0], *names) == dump(caches[1], *names)
        one.execution.close()
        return other

    assert step().status == "partial"
    clock.advance(minutes=61)
    world.products["abt", "US", "p2"].stock = 7
    world.featured["abt", "US"] = []
    world.broken.clear()
    assert step().status == "ok"


def test_a_trace_proves_nothing_once_another_entry_is_current(spark: Any, tmp_path: Path) -> None:
    """Single requests made another entry current, or none: the run makes its own answer current again."""
    products = {("abt", "US", name): Product(f"lamp {name}") for name in ("p1", "p2", "p3")}
    world, clock = shop.World(products=products), MovingClock()
    context = shop.ShopContext(world, clock)
    caches = [DeltaCache(str(tmp_path / way)) for way in ("tables", "driver")]
    sessions = [
        Session(context, caches[0], spark=spark, limits=BY_TABLES),
        Session(context, caches[1], engine="local"),
    ]

    def step() -> RunResult:
        one, other = (session.run(shop.Prompt.over(shop.ProductIds), **ABT) for session in sessions)
        assert_equal_runs(one, other, [shop.Prompt])
        assert counts(one, "ProductIds") == counts(other, "ProductIds")
        assert current(caches[0]) == current(caches[1]) == answers(other.table("Prompt").select(["value"]))
        one.execution.close()
        return other

    def current(cache: DeltaCache) -> list[Any]:
        return answers(cache.read(shop.Prompt).select(["value"]))

    whole = answers(step().table("Prompt").select(["value"]))
    for name, title in (("p1", "sofa"), ("p2", None)):
        before = products["abt", "US", name].title
        products["abt", "US", name].title = title
        for session in sessions:
            session.get(shop.Prompt, ("abt", "US", name))
        products["abt", "US", name].title = before
    assert current(caches[0]) == current(caches[1]) != whole
    healed = step()
    assert not healed.unchanged
    assert (healed.builders["Prompt"].hit, healed.builders["Prompt"].computed) == (3, 0)
    assert step().unchanged


def staged(cache: DeltaCache) -> list[str]:
    folder = Path(cache.path) / "staging"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_an_empty_catalog(abt: Shop) -> None:
    abt.titles.clear()
    result, _ = abt.step()
    assert (result.status, result.keys) == ("ok", 0)
    assert "ProductEmbeddingDB" not in {name for name, found in result.builders.items() if found.computed}


def test_a_spent_budget_comes_back_as_itself_and_costs_nothing_twice(abt: Shop) -> None:
    abt.targets = [LLMLogic]
    abt.llm.failures["get recommendations for sofa"] = BudgetError("5.00 usd are spent,\nof 5.00")
    cache = abt.caches["tables"]
    killed = Path(cache.path) / "staging" / "killed" / "001-members"
    killed.mkdir(parents=True)
    with pytest.raises(BudgetError, match="^5.00 usd are spent,\nof 5.00$"):
        abt.run("tables")
    assert staged(cache) == ["killed"]
    paid = len(cache.ids("LLMCompletion"))
    abt.llm.failures.clear()
    result = abt.run("tables")
    assert result.builders["LLMCompletion"].calls == 5 - paid
    result.execution.close()


class Twice(shop.ProductIds):
    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        return ["p1", "p2", "p1"]


def test_what_cannot_run(spark: Any, tmp_path: Path) -> None:
    context = shop.ShopContext(shop.World(products={("abt", "US", "p1"): Product()}))
    cache = DeltaCache(str(tmp_path))
    session = Session(context, cache, spark=spark, limits=BY_TABLES)
    with pytest.raises(DataError, match="Twice lists 1 members twice"):
        session.run(shop.Title.over(Twice), **ABT)
    with pytest.raises(UsageError, match="only a DeltaCache can keep its results; found a MemoryCache"):
        Session(context, MemoryCache(), spark=spark, limits=BY_TABLES).run(
            shop.Title.over(shop.ProductIds), **ABT
        )
    assert staged(cache) == []
