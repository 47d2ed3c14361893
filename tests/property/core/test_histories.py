"""Random histories of edits and runs against a model that recomputes everything.

After every run each answer must be what the model says, and a run on top of it must build nothing.
"""

from __future__ import annotations

import tempfile
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop

MERCHANTS = st.sampled_from(["abt", "buy"])
IDS = st.sampled_from(["p1", "p2", "p3", "acme"])  # one id is a brand too, so that values lead to products
TITLES = st.sampled_from(["red lamp", "big red lamp", "sofa", "chair", ""]) | st.none()
BRANDS = st.sampled_from(["acme", "bolt"]) | st.none()
TEXTS = st.sampled_from(["red lamp", "sofa", "chair", "lamp", "red", "hello: sofa", "hi: chair", "sofa?"])
TEMPLATES = st.sampled_from(["{greeting}: {title}", "{title}?"])
TARGETS = st.sampled_from([(shop.Logic,), (shop.Card,), (shop.Label,), (shop.Logic, shop.Card, shop.Label)])
PRODUCTS = st.builds(shop.Product, TITLES, BRANDS, st.sampled_from([1, 2, None]))


class Histories(RuleBasedStateMachine):
    def make_cache(self) -> Any:
        return MemoryCache()

    @initialize(products=st.dictionaries(st.tuples(MERCHANTS, st.just("US"), IDS), PRODUCTS))
    def start(self, products: dict[Any, shop.Product]) -> None:
        self.clock = MovingClock()
        self.world = shop.World(products=products, slogans={"acme": "it works"})
        self.context = shop.ShopContext(self.world, self.clock)
        self.model = shop.Model(self.world, self.clock)
        self.cache = self.make_cache()

    @rule(merchant=MERCHANTS, product_id=IDS, product=PRODUCTS)
    def put(self, merchant: str, product_id: str, product: shop.Product) -> None:
        self.world.products[merchant, "US", product_id] = product

    @rule(merchant=MERCHANTS, product_id=IDS, title=TITLES)
    def retitle(self, merchant: str, product_id: str, title: str | None) -> None:
        if (merchant, "US", product_id) in self.world.products:
            self.world.products[merchant, "US", product_id].title = title

    @rule(merchant=MERCHANTS, product_id=IDS)
    def remove(self, merchant: str, product_id: str) -> None:
        self.world.products.pop((merchant, "US", product_id), None)

    @rule(brand=st.sampled_from(["acme", "bolt"]), slogan=st.sampled_from(["it works", "new", None]))
    def reword(self, brand: str, slogan: str | None) -> None:
        if slogan is None:
            self.world.slogans.pop(brand, None)
        else:
            self.world.slogans[brand] = slogan

    @rule(merchant=MERCHANTS, greeting=st.sampled_from(["hello", "hi"]))
    def greet(self, merchant: str, greeting: str) -> None:
        self.world.greetings[merchant] = greeting

    @rule(merchant=MERCHANTS, members=st.lists(IDS, unique=True))
    def feature(self, merchant: str, members: list[str]) -> None:
        self.world.featured[merchant, "US"] = members

    @rule(text=TEXTS)
    def fail_or_recover(self, text: str) -> None:
        self.world.failing ^= {text}

    @rule(merchant=MERCHANTS, product_id=IDS)
    def break_or_mend(self, merchant: str, product_id: str) -> None:
        self.world.broken ^= {(merchant, "US", product_id)}

    @rule(rate=st.sampled_from([1, 10]))
    def set_rate(self, rate: int) -> None:
        self.world.rate = rate

    @rule(minutes=st.sampled_from([1, 59, 61, 121]))
    def wait(self, minutes: int) -> None:
        self.clock.advance(minutes=minutes)

    @rule(
        merchant=MERCHANTS,
        wanted=TARGETS,
        template=TEMPLATES,
        keys=st.sampled_from([shop.ProductIds, shop.ProductIds, shop.Featured]),
        rows=st.sampled_from([1, 3, 2048]),
    )
    def run(self, merchant: str, wanted: tuple[Any, ...], template: str, keys: Any, rows: int) -> None:
        self.model.template = template
        session = Session(self.context, self.cache, engine="local", limits=Limits(batch_rows=rows))
        prompts = None if wanted == (shop.Card,) else {shop.Prompt: {"template": template}}
        over = [target.over(keys) for target in wanted]
        first = session.run(*over, configs=prompts, merchant=merchant, market="US")
        members = keys().build_one({"merchant": merchant, "market": "US"}, None, self.context)
        self.compare(first, wanted, [(merchant, "US", member) for member in members])

        before = self.world.built.copy()
        again = session.run(*over, configs=prompts, merchant=merchant, market="US")
        self.compare(again, wanted, [(merchant, "US", member) for member in members])
        assert self.world.built == before
        assert first.status == again.status
        if first.status == "ok":
            assert {name: counts.computed for name, counts in again.builders.items() if counts.computed} == {}
        if members:
            controller = Controller(self.context, self.cache)
            for target in wanted:
                key = (merchant, "US", members[0])
                feature = controller.get(target, key, None if target is shop.Card else prompts)
                expected = self.model.answer(target.name, key)
                assert (feature.status == "error") == (expected is shop.Failed)
                assert feature.value == (None if expected is shop.Failed else expected)
            assert self.world.built == before

    def compare(self, result: Any, targets: tuple[Any, ...], keys: list[Any]) -> None:
        if shop.Card in targets:
            self.model.read_sources(keys, (result.group["merchant"], "US"))
        for target in targets:
            expected = {key: self.model.answer(target.name, key) for key in keys}
            found = {
                key: shop.Failed if found.failed else found.value
                for key, found in result.execution.results_of(target.name).items()
            }
            assert found == expected


class DeltaHistories(Histories):
    def make_cache(self) -> Any:
        self.folder = tempfile.TemporaryDirectory()
        return DeltaCache(self.folder.name)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=20)
TestDeltaHistories = DeltaHistories.TestCase
TestDeltaHistories.settings = settings(max_examples=3, stateful_step_count=12)
