"""Random histories of edits, runs, single requests and crashes against a model that recomputes everything.

After every run each answer must be what the model says, every reader of the cache must say the same, nothing may have
been paid for twice, nothing that was refused may have been asked again where that was not wanted, and a run on top of
it must build nothing. `FEATUREKIT_HISTORIES=50` makes 50 times as many histories, other ones each time.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from featurekit_spark.bindings import Bindings
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller
from featurekit_spark.fingerprint import inputs_hash, key_json
from featurekit_spark.graph import Graph
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import MovingClock
from featurekit_spark.values import value_type
from tests import shop

MERCHANTS = st.sampled_from(["abt", "abt", "abt", "buy"])
IDS = st.sampled_from(["p1", "p2", "acme"])  # some ids are brands too, so that values lead to products
TITLES = st.sampled_from(["red lamp", "big red lamp", "sofa", "chair", "", None])
BRANDS = st.sampled_from(["acme", "p1", "bolt", None])
TEXTS = st.sampled_from(["red lamp", "sofa", "lamp", "red", "hello: sofa", "hello: red lamp", "sofa?"])
STOCKS = (1, 2, None)
PRODUCTS = st.builds(shop.Product, TITLES, BRANDS, st.sampled_from(STOCKS))
CATALOGS = st.fixed_dictionaries(
    {("abt", "US", "p1"): PRODUCTS, ("abt", "US", "p2"): PRODUCTS, ("buy", "US", "p1"): PRODUCTS}
)
TARGETS = st.sampled_from(
    [
        (shop.Logic,),
        (shop.Card,),
        (shop.Label,),
        (shop.Label,),
        (shop.Price,),
        (shop.Banner,),
        (shop.Logic, shop.Card, shop.Label),
    ]
)
TEMPLATES = st.sampled_from(["{greeting}: {title}", "{greeting}: {title}", "{title}?"])
KEYSETS = st.sampled_from([shop.ProductIds, shop.ProductIds, shop.ProductIds, shop.Featured])
EDITS = st.one_of(
    st.tuples(st.just("put"), MERCHANTS, IDS, PRODUCTS),
    st.tuples(st.just("retitle"), MERCHANTS, IDS, TITLES),
    st.tuples(st.just("retitle"), MERCHANTS, IDS, TITLES),
    st.tuples(st.just("leave_or_return"), MERCHANTS, IDS),
    st.tuples(
        st.just("reword"), st.sampled_from(["acme", "bolt"]), st.sampled_from(["it works", "new", None])
    ),
    st.tuples(st.just("greet"), MERCHANTS, st.sampled_from(["hello", "hi"])),
    st.tuples(st.just("feature"), MERCHANTS, st.lists(IDS, unique=True)),
    st.tuples(st.just("fail_or_recover"), TEXTS),
    st.tuples(st.just("refuse_or_give_in"), TEXTS),
    st.tuples(st.just("break_or_mend"), MERCHANTS, IDS),
    st.tuples(st.just("set_rate"), st.sampled_from([1, 10])),
    st.tuples(st.just("wait"), st.sampled_from([1, 59, 61, 121, -30])),
    st.tuples(st.just("go_back")),
)
SOME_EDITS = st.lists(EDITS, max_size=3)
LONG = int(os.environ.get("FEATUREKIT_HISTORIES", "1"))


class Histories(RuleBasedStateMachine):
    def make_cache(self) -> Any:
        return MemoryCache()

    @initialize(products=CATALOGS, version=st.sampled_from([None, 0]))
    def start(self, products: dict[Any, shop.Product], version: int | None) -> None:
        self.clock = MovingClock()
        self.away: dict[Any, shop.Product] = {}
        self.world = shop.World(products=products, slogans={"acme": "it works"}, version=version)
        self.versions = itertools.count(1)
        self.context = shop.ShopContext(self.world, self.clock)
        self.model = shop.Model(self.world, self.clock)
        self.cache = self.make_cache()
        self.before: dict[Any, shop.Product] = {}
        self.recovered = False
        self.told: dict[Any, tuple[str, Any]] = {}  # by what the outputs are known, and what they hold

    # -- edits -----------------------------------------------------------------------------------------------

    def edit(self, edits: list[tuple[Any, ...]]) -> None:
        products = {key: shop.Product(**vars(product)) for key, product in self.world.products.items()}
        for name, *arguments in edits:
            getattr(self, name)(*arguments)
        if edits:
            self.new_version()
        if products != self.world.products:
            self.before = products

    def new_version(self) -> None:
        if self.world.version is not None:
            self.world.version = next(self.versions)

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

    def go_back(self) -> None:
        """The catalog as it was before it was last edited: inputs A, B, A."""
        self.world.products.clear()
        self.world.products.update(
            {key: shop.Product(**vars(product)) for key, product in self.before.items()}
        )

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

    def refuse_or_give_in(self, prompt: str) -> None:
        self.world.refusing ^= {prompt}

    def break_or_mend(self, merchant: str, product_id: str) -> None:
        self.world.broken ^= {(merchant, "US", product_id)}

    def set_rate(self, rate: int) -> None:
        self.world.rate = rate

    def wait(self, minutes: int) -> None:
        self.clock.advance(minutes=minutes)

    # -- what happens ----------------------------------------------------------------------------------------

    @rule(
        edits=SOME_EDITS,
        merchant=MERCHANTS,
        wanted=TARGETS,
        template=TEMPLATES,
        keys=KEYSETS,
        rows=st.sampled_from([1, 3, 2048]),
        retry=st.sampled_from([None, None, None, "retryable", "terminal", "all"]),
    )
    def run(
        self,
        edits: list[tuple[Any, ...]],
        merchant: str,
        wanted: tuple[Any, ...],
        template: str,
        keys: Any,
        rows: int,
        retry: Any,
    ) -> None:
        self.edit(edits)
        self.model.template = template
        first = self.session_run(self.cache, merchant, wanted, template, keys, rows, retry=retry)
        members = self.members(merchant, keys)
        if retry in ("terminal", "all"):
            self.model.remembered = set()  # all of these were asked again
        self.check_answers(first, wanted, members)
        self.model.remembered = self.remembered()
        self.check_readers(wanted, template, members)

        before = self.world.built.copy()
        again = self.session_run(self.cache, merchant, wanted, template, keys, rows)
        self.check_answers(again, wanted, members)
        assert self.world.built == before
        assert first.status == again.status
        if first.status == "ok":
            made = {name: (counts.computed, counts.updated) for name, counts in again.builders.items()}
            assert {name: counts for name, counts in made.items() if any(counts)} == {}
        for target in wanted if members else ():
            self.check_get(target, members[0], template)
        assert self.world.built == before
        self.check_paid()

    @rule(
        edits=SOME_EDITS,
        merchant=MERCHANTS,
        product_id=IDS,
        builder=st.sampled_from([shop.Label, shop.Prompt, shop.Price, shop.Banner, shop.ByHand]),
        template=TEMPLATES,
    )
    def get(
        self, edits: list[tuple[Any, ...]], merchant: str, product_id: str, builder: Any, template: str
    ) -> None:
        """One request between runs; a get that gathers nothing, as it would build the group's matrix."""
        self.edit(edits)
        self.model.template = template
        key = (merchant, "US", product_id)
        self.check_get(builder, key, template)
        if self.model.answer(builder.name, key) is not shop.Failed:
            self.check_readers((builder,), template, [key], every_config=builder is not shop.Prompt)
        self.check_paid()

    @rule(
        edits=SOME_EDITS,
        merchant=MERCHANTS,
        builder=st.sampled_from([shop.Label, shop.Banner, shop.Logic, shop.Prompt]),
        looks=st.tuples(*[st.sampled_from(["run", "run", "get"])] * 3),
        known=st.booleans(),
    )
    def there_and_back(
        self,
        edits: list[tuple[Any, ...]],
        merchant: str,
        builder: Any,
        looks: tuple[str, str, str],
        known: bool,
    ) -> None:
        """Inputs A, B, A: what was current in between is current no more. `known`: sources tell the version of then."""
        self.model.template = template = "{greeting}: {title}"
        self.look(looks[0], builder, merchant)
        world, away, now = copy.deepcopy((vars(self.world), self.away, self.clock.now))
        self.edit(edits)
        self.look(looks[1], builder, merchant)
        members = self.members(merchant, shop.ProductIds)
        # Other targets look at prompts under another config, and leave those of this one as they are.
        self.check_readers((builder,), template, members, every_config=builder is not shop.Prompt)
        kept = {
            "built": self.world.built,
            "refused": self.world.refused,
        }
        for name, value in {**world, **kept}.items():
            setattr(self.world, name, value)
        self.away, self.clock.now = away, now
        if not known:
            self.new_version()
        self.look(looks[2], builder, merchant)
        members = self.members(merchant, shop.ProductIds)
        self.check_readers((builder,), template, members, every_config=builder is not shop.Prompt)
        for key in members[:1]:
            self.check_get(builder, key, template)  # which takes the matrix that is current
        self.check_paid()

    def look(self, how: str, target: Any, merchant: str) -> None:
        members = self.members(merchant, shop.ProductIds)
        if how == "run":
            result = self.session_run(
                self.cache, merchant, (target,), self.model.template, shop.ProductIds, 2048
            )
            self.check_answers(result, (target,), members)
        for key in members if how == "get" else ():
            self.check_get(target, key, self.model.template, gather=True)

    @rule(
        merchant=MERCHANTS,
        expiring=st.sampled_from([shop.Price, shop.Card]),
        rate=st.sampled_from([1, 10]),
        minutes=st.sampled_from([59, 61, 121, 121, -30]),
    )
    def expire(self, merchant: str, expiring: Any, rate: int, minutes: int) -> None:
        """Nothing changes but what only a ttl lets in."""
        self.look("run", expiring, merchant)
        version = self.world.version
        self.edit([("set_rate", rate), ("wait", minutes)])
        self.world.version = version  # no source saw any of it
        self.look("run", expiring, merchant)

    @rule(
        merchant=MERCHANTS,
        templates=st.tuples(TEMPLATES, TEMPLATES),
        which=st.sampled_from([min, max]),
        gives_in=st.booleans(),
        retries=st.lists(st.sampled_from([None, "retryable", "terminal", "all"]), max_size=2),
    )
    def refuse(
        self, merchant: str, templates: tuple[str, str], which: Any, gives_in: bool, retries: list[Any]
    ) -> None:
        """A prompt of a product is refused; what then happens to it is decided by who asks, and how."""
        self.model.template = templates[0]
        prompts = {
            prompt
            for key in self.members(merchant, shop.ProductIds)
            if (prompt := self.model.answer("prompt", key)) not in (None, shop.Failed)
        }
        refused = {which(prompts)} if prompts else set()
        self.edit([("refuse_or_give_in", prompt) for prompt in refused - self.world.refusing])
        self.look("run", shop.Logic, merchant)
        if gives_in:
            self.edit([("refuse_or_give_in", prompt) for prompt in refused])
        for retry in [None, *retries]:
            wanted, over = (shop.Logic,), shop.ProductIds
            result = self.session_run(
                self.cache, merchant, wanted, self.model.template, over, 2048, retry=retry
            )
            if retry in ("terminal", "all"):
                self.model.remembered = set()
            self.check_answers(result, wanted, self.members(merchant, over))
            self.model.remembered = self.remembered()
            self.model.template = templates[1]
        self.check_paid()

    @rule(text=TEXTS)
    def get_with_stand_in(self, text: str) -> None:
        feature = Controller(self.context, self.cache).get(shop.Mood, (text,))
        stands_in = self.model.fails("Mood", text)
        assert feature.value == self.model.mood((text,))
        assert feature.status == ("fallback" if stands_in else "fresh")

    @rule(
        edits=SOME_EDITS,
        merchant=MERCHANTS,
        wanted=TARGETS,
        template=TEMPLATES,
        number=st.integers(0, 6),
        where=st.sampled_from(["building", "before", "between", "after"]),
    )
    def crash(
        self,
        edits: list[tuple[Any, ...]],
        merchant: str,
        wanted: tuple[Any, ...],
        template: str,
        number: int,
        where: Any,
    ) -> None:
        """A run that ends in a build, or with its process before, in or after an append."""
        self.edit(edits)
        cache: Any = self.cache
        if where == "building":
            self.world.crash_in = number
        else:
            cache = Mortal(self.cache, number, where)
        try:
            self.session_run(cache, merchant, wanted, template, shop.ProductIds, 3)
        except shop.Crash:
            pass
        finally:
            self.world.crash_in = None
        self.remember_what_is_durable()
        self.check_paid()

    @precondition(lambda self: not self.recovered)  # once in a history: it starts from nothing, which is slow
    @rule(merchant=MERCHANTS, template=TEMPLATES)
    def recover(self, merchant: str, template: str) -> None:
        """Nothing fails any more: answers and hashes are those of a run that has no cache yet."""
        self.recovered = True
        self.world.failing, self.world.refusing, self.world.broken = set(), set(), set()
        self.new_version()
        wanted = (
            shop.Logic,
            shop.Label,
            shop.Banner,
        )  # without a ttl, by which an old answer may be the right one
        ours, fresh = (
            self.session_run(cache, merchant, wanted, template, shop.ProductIds, 2048, world, "all")
            for cache, world in (
                (self.cache, self.world),
                (MemoryCache(), shop.World(**{**vars(self.world), "built": self.world.built.copy()})),
            )
        )
        assert ours.status == fresh.status == "ok"
        for target in wanted:
            assert ours.values(target) == fresh.values(target)
        names = [target.name for target in wanted]
        assert ours.execution.fingerprint(names) == fresh.execution.fingerprint(names)

    # -- checks ----------------------------------------------------------------------------------------------

    def session_run(
        self,
        cache: Any,
        merchant: str,
        wanted: tuple[Any, ...],
        template: str,
        keys: Any,
        rows: int,
        world: shop.World | None = None,
        retry: Any = None,
    ) -> RunResult:
        context = self.context if world is None else shop.ShopContext(world, self.clock)
        session = Session(context, cache, engine="local", limits=Limits(batch_rows=rows))
        over = [target.over(keys) for target in wanted]
        standing = self.remembered() if retry in (None, "retryable") else set()
        asked = self.asked(standing)
        try:
            return session.run(
                *over,
                configs=configs_of(wanted, template),
                retry_errors=retry,
                merchant=merchant,
                market="US",
            )
        finally:
            assert self.asked(standing) == asked
            self.model.remembered = self.remembered()

    def asked(self, prompts: set[str]) -> dict[str, int]:
        """How often the model was asked."""
        world = self.world
        return {prompt: world.refused[prompt] + world.built["Answer", prompt] for prompt in prompts}

    def remembered(self) -> set[str]:
        """Prompts whose newest entry says that the model refused."""
        rows = self.cache.history("Answer").sort_by("recorded").to_pylist()
        newest = {json.loads(row["key"])[0]: row for row in rows}
        return {prompt for prompt, row in newest.items() if "the model refused" in (row["error"] or "")}

    def members(self, merchant: str, keys: Any) -> list[Any]:
        members = keys().build_one({"merchant": merchant, "market": "US"}, None, self.context)
        return [(merchant, "US", member) for member in members]

    def check_answers(self, result: Any, targets: tuple[Any, ...], keys: list[Any]) -> None:
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
        names = [target.name for target in targets]
        told = result.execution.fingerprint(names)
        answers = [
            sorted(result.execution.answers(name).drop(["ts"]).to_pylist(), key=repr) for name in names
        ]
        group = (*result.group.values(), *names)
        if group in self.told:
            assert (self.told[group][0] == told) == (self.told[group][1] == answers)
        self.told[group] = (told, answers)

    def check_get(self, builder: Any, key: Any, template: str, *, gather: bool = False) -> None:
        controller, configs = Controller(self.context, self.cache), configs_of((builder,), template)
        feature = controller.get(builder, key, configs, gather=gather)
        self.model.remembered = self.remembered()
        expected = self.model.answer(builder.name, key)
        assert (feature.status == "error") == (expected is shop.Failed)
        assert feature.value == (None if expected is shop.Failed else expected)

    def check_readers(
        self, targets: tuple[Any, ...], template: str, keys: list[Any], *, every_config: bool = True
    ) -> None:
        """What has an answer now is what is current, under its config and over all of them; null has no entry."""
        for target in targets:
            bindings = Bindings(self.context, configs_of((target,), template)).bind_all(Graph([target]))
            bound = bindings[target]
            texts = {key_json(key): self.model.answer(target.name, key) for key in keys}
            answers = {key: value for key, value in texts.items() if value is not shop.Failed}
            current = self.cache.current(target.name, bound.config_hash, list(texts))
            rows = self.cache.newest(target.name).to_pylist() if every_config else []
            newest = {row["key"]: [row["value"]] for row in rows}
            for key, value in answers.items():
                entries = [current[key].entry.value] if key in current else []
                for payloads in (entries, newest.get(key, []) if every_config else entries):
                    decoded = [None if p is None else bound.type.decode(p) for p in payloads]
                    assert decoded == [value] or (value is None and not decoded)

    def check_paid(self) -> None:
        for (name, text), times in self.world.built.items():
            assert name not in ("Answer", "Embed", "Mood") or times == 1, (
                f"{name} was built twice for {text!r}"
            )

    def remember_what_is_durable(self) -> None:
        """After a crash the model knows what was kept, as the next process does: what the cache has."""
        for name in ("Answer", "Embed", "Mood"):
            durable = {row["key"] for row in self.ok(name)}
            for built in [key for key in self.world.built if key[0] == name]:
                if key_json((built[1],)) not in durable:
                    del self.world.built[built]
        number = value_type(shop.Stock.value)
        by_inputs = {inputs_hash([number.hash(stock)]): stock for stock in STOCKS}
        self.model.stocks = {
            key: (row["ts"], number.decode(row["value"]) if row["value"] is not None else None)
            for key, row in self.by_key("Stock")
        }
        self.model.prices = {
            (key, by_inputs[row["inputs_hash"]]): (row["ts"], number.decode(row["value"]))
            for key, row in self.by_key("Price")
        }

    def ok(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.cache.history(name).sort_by("recorded").to_pylist()
        return [row for row in rows if row["status"] == "ok"]

    def by_key(self, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        return ((tuple(json.loads(row["key"])), row) for row in self.ok(name))


def configs_of(wanted: tuple[Any, ...], template: str) -> Any:
    below = {builder for target in wanted for builder in Graph([target])}
    return {shop.Prompt: {"template": template}} if shop.Prompt in below else None


class Mortal:
    """A cache whose process ends at an append: before it, between its entries and its traces, or after it."""

    def __init__(self, cache: Any, appends: int, where: Literal["before", "between", "after"]) -> None:
        self.cache, self.appends, self.where, self.dead = cache, appends, where, False

    def append(self, entries: Any = None, traces: Any = ()) -> None:
        with self._alive():
            self.appends -= 1
            self.dead = self.appends < 0
            if not self.dead or self.where != "before":
                self.cache.append(entries, () if self.dead and self.where == "between" else traces)
            if self.dead:
                raise shop.Crash

    @contextmanager
    def _alive(self) -> Iterator[None]:
        if self.dead:
            raise shop.Crash
        yield

    def __getattr__(self, name: str) -> Any:
        if self.dead:
            raise shop.Crash
        return getattr(self.cache, name)


class DeltaHistories(Histories):
    def make_cache(self) -> Any:
        self.folder = tempfile.TemporaryDirectory()
        return DeltaCache(self.folder.name)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=130 * LONG, stateful_step_count=20, derandomize=LONG == 1)
TestDeltaHistories = DeltaHistories.TestCase
TestDeltaHistories.settings = settings(max_examples=7 * LONG, stateful_step_count=10, derandomize=LONG == 1)
