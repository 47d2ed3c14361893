"""A small shop whose graph has one of everything, and what its features must be, written down plainly.

`World` is what the sources read and a test edits. `Model` says what a run must answer, without a cache, a
graph or a trace; only what a ttl keeps is remembered, because there an old answer is the right one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, Gathered, KeySet, Metered, Source, Update, each
from featurekit_spark.errors import BuildError
from featurekit_spark.freshness import Freshness
from featurekit_spark.testing.fakes import MovingClock

GROUP = ("merchant", "market")
PRODUCT = (*GROUP, "product_id")
TOP = 2


@dataclass
class Product:
    title: str | None = "red lamp"
    brand: str | None = "acme"
    stock: int | None = 1


@dataclass
class World:
    products: dict[tuple[str, str, str], Product] = field(default_factory=dict)
    featured: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    slogans: dict[str, str] = field(default_factory=dict)
    greetings: dict[str, str] = field(default_factory=dict)
    rate: int = 1
    failing: set[str] = field(default_factory=set)  # texts and prompts on which builders fail, for now
    refusing: set[str] = field(default_factory=set)  # prompts that the model refuses, for now
    refused: Counter[str] = field(default_factory=Counter)  # how often it did
    broken: set[tuple[str, str, str]] = field(
        default_factory=set
    )  # products whose title cannot be read, for now
    built: Counter[tuple[str, Any]] = field(default_factory=Counter)  # successful builds
    version: int | None = None  # of all sources together; None: they have none
    crash_in: int | None = None  # the process ends at so many builds from now

    def done(self, builder: FeatureBuilder[Any], key: Any) -> None:
        self.built[builder.name, key] += 1
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                raise Crash


class Crash(BaseException):
    """The process ends here; no `except Exception` may swallow it."""


@dataclass(frozen=True)
class ShopContext:
    world: World
    clock: Callable[[], datetime] = field(default_factory=MovingClock)


# -- sources -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """All of a group at once: a column `member`, and `value` where it is not the members that are asked for."""

    table: pa.Table
    bytes: int = 1

    def to_arrow(self) -> pa.Table:
        return self.table

    def to_spark(self, session: Any) -> Any:
        return session.createDataFrame(self.table)


class Versioned:
    """What all sources say of their version, if the world has one."""

    def snapshot_version(self, context: Any) -> str | None:
        version: int | None = context.world.version
        return None if version is None else str(version)


class ProductIds(Versioned, KeySet):
    key, of, value, needs = GROUP, "product_id", pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        group = (inputs["merchant"], inputs["market"])
        return [product_id for *prefix, product_id in context.world.products if tuple(prefix) == group]

    def scan(self, group: dict[str, Any], config: Any, context: Any) -> Scan:
        return Scan(pa.table({"member": pa.array(self.build_one(group, config, context), pa.string())}))


class Featured(Versioned, KeySet):
    """A second set of keys; may name products that do not exist."""

    key, of, value, needs = GROUP, "product_id", pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        return list(context.world.featured.get((inputs["merchant"], inputs["market"]), []))

    def scan(self, group: dict[str, Any], config: Any, context: Any) -> Scan:
        return Scan(pa.table({"member": pa.array(self.build_one(group, config, context), pa.string())}))


def _product(inputs: dict[str, Any], context: Any) -> Product:
    key = tuple(inputs[field] for field in PRODUCT)
    if key in context.world.broken:
        raise OSError("the disk is on fire")
    product: Product = context.world.products.get(key, Product(None, None, None))
    return product


class Title(Versioned, Source[str]):
    key, value, needs = PRODUCT, pa.string(), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str | None:
        return _product(inputs, context).title


class Brand(Versioned, Source[str]):
    """Read by a scan of the whole group where a run wants all of it."""

    key, value, needs = PRODUCT, pa.string(), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str | None:
        product: Product = context.world.products.get(
            tuple(inputs[f] for f in PRODUCT), Product(None, None, None)
        )
        return product.brand

    def scan(self, group: dict[str, Any], config: Any, context: Any) -> Scan:
        brands = {
            key[2]: product.brand
            for key, product in context.world.products.items()
            if key[:2] == tuple(group.values())
        }
        values = pa.array(brands.values(), pa.string())
        return Scan(pa.table({"member": pa.array(brands, pa.string()), "value": values}))


class Stock(Versioned, Source[int]):
    """Read again only after an hour."""

    key, value, needs, freshness = PRODUCT, pa.int64(), ("world",), Freshness(ttl="1h")

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> int | None:
        product: Product = context.world.products.get(
            tuple(inputs[f] for f in PRODUCT), Product(None, None, None)
        )
        return product.stock


class Slogan(Versioned, Source[str]):
    """Reached by a value: which brands are asked for is known only once the brand was read."""

    key, value, needs = ("brand",), pa.string(), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str | None:
        slogan: str | None = context.world.slogans.get(inputs["brand"])
        return slogan


class Greeting(Versioned, Source[str]):
    key, value, needs = ("merchant",), pa.string(), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        greeting: str = context.world.greetings.get(inputs["merchant"], "hello")
        return greeting


# -- features ------------------------------------------------------------------------------------------------


def embedding(text: str) -> list[int]:
    return [len(text), sum(letter in "aeiou" for letter in text)]


class Embed(FeatureBuilder[list[int]]):
    """Content-keyed, in batches, and failing for some texts."""

    key, value, needs = ("text",), pa.list_(pa.int64()), ("world",)

    def build(self, inputs: Any, config: Any, context: Any) -> list[list[int]]:
        bad = context.world.failing & set(inputs["text"])
        if bad:
            raise ValueError(f"cannot embed {sorted(bad)}")
        for text in inputs["text"]:
            context.world.done(self, text)
        return [embedding(text) for text in inputs["text"]]


class Prompt(FeatureBuilder[str]):
    key, deps, value = PRODUCT, (Title, Greeting), pa.string()

    @dataclass(frozen=True)
    class Config:
        template: str = "{greeting}: {title}"

    def build_one(self, inputs: dict[str, Any], config: Config, context: Any) -> str:
        return config.template.format(greeting=inputs["Greeting"], title=inputs["Title"])


class Answer(FeatureBuilder[str]):
    """Paid for by the prompt."""

    key, value, needs, paid = ("prompt",), pa.string(), ("world",), True

    async def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> Metered[str]:
        if inputs["prompt"] in context.world.failing:
            raise TimeoutError("no answer")
        if inputs["prompt"] in context.world.refusing:
            context.world.refused[inputs["prompt"]] += 1
            raise BuildError("the model refused").with_cost(2, 0.25)
        context.world.done(self, inputs["prompt"])
        return Metered(inputs["prompt"].upper(), tokens=3, usd=0.5)


class Suggestions(FeatureBuilder[list[str]]):
    key, deps, value, needs = PRODUCT, (Answer.on(prompt=Prompt),), pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        context.world.done(self, tuple(inputs.values()))
        return suggestions(inputs["Answer"])


def suggestions(answer: str) -> list[str]:
    """Nothing, one text or several, some twice."""
    return answer.lower().split()[1:]


class Matrix(FeatureBuilder[list[str]]):
    """A group-level feature over everything."""

    key, deps = GROUP, (Embed.on(text=Title).over(ProductIds),)
    value, needs = pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        gathered: Gathered[list[int]] = inputs["Embed"]
        rows = [f"{k}|{v[0]}|{v[1]}" for k, v in zip(gathered.keys, gathered.values, strict=True) if v]
        context.world.done(self, (inputs["merchant"], *rows, *gathered.failed))
        return [*rows, f"failed {len(gathered.failed)}"]


def nearest(matrix: list[str], vector: list[int]) -> list[str]:
    rows = [row.split("|") for row in matrix[:-1]]
    near = sorted(rows, key=lambda row: (abs(int(row[1]) - vector[0]) + abs(int(row[2]) - vector[1]), row[0]))
    return [row[0] for row in near[:TOP]]


class Search(FeatureBuilder[list[str]]):
    """Follows the matrix: a list that lost nobody only has to look at who is new."""

    key, deps, follows = (*GROUP, "text"), (Matrix, Embed), Matrix
    value, needs = pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        context.world.done(self, (inputs["merchant"], inputs["text"], *inputs["Matrix"]))
        return nearest(inputs["Matrix"], inputs["Embed"])

    def update(self, inputs: Any, before: Any, config: Any, context: Any) -> list[Any]:
        found = []
        for now, then, vector, old in zip(
            inputs["Matrix"], before["Matrix"], inputs["Embed"], before["value"], strict=True
        ):
            kept = [row for row in now if row in then and row.split("|")[0] in old]
            fresh = [row for row in now[:-1] if row not in then]
            merged = nearest([*kept, *fresh, now[-1]], vector)
            found.append(Update.REBUILD if len(kept) < len(old) else Update.KEEP if merged == old else merged)
        for merchant, text, matrix, value in zip(
            inputs["merchant"], inputs["text"], inputs["Matrix"], found, strict=True
        ):
            if value is not Update.REBUILD:
                context.world.done(self, (merchant, text, *matrix))
        return found


class Logic(FeatureBuilder[str]):
    """Fan-out over a list, a source reached by a value, a gather far below."""

    key, value, needs = PRODUCT, pa.string(), ("world",)
    deps = (
        Search.on(text=each(Suggestions)),
        Slogan.on(brand=Brand),
        Title.on(product_id=Brand).named("namesake"),
        Brand.on(product_id=Brand).named("house"),
    )
    accepts_null = True

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        context.world.done(self, repr(inputs))
        return logic(inputs["Search"], inputs["Slogan"], inputs["namesake"], inputs["house"])


def logic(found: list[list[str]] | None, slogan: str | None, namesake: str | None, house: str | None) -> str:
    return f"{found} {slogan} {namesake} {house}"


class Price(FeatureBuilder[int]):
    """Its rate is outside its identity, so that only its ttl lets it change."""

    key, deps, value, needs = PRODUCT, (Stock,), pa.int64(), ("world",)
    freshness = Freshness(ttl="2h")

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> int:
        price: int = inputs["Stock"] * context.world.rate
        return price


class Shelf(FeatureBuilder[str]):
    """Gathers over the other key set, things with a ttl among them, and reads one for the group."""

    key, value = GROUP, pa.string()
    deps = (Title.over(Featured), Price.over(Featured), Greeting)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        titles, prices = inputs["Title"], inputs["Price"]
        named = dict(zip(titles.keys, titles.values, strict=True))
        return shelf(named, prices.values, titles.failed, inputs["Greeting"])


def shelf(titles: dict[str, str | None], prices: Any, failed: Any, greeting: str) -> str:
    return f"{greeting} {titles} {list(prices)} {list(failed)}"


class Loud(FeatureBuilder[str]):
    """Cheaper to make than to look up."""

    key, deps, value, inline = PRODUCT, (Title,), pa.string(), True

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return str(inputs["Title"]) + "!"


class ByHand(FeatureBuilder[str]):
    """A hand-written get, whose reads depend on what it read before."""

    key, value = PRODUCT, pa.string()

    def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
        title = controller.get(Title, key).require()
        brand = controller.get(Brand, key).require()
        if title is not None and len(title) % 2 and brand is not None:
            title += f" by {brand}, {controller.get(Slogan, (brand,)).require()}"
        context.world.done(self, (key, title))
        return self.hashed(title)


class Card(FeatureBuilder[str]):
    key, value, accepts_null = PRODUCT, pa.string(), True
    deps = (Title, Price, Shelf, ByHand, Loud)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return card(inputs["Title"], inputs["Price"], inputs["Shelf"], inputs["ByHand"])


def card(title: str | None, price: int | None, on_shelf: str, by_hand: str | None) -> str:
    return f"{title} {price} [{on_shelf}] {by_hand} {'-' if title is None else title + '!'}"


class Label(FeatureBuilder[str]):
    """A target without any gather."""

    key, deps, value = PRODUCT, (Prompt, Slogan.on(brand=Brand)), pa.string()

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return f"{inputs['Prompt']} / {inputs['Slogan']}"


class Mood(FeatureBuilder[str]):
    """Content-keyed, with a stand-in for what fails."""

    key, value, needs, freshness = ("text",), pa.string(), ("world",), Freshness(fallback="calm")

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        if inputs["text"] in context.world.failing:
            raise ValueError("no mood today")
        context.world.done(self, inputs["text"])
        return mood(inputs["text"])


def mood(text: str) -> str:
    return "loud" if len(text) % 2 else "shy"


class Banner(FeatureBuilder[str]):
    """A hand-written get as a target; what it reads may be a stand-in, until there is the real thing."""

    key, value = PRODUCT, pa.string()

    def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
        title = controller.get(Title, key).require()
        feeling = None if title is None else controller.get(Mood, (title,)).value
        context.world.done(self, (key, title, feeling))
        return self.hashed(None if title is None else f"{title}, {feeling}")


# -- what must come out --------------------------------------------------------------------------------------


class Failed(Exception):
    """The model's word for a key that has no answer."""


@dataclass
class Model:
    """What each target must be now, straight from the world."""

    world: World
    clock: MovingClock
    stocks: dict[Any, tuple[datetime, int | None]] = field(default_factory=dict)
    prices: dict[Any, tuple[datetime, int]] = field(default_factory=dict)
    template: str = "{greeting}: {title}"
    remembered: set[str] = field(default_factory=set)  # prompts that are known to be refused

    def answer(self, target: str, key: tuple[str, str, str]) -> Any:
        """The value, or `Failed` as a value."""
        try:
            return getattr(self, target.lower())(key)
        except Failed:
            return Failed

    def read_sources(self, keys: list[Any], group: Any) -> None:
        """A run reads its sources before it knows whether any key needs them."""
        for key in [*keys, *((*group, member) for member in self.world.featured.get(group, []))]:
            self.stock(key)

    def product(self, key: Any) -> Product:
        if key in self.world.broken:
            raise Failed
        return self.world.products.get(key, Product(None, None, None))

    def brand(self, key: Any) -> str | None:
        return self.world.products.get(key, Product(None, None, None)).brand

    def slogan(self, brand: str | None) -> str | None:
        return None if brand is None else self.world.slogans.get(brand)

    def fails(self, builder: str, text: str) -> bool:
        """What was built once is kept, whether or not it could be built today."""
        refused = builder == "Answer" and text in self.world.refusing | self.remembered
        return (text in self.world.failing or refused) and not self.world.built[builder, text]

    def embed(self, text: str) -> list[int]:
        if self.fails("Embed", text):
            raise Failed
        return embedding(text)

    def prompt(self, key: Any) -> str | None:
        title = self.product(key).title
        greeting = self.world.greetings.get(key[0], "hello")
        return None if title is None else self.template.format(greeting=greeting, title=title)

    def matrix(self, group: Any) -> list[str]:
        made, failed = [], 0
        for key in sorted(self.world.products):
            if key[:2] == group:
                try:
                    title = self.product(key).title
                    if title is not None:
                        length, vowels = self.embed(title)
                        made.append(f"{key[2]}|{length}|{vowels}")
                except Failed:
                    failed += 1
        return [*made, f"failed {failed}"]

    def logic(self, key: Any) -> str:
        brand, prompt = self.brand(key), self.prompt(key)
        found = None
        if prompt is not None:
            if self.fails("Answer", prompt):
                raise Failed
            matrix = self.matrix(key[:2])
            found = [nearest(matrix, self.embed(text)) for text in suggestions(prompt.upper())]
        namesake = None if brand is None else self.product((*key[:2], brand)).title
        house = None if brand is None else self.brand((*key[:2], brand))
        return logic(found, self.slogan(brand), namesake, house)

    def stock(self, key: Any) -> int | None:
        now = self.clock()
        if key not in self.stocks or now >= self.stocks[key][0] + timedelta(hours=1):
            product = self.world.products.get(key, Product(None, None, None))
            self.stocks[key] = (now, product.stock)
        return self.stocks[key][1]

    def price(self, key: Any) -> int | None:
        now, stock = self.clock(), self.stock(key)
        if stock is None:
            return None
        known = self.prices.get((key, stock))
        if known is None or now >= known[0] + timedelta(hours=2):
            known = self.prices[key, stock] = (now, stock * self.world.rate)
        return known[1]

    def shelf(self, group: Any) -> str:
        titles, prices, failed = {}, [], []
        for member in sorted(self.world.featured.get(group, [])):
            prices.append(self.price((*group, member)))
            try:
                titles[member] = self.product((*group, member)).title
            except Failed:
                failed.append(member)
        return shelf(titles, prices, failed, self.world.greetings.get(group[0], "hello"))

    def byhand(self, key: Any) -> str | None:
        product = self.product(key)
        title, brand = product.title, self.brand(key)
        if title is not None and len(title) % 2 and brand is not None:
            title += f" by {brand}, {self.slogan(brand)}"
        return title

    def card(self, key: Any) -> str:
        on_shelf, price = self.shelf(key[:2]), self.price(key)
        return card(self.product(key).title, price, on_shelf, self.byhand(key))

    def mood(self, key: tuple[str]) -> str:
        return "calm" if self.fails("Mood", key[0]) else mood(key[0])

    def banner(self, key: Any) -> str | None:
        title = self.product(key).title
        return None if title is None else f"{title}, {self.mood((title,))}"

    def label(self, key: Any) -> str | None:
        prompt, slogan = self.prompt(key), self.slogan(self.brand(key))
        return None if prompt is None or slogan is None else f"{prompt} / {slogan}"
