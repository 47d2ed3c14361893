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

MERCHANTS = st.sampled_from(["abt", "abt", "abt", "buy"])
IDS = st.sampled_from(["p1", "p2", "acme"])  # some ids are brands too, so that values lead to products
TITLES = st.sampled_from(["red lamp", "big red lamp", "sofa", "chair", "", None])
BRANDS = st.sampled_from(["acme", "p1", "bolt", None])
TEXTS = st.sampled_from(["red lamp", "sofa", "lamp", "red", "hello: sofa", "hello: red lamp", "sofa?"])
PRODUCTS = st.builds(shop.Product, TITLES, BRANDS, st.sampled_from([1, 2, None]))
CATALOGS = st.fixed_dictionaries(
    {("abt", "US", "p1"): PRODUCTS, ("abt", "US", "p2"): PRODUCTS, ("buy", "US", "p1"): PRODUCTS}
)
TARGETS = [
    (shop.Logic,),
    (shop.Card,),
    (shop.Label,),
    (shop.Label,),
    (shop.Price,),
    (shop.Logic, shop.Card, shop.Label),
]
EDITS = st.one_of(
    st.tuples(st.just("put"), MERCHANTS, IDS, PRODUCTS),
    st.tuples(st.just("retitle"), MERCHANTS, IDS, TITLES),
    st.tuples(st.just("leave_or_return"), MERCHANTS, IDS),
    st.tuples(
        st.just("reword"), st.sampled_from(["acme", "bolt"]), st.sampled_from(["it works", "new", None])
    ),
    st.tuples(st.just("greet"), MERCHANTS, st.sampled_from(["hello", "hi"])),
    st.tuples(st.just("feature"), MERCHANTS, st.lists(IDS, unique=True)),
    st.tuples(st.just("fail_or_recover"), TEXTS),
    st.tuples(st.just("break_or_mend"), MERCHANTS, IDS),
    st.tuples(st.just("set_rate"), st.sampled_from([1, 10])),
    st.tuples(st.just("wait"), st.sampled_from([1, 59, 61, 121])),
)


class Histories(RuleBasedStateMachine):
    def make_cache(self) -> Any:
        return MemoryCache()

    @initialize(products=CATALOGS)
    def start(self, products: dict[Any, shop.Product]) -> None:
        self.clock = MovingClock()
        self.away: dict[Any, shop.Product] = {}
        self.world = shop.World(products=products, slogans={"acme": "it works"})
        self.context = shop.ShopContext(self.world, self.clock)
        self.model = shop.Model(self.world, self.clock)
        self.cache = self.make_cache()

    def put(self, merchant: str, product_id: str, product: shop.Product) -> None:
        self.world.products[merchant, "US", product_id] = product

    def retitle(self, merchant: str, product_id: str, title: str | None) -> None:
        if (merchant, "US", product_id) in self.world.products:
            self.world.products[merchant, "US", product_id].title = title

    def leave_or_return(self, merchant: str, product_id: str) -> None:
        here, there = self.world.products, self.away
        if (merchant, "US", product_id) in there:
            here, there = there, here
        if (merchant, "US", product_id) in here:
            there[merchant, "US", product_id] = here.pop((merchant, "US", product_id))

    def reword(self, brand: str, slogan: str | None) -> None:
        if slogan is None:
            self.world.slogans.pop(brand, None)
        else:
            self.world.slogans[brand] = slogan

    def greet(self, merchant: str, greeting: str) -> None:
        self.world.greetings[merchant] = greeting

    def feature(self, merchant: str, members: list[str]) -> None:
        self.world.featured[merchant, "US"] = members

    def fail_or_recover(self, text: str) -> None:
        self.world.failing ^= {text}

    def break_or_mend(self, merchant: str, product_id: str) -> None:
        self.world.broken ^= {(merchant, "US", product_id)}

    def set_rate(self, rate: int) -> None:
        self.world.rate = rate

    def wait(self, minutes: int) -> None:
        self.clock.advance(minutes=minutes)

    @rule(
        edits=st.lists(EDITS, max_size=3),
        merchant=MERCHANTS,
        wanted=st.sampled_from(TARGETS),
        template=st.sampled_from(["{greeting}: {title}", "{greeting}: {title}", "{title}?"]),
        keys=st.sampled_from([shop.ProductIds, shop.ProductIds, shop.ProductIds, shop.Featured]),
        rows=st.sampled_from([1, 3, 2048]),
    )
    def run(
        self,
        edits: list[tuple[Any, ...]],
        merchant: str,
        wanted: tuple[Any, ...],
        template: str,
        keys: Any,
        rows: int,
    ) -> None:
        for name, *arguments in edits:
            getattr(self, name)(*arguments)
        self.model.template = template
        session = Session(self.context, self.cache, engine="local", limits=Limits(batch_rows=rows))
        configs = {shop.Prompt: {"template": template}} if {shop.Logic, shop.Label} & {*wanted} else None
        over = [target.over(keys) for target in wanted]
        first = session.run(*over, configs=configs, merchant=merchant, market="US")
        members = keys().build_one({"merchant": merchant, "market": "US"}, None, self.context)
        members = [(merchant, "US", member) for member in members]
        self.compare(first, wanted, members)

        before = self.world.built.copy()
        again = session.run(*over, configs=configs, merchant=merchant, market="US")
        self.compare(again, wanted, members)
        assert self.world.built == before
        assert first.status == again.status
        if first.status == "ok":
            assert {name: counts.computed for name, counts in again.builders.items() if counts.computed} == {}
        controller = Controller(self.context, self.cache)
        for target in wanted if members else ():
            feature = controller.get(
                target, members[0], configs if target in (shop.Logic, shop.Label) else None
            )
            expected = self.model.answer(target.name, members[0])
            assert (feature.status == "error") == (expected is shop.Failed)
            assert feature.value == (None if expected is shop.Failed else expected)
        assert self.world.built == before

    def compare(self, result: Any, targets: tuple[Any, ...], keys: list[Any]) -> None:
        if {shop.Card, shop.Price} & {*targets}:
            group = (result.group["merchant"], "US") if shop.Card in targets else None
            self.model.read_sources(keys, group)
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
TestHistories.settings = settings(max_examples=120, stateful_step_count=20)
TestDeltaHistories = DeltaHistories.TestCase
TestDeltaHistories.settings = settings(max_examples=6, stateful_step_count=8)
