"""The Spark engine with every stage on its workers: the same answers, few jobs, errors as they are."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyspark.testing import assertDataFrameEqual

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.staged import Staging
from featurekit_spark.engines.spark import SparkEngine
from featurekit_spark.errors import BudgetError, BudgetReachedError, ContextError, UsageError
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import CountingLLM, MovingClock
from featurekit_spark.testing.parity import assert_parity
from tests import paid_shop, shop
from tests.shop import Product, ProductIds, ShopContext

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}
ON_WORKERS = Limits(in_process_keys=0, batch_rows=2, partitions=2)


def context() -> ShopContext:
    products = {
        "p1": Product("red lamp", "acme", 3),
        "p2": Product("sofa", "bolt", 1),
        "p3": Product("big red lamp", "acme", None),
        "p4": Product(None, None, 2),
        "p5": Product("chair", "acme", 1),
        "p6": Product("", "acme", 1),
        "caf\u00e9": Product("sofa", "p1", 1),
        "cafe\u0301": Product("lamp", "p2", 1),
    }
    world = shop.World(
        products={("abt", "US", name): product for name, product in products.items()},
        featured={("abt", "US"): ["p2", "p1", "p5"]},
        slogans={"acme": "it works"},
        failing={"chair", "hello: sofa"},
        broken={("abt", "US", "p6")},
    )
    return ShopContext(world, MovingClock())


def session(spark: Any, cache: Any, own: Any = None, **limits: Any) -> Session:
    return Session(
        own or context(), cache, engine="spark", spark=spark, limits=Limits(**{**vars(ON_WORKERS), **limits})
    )


@pytest.mark.parametrize("target", [shop.Logic, shop.Card, shop.Label, shop.ByHand], ids=lambda t: t.name)
def test_the_same_answers_everywhere(spark: Any, target: Any) -> None:
    values = assert_parity(target.over(ProductIds), context(), spark=spark, **ABT)
    assert len(values) == 8


def test_tables_are_equal_and_spark_reads_the_cache(spark: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    on_spark = session(spark, cache).run(shop.Logic.over(ProductIds), **ABT)
    locally = Session(context(), MemoryCache(), engine="local").run(shop.Logic.over(ProductIds), **ABT)
    assert on_spark.status == locally.status == "partial"
    assert on_spark.table("Logic").equals(locally.table("Logic"))
    assert on_spark.errors == locally.errors
    for name in ("Title", "Brand", "Prompt", "Answer", "Suggestions", "Matrix", "Logic"):
        there, here = vars(on_spark.builders[name]), vars(locally.builders[name])
        assert {**there, "seconds": 0} == {**here, "seconds": 0}, name
    entries = spark.read.format("delta").load(cache.table_path("entries"))
    stored = entries.where("builder = 'Logic' AND status = 'ok'").selectExpr("key", "CAST(value AS STRING)")
    expected = [
        (f'["abt","US","{row["product_id"]}"]', row["value"])
        for row in locally.table("Logic").to_pylist()
        if row["status"] == "ok"
    ]
    assertDataFrameEqual(stored, spark.createDataFrame(expected, ["key", "value"]))


def test_a_warm_run_starts_no_job(spark: Any, tmp_path: Path) -> None:
    own = context()
    own.world.failing.clear()
    own.world.broken.clear()
    cache = DeltaCache(str(tmp_path / "cache"))
    assert session(spark, cache, own).run(shop.Label.over(ProductIds), **ABT).status == "ok"

    def start() -> Any:
        raise AssertionError("a session was started")

    limits = Limits(in_process_keys=100, partitions=2)
    warm = Session(own, cache, engine="spark", spark=start, limits=limits)
    assert warm.run(shop.Label.over(ProductIds), **ABT).unchanged


def test_what_spark_made_the_local_engine_finds(spark: Any) -> None:
    own, cache = context(), MemoryCache()
    own.world.failing.clear()
    own.world.broken.clear()
    session(spark, cache, own).run(shop.Logic.over(ProductIds), **ABT)
    again = Session(own, cache, engine="local").run(shop.Logic.over(ProductIds), **ABT)
    assert again.unchanged
    assert {name for name, _ in own.world.built} == {"Matrix"}  # keyed stages ran on workers
    own.world.products["abt", "US", "p1"].title = "red lamps"
    changed = session(spark, cache, own).run(shop.Logic.over(ProductIds), **ABT)
    assert changed.builders["Answer"].calls == 1
    fresh = Session(own, MemoryCache(), engine="local").run(shop.Logic.over(ProductIds), **ABT)
    assert changed.values("Logic") == fresh.values("Logic")


# -- paid calls ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    llm: Any
    world: shop.World
    clock: Any = field(default_factory=MovingClock)


class Asked(FeatureBuilder[str]):
    key, value, paid, needs = ("prompt",), pa.string(), True, ("llm",)

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        answer = await context.llm.complete(inputs["prompt"])
        return Metered(answer.text, answer.tokens, answer.usd)


class Reply(FeatureBuilder[str]):
    key, deps, value = shop.PRODUCT, (Asked.on(prompt=shop.Title),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"<{inputs['Asked']}>"


def test_every_distinct_prompt_is_asked_once(spark: Any, tmp_path: Path) -> None:
    llm = CountingLLM(log=tmp_path / "calls", failures={"chair": OSError("down")})
    own = Asking(llm, context().world)
    own.world.broken.clear()
    cache = MemoryCache()
    result = session(spark, cache, own).run(Reply.over(ProductIds), **ABT)
    assert dict(llm.calls) == {"red lamp": 1, "sofa": 1, "big red lamp": 1, "chair": 1, "lamp": 1, "": 1}
    assert result.builders["Asked"].calls == 6
    assert result.values("Reply")["abt", "US", "p4"] is None
    again = session(spark, cache, own).run(Reply.over(ProductIds), **ABT)
    assert again.builders["Asked"].calls == llm.calls["chair"] - 1 == 1
    assert sum(llm.calls.values()) == 7


def test_workers_pay_no_more_than_the_run_may(spark: Any, tmp_path: Path) -> None:
    llm = CountingLLM(log=tmp_path / "calls", usd_per_call=0.25)
    own = Asking(llm, context().world)
    own.world.broken.clear()
    cache = MemoryCache()

    def run(**limits: Any) -> Any:
        budget = Budget(**limits)
        return session(spark, cache, own).run(Reply.over(ProductIds), budget=budget, **ABT)

    for limits, calls in (
        ({"max_calls": 2}, 2),
        ({"max_usd": 0.6}, 4),
        ({"max_calls": 1, "max_usd": 9.0}, 5),
    ):
        with pytest.raises(BudgetReachedError, match="the run stopped at its budget"):
            run(**limits)
        assert sum(llm.calls.values()) == len(cache.ids("Asked")) == calls
    assert run(max_calls=1).builders["Asked"].calls == 1
    assert set(llm.calls.values()) == {1}


def test_workers_are_asked_little_while_no_price_is_known(spark: Any, tmp_path: Path) -> None:
    llm = CountingLLM(log=tmp_path / "calls", usd_per_call=0.25)
    own = Asking(llm, context().world)
    own.world.broken.clear()
    with pytest.raises(BudgetReachedError):
        session(spark, MemoryCache(), own).run(Reply.over(ProductIds), budget=Budget(max_usd=0.8), **ABT)
    assert sum(llm.calls.values()) == 3


def test_a_spent_budget_comes_back_as_itself(spark: Any, tmp_path: Path) -> None:
    llm = CountingLLM(log=tmp_path / "calls", failures={"sofa": BudgetError("5.00 usd are spent")})
    own = Asking(llm, context().world)
    with pytest.raises(BudgetError, match="^5.00 usd are spent$"):
        session(spark, cache := MemoryCache(), own).run(Reply.over(ProductIds), **ABT)
    assert len(cache.ids("Asked")) == sum(llm.calls.values()) - 1 > 0  # every other answer is kept


# -- what cannot run -----------------------------------------------------------------------------------------


def test_a_context_that_cannot_travel_is_told_before_anything_ran() -> None:
    own = Asking(threading.Lock(), context().world)
    cache = MemoryCache()

    def start() -> Any:
        raise AssertionError("a session was started")

    with pytest.raises(
        ContextError, match=r"context.llm \(lock\) cannot travel to Spark workers: .*engine='local'"
    ):
        Session(own, cache, spark=start).run(Reply.over(ProductIds), **ABT)
    assert len(cache.history("ProductIds")) == 0


def test_an_attribute_that_no_stage_needs_may_stay_behind(spark: Any) -> None:
    own = Asking(threading.Lock(), context().world)
    assert session(spark, MemoryCache(), own).run(shop.Label.over(ProductIds), **ABT).keys == 8


class Bug(FeatureBuilder[str]):
    key, deps, value = shop.PRODUCT, (shop.Title,), pa.string()

    def build(self, inputs: Any, config: Any, context: Any) -> Any:
        if (inputs["Title"] == "sofa").any():
            raise RuntimeError("no sofas")
        return inputs["Title"].str.upper()


def test_a_builder_that_raises_for_some_keys(spark: Any) -> None:
    result = session(spark, MemoryCache()).run(Bug.over(ProductIds), **ABT)
    told = {key: error.split(" (")[0] for key, error in result.errors.items()}
    assert told == {
        '["abt","US","p2"]': 'Bug["abt","US","p2"]: RuntimeError: no sofas',
        '["abt","US","caf\u00e9"]': 'Bug["abt","US","caf\u00e9"]: RuntimeError: no sofas',
        '["abt","US","p6"]': 'Title["abt","US","p6"]: OSError: the disk is on fire',
    }
    assert result.values("Bug")["abt", "US", "p1"] == "RED LAMP"


class Undeclared(FeatureBuilder[str]):
    key, deps, value = shop.PRODUCT, (shop.Title,), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(context.world)


def test_an_undeclared_attribute_is_told_as_in_process(spark: Any) -> None:
    with pytest.raises(ContextError, match="Undeclared reads context.world, which it does not declare"):
        session(spark, MemoryCache()).run(Undeclared.over(ProductIds), **ABT)


class Share(FeatureBuilder[str]):
    """Keyed, and gathers by itself."""

    key, value = shop.PRODUCT, pa.string()
    deps = (shop.Title, shop.Stock.over(ProductIds).named("all"))

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"{inputs['Title']} of {len(inputs['all'].keys)}"


def test_a_keyed_builder_that_gathers(spark: Any) -> None:
    result = session(spark, MemoryCache()).run(Share.over(ProductIds), **ABT)
    assert result.values("Share")["abt", "US", "p2"] == "sofa of 8"


def test_an_engine_of_ones_own_session(spark: Any) -> None:
    engine = SparkEngine(lambda: spark, in_process_keys=0)
    result = Session(context(), MemoryCache(), engine=engine).run(shop.Title.over(ProductIds), **ABT)
    assert result.keys == 8


# -- beside the run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Loads once per process, and leaves a file for each load."""

    folder: str
    broken: bool = False

    def warm_up(self) -> None:
        (Path(self.folder) / f"{os.getpid()}").write_text("loaded")
        if self.broken:
            raise OSError("no weights")

    def loud(self, text: str) -> str:
        return text.upper()


@dataclass(frozen=True)
class Modelled:
    world: shop.World
    model: Model
    clock: Any = field(default_factory=MovingClock)


class Loud(FeatureBuilder[str]):
    key, deps, value, needs = shop.PRODUCT, (shop.Title,), pa.string(), ("model",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return context.model.loud(inputs["Title"])


@pytest.mark.parametrize("broken", [False, True], ids=["loads", "does not load"])
def test_what_a_worker_loads_is_loaded_beside_the_run(spark: Any, tmp_path: Path, broken: bool) -> None:
    own = Modelled(context().world, Model(str(tmp_path), broken))
    result = session(spark, MemoryCache(), own).run(Loud.over(ProductIds), **ABT)
    assert result.values("Loud")["abt", "US", "p2"] == "SOFA"
    loaded = {path.name for path in tmp_path.iterdir()}
    assert loaded and str(os.getpid()) not in loaded


def test_a_session_that_does_not_start_is_the_runs_error() -> None:
    def start() -> Any:
        raise RuntimeError("no cluster")

    with pytest.raises(RuntimeError, match="no cluster"):
        session(start, MemoryCache()).run(shop.Label.over(ProductIds), **ABT)


def test_workers_that_see_other_storage_are_sent_rows(spark: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """As where the cache lies on the driver's own disk and the workers are elsewhere."""
    cache = DeltaCache(str(tmp_path / "cache"))
    staging = cache.staging

    class Unseen(Staging):
        """A folder that no worker sees."""

        def writer(self) -> None:
            return None

    def elsewhere(run_id: str) -> Any:
        made = staging(run_id)
        return Unseen(made.uri, made.run_id, made.recorded, made.mark)

    monkeypatch.setattr(cache, "staging", elsewhere)
    made = session(spark, cache).run(shop.Logic.over(ProductIds), **ABT)
    rows = session(spark, MemoryCache()).run(shop.Logic.over(ProductIds), **ABT)
    assert made.table("Logic").drop(["ts"]).equals(rows.table("Logic").drop(["ts"]))
    assert not staged_files(tmp_path / "cache")
    assert not list((tmp_path / "cache/entries/_featurekit").iterdir())


def staged_files(cache: Path) -> list[Path]:
    """Data files that workers wrote."""
    files = (cache / "entries").rglob("*.parquet")
    return [file for file in files if re.fullmatch(r"part-[0-9a-f]{32}\.zstd\.parquet", file.name)]


def test_values_follow_the_group_on_workers(spark: Any, tmp_path: Path) -> None:
    cache, own = DeltaCache(str(tmp_path / "cache")), context()
    own.world.failing.clear()
    session(spark, cache, own).run(shop.Logic.over(ProductIds), **ABT)
    own.world.products["abt", "US", "p7"] = Product("lamp")
    found = session(spark, cache, own).run(shop.Logic.over(ProductIds), **ABT)
    assert found.builders["Search"].updated > found.builders["Search"].computed
    fresh = Session(own, MemoryCache(), engine="local").run(shop.Logic.over(ProductIds), **ABT)
    assert found.values(shop.Logic) == fresh.values(shop.Logic)


def test_entries_are_files_of_the_workers(spark: Any, tmp_path: Path) -> None:
    """Values do not pass through the driver, the answers are those of a cache that takes rows only."""
    cache = DeltaCache(str(tmp_path / "cache"))
    made = session(spark, cache).run(shop.Logic.over(ProductIds), **ABT)
    rows = session(spark, MemoryCache()).run(shop.Logic.over(ProductIds), **ABT)
    assert made.table("Logic").drop(["ts"]).equals(rows.table("Logic").drop(["ts"]))
    counts = [{name: replace(c, seconds=0.0) for name, c in r.builders.items()} for r in (made, rows)]
    assert counts[0] == counts[1]
    assert any(file.parent.name == "builder=Logic" for file in staged_files(tmp_path / "cache"))
    assert not list((tmp_path / "cache/entries/_featurekit").iterdir())


def test_a_killed_worker_loses_no_more_than_its_calls_in_flight(spark: Any, tmp_path: Path) -> None:
    """The run fails with its worker; the next one takes in what was answered, and asks for the rest."""
    cache = DeltaCache(str(tmp_path / "cache"))
    limits = Limits(in_process_keys=0, batch_rows=40, partitions=2, micro_batch=paid_shop.MICRO_BATCH)

    def run(counter: paid_shop.Counter) -> Any:
        world = paid_shop.World(counter)
        own = Session(world, cache, engine="spark", spark=spark, limits=limits)
        return own.run(paid_shop.Use.over(paid_shop.Ids), shop="a")

    first = paid_shop.Counter(tmp_path / "calls", 160, kill_at=30)
    with pytest.raises(Exception, match="crashed|terminated|exited"):
        run(first)
    before = first.asked()
    assert 30 <= len(before) < 160
    second = paid_shop.Counter(tmp_path / "calls again", 160)
    result = run(second)
    assert (result.status, len(result.values(paid_shop.Use))) == ("ok", 160)
    after = second.asked()
    assert len(set(before) & set(after)) <= 2 * paid_shop.MICRO_BATCH
    assert len(after) == len(set(after)) and set(before) | set(after) == {f"p{i}" for i in range(160)}
    assert not list((tmp_path / "cache/journal").iterdir())


def test_speculation_is_refused_where_calls_are_paid_for(spark: Any, tmp_path: Path) -> None:
    class Speculating:
        """The session, as one that was started with speculation."""

        conf = SimpleNamespace(
            get=lambda name, default=None: "true" if name == "spark.speculation" else default
        )

        def __getattr__(self, name: str) -> Any:
            return getattr(spark, name)

    counter = paid_shop.Counter(tmp_path / "calls", 9)
    own = Session(
        paid_shop.World(counter),
        DeltaCache(str(tmp_path / "cache")),
        engine=SparkEngine(lambda: Speculating(), in_process_keys=0, partitions=2),  # type: ignore[arg-type,return-value]
    )
    with pytest.raises(UsageError, match="spark.speculation"):
        own.run(paid_shop.Use.over(paid_shop.Ids), shop="a")
    assert counter.asked() == []
