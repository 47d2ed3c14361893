"""What a wrongly declared builder says when it is defined, and how keys and configs are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import (
    ContextView,
    FeatureBuilder,
    KeySet,
    Source,
    bind,
    each,
    import_path,
    load_builder,
    parse_key,
)
from featurekit_spark.errors import ContextError, DefinitionError, UsageError
from featurekit_spark.graph import Graph
from tests import shop


def build_one(self: Any, inputs: Any, config: Any, context: Any) -> str:
    return "x"


GOOD: dict[str, Any] = {"key": ("a",), "value": pa.string(), "build_one": build_one}


def define(*bases: type, **attributes: Any) -> type[FeatureBuilder[Any]]:
    return type("Broken", bases or (FeatureBuilder,), {**GOOD, **attributes})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"key": "a"}, "key must be a tuple of field names, found 'a'"),
        ({"key": ["a"]}, "key must be a tuple of field names, found ['a']"),
        ({"key": ("a b",)}, "key must be a tuple of field names, found ('a b',)"),
        ({"key": ("a", "a")}, "key ('a', 'a') names a field twice"),
        ({"value": None}, "declare the value's type, such as value = pa.string()"),
        ({"value": dict}, "has no canonical bytes. Two ways out"),
        ({"deps": shop.Title}, "deps must be a tuple"),
        ({"deps": (7,)}, "7 is no feature: deps are FeatureBuilder classes"),
        (
            {"build_one": FeatureBuilder.build_one},
            "define exactly one of build, build_one or get; found none",
        ),
        ({"build": build_one}, "define exactly one of build, build_one or get; found build and build_one"),
        (
            {"deps": (shop.Title, shop.Title)},
            "two inputs are called 'Title'; give one a name with .named('...')",
        ),
        ({"key": ("Title",), "deps": (shop.Title,)}, "two inputs are called 'Title'"),
        (
            {"name": "Gr\u00f6\u00dfe"},
            "its name 'Gr\u00f6\u00dfe' is a folder of the cache; use ASCII letters",
        ),
        ({"name": "\u0661"}, "use ASCII letters, digits"),
        ({"name": "a/b"}, "its name 'a/b' is a folder of the cache"),
        ({"name": "it's"}, "as in name = 'Price'"),
        ({"name": "Title\n"}, "its name 'Title\\n' is a folder"),
        ({"name": ".."}, "its name '..' is a folder"),
        ({"name": ""}, "its name '' is a folder"),
    ],
)
def test_definition_errors(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as error:
        define(**attributes)
    assert message in str(error.value)


def test_names_that_every_writer_spells_alike() -> None:
    for name in ("Title", "title-v2.en", "_t", "9"):
        assert define(name=name).name == name
    with pytest.raises(DefinitionError, match="its name 'Gr\u00f6\u00dfe' is a folder"):

        class Größe(FeatureBuilder[str]):
            key, value, build_one = ("a",), pa.string(), build_one


def test_a_paid_builder_works_key_by_key() -> None:
    def build(self: Any, inputs: Any, config: Any, context: Any) -> list[str]:
        return []

    with pytest.raises(DefinitionError, match="a paid builder defines build_one, so that a failed call"):
        define(paid=True, build=build, build_one=FeatureBuilder.build_one)


def test_a_key_set_says_what_it_expands() -> None:
    with pytest.raises(DefinitionError, match="says which field it expands: of = 'product_id'"):
        define(KeySet)


def test_dep_errors() -> None:
    with pytest.raises(DefinitionError, match=r"Search.on\(txt=...\): its key has no field 'txt'.*'text'"):
        shop.Search.on(txt=shop.Title)
    with pytest.raises(DefinitionError, match="a KeySet class is needed"):
        shop.Title.over(shop.Title)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="only one field can fan out"):
        shop.Search.on(text=each(shop.Suggestions), market=each(shop.Suggestions))


def test_deps_print_as_they_are_written() -> None:
    dep = shop.Search.on(text=each(shop.Suggestions)).over(shop.ProductIds)
    assert str(dep) == "Search.on(text=each(Suggestions)).over(ProductIds)"
    assert shop.Title.named("x").name == "x"
    assert dep.fans_out
    assert not shop.Slogan.on(brand=shop.Brand).fans_out


@pytest.mark.parametrize(
    "key",
    [("abt", "US", "p1"), ["abt", "US", "p1"], {"product_id": "p1", "market": "US", "merchant": "abt"}],
)
def test_keys_by_tuple_or_by_name(key: Any) -> None:
    assert parse_key(shop.Title, key) == ("abt", "US", "p1")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            ("abt", "US"),
            "Title has the key fields ('merchant', 'market', 'product_id') (3), found 2: ('abt', 'US')",
        ),
        ("abt", "a key of Title is a tuple ('merchant', 'market', 'product_id'), found 'abt'"),
        (7, "is a tuple ('merchant', 'market', 'product_id'), found 7"),
        (
            {"merchant": "abt"},
            "Title has the key fields ('merchant', 'market', 'product_id'), found ('merchant',)",
        ),
        (("abt", "US", "\ud800"), "is no valid text"),
    ],
)
def test_a_wrong_key_shows_the_fields(key: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_key(shop.Title, key)
    assert message in str(error.value)


def test_names_and_paths() -> None:
    assert shop.Title.name == "Title"
    assert define(name="Other").name == "Other"
    assert load_builder(import_path(shop.Title)) is shop.Title
    with pytest.raises(UsageError, match="names no builder .* write it as package.module:Class"):
        load_builder("no.such.module:Thing")
    with pytest.raises(UsageError, match="is a type, not a FeatureBuilder class"):
        load_builder("tests.shop:World")


def test_a_subclass_of_a_named_builder_has_a_name_of_its_own() -> None:
    parent = define(name="Parent")
    assert type("Child", (parent,), {}).name == "Child"


# -- configs -------------------------------------------------------------------------------------------------


class Sized(FeatureBuilder[str]):
    key, value = ("a",), pa.string()

    @dataclass(frozen=True)
    class Config:
        size: int = 1
        colour: str = "red"

    def default_config(self, context: Any) -> Config:
        return self.Config(colour=context)

    def build_one(self, inputs: Any, config: Config, context: Any) -> str:
        return config.colour * config.size


def test_configs_by_class_by_name_and_by_field() -> None:
    default = bind(Sized, "blue")
    assert default.config == Sized.Config(1, "blue")
    assert bind(Sized, "blue", {Sized: Sized.Config(2)}).config == Sized.Config(2, "red")
    assert bind(Sized, "blue", {"Sized": {"size": 3}}).config == Sized.Config(3, "blue")
    assert bind(Sized, "blue", {Sized: {}}).config_hash == default.config_hash
    assert bind(Sized, "blue", {Sized: {"size": 3}}).config_hash != default.config_hash


def test_config_errors() -> None:
    with pytest.raises(UsageError, match="config of Sized has no field 'sise'. .*Did you mean 'size'"):
        bind(Sized, "blue", {Sized: {"sise": 3}})
    with pytest.raises(DefinitionError, match="a config is an instance of a frozen dataclass, found 7"):
        bind(Sized, "blue", {Sized: 7})


def test_a_version_stands_for_the_code() -> None:
    one, two = define(version="1"), define(version="1", build_one=lambda self, i, c, x: "y")
    assert bind(one, None).config_hash == bind(two, None).config_hash
    assert bind(define(version="2"), None).config_hash != bind(one, None).config_hash


# -- the context ---------------------------------------------------------------------------------------------


def test_a_builder_sees_what_it_declares() -> None:
    view = ContextView("Title", shop.ShopContext(shop.World()), ("world", "absent"))
    assert isinstance(view.world, shop.World)
    with pytest.raises(
        ContextError, match=r"Title reads context.clock, which it does not declare; add it: needs = "
    ):
        _ = view.clock
    with pytest.raises(ContextError, match="needs context.absent, but the ShopContext has none"):
        _ = view.absent


# -- graphs --------------------------------------------------------------------------------------------------


def node(
    name: str, *deps: Any, key: tuple[str, ...] = ("a",), **attributes: Any
) -> type[FeatureBuilder[Any]]:
    return type(name, (FeatureBuilder,), {**GOOD, "key": key, "deps": deps, **attributes})


def test_order_is_deps_first_and_the_same_every_time() -> None:
    a, b = node("A"), node("B")
    c = node("C", b, a)
    d = node("D", c, a)
    assert [n.name for n in Graph([d])] == ["A", "B", "C", "D"]
    graph = Graph([d])
    assert [n.name for n in graph.inputs_of(d)] == ["A", "C"]
    assert [n.name for n in graph.consequences_of(b)] == ["C", "D"]
    assert [n.name for n in graph.needs_of(c)] == ["A", "B", "C"]
    assert graph["C"] is c


def test_deps_of_every_kind_are_in_the_graph() -> None:
    names = {builder.name for builder in Graph([shop.Logic])}
    assert names >= {
        "ProductIds",
        "Title",
        "Embed",
        "Matrix",
        "Search",
        "Answer",
        "Prompt",
        "Slogan",
        "Brand",
    }


def test_a_cycle_is_drawn() -> None:
    a, b = node("A"), node("B")
    c = node("C", a, b)
    a.deps = (c,)
    with pytest.raises(DefinitionError, match="deps lead in a circle: C -> A -> C. Break it"):
        Graph([c])
    a.deps = (a,)
    with pytest.raises(DefinitionError, match="circle: A -> A"):
        Graph([a])


def test_names_are_unique_in_a_graph() -> None:
    with pytest.raises(DefinitionError, match="two builders are called 'A': .*; give one another name"):
        Graph([node("C", node("A"), node("B", node("A", value=pa.int64())))])


def test_an_unknown_name_lists_those_that_exist() -> None:
    with pytest.raises(
        DefinitionError, match="no builder 'Tytle' in this graph. Known: .*Did you mean 'Title'"
    ):
        _ = Graph([shop.Prompt])["Tytle"]


def test_a_key_field_from_nowhere() -> None:
    with pytest.raises(DefinitionError) as error:
        Graph([node("Top", shop.Title)])
    assert "Top reads Title, whose key field 'merchant' comes from nowhere: Top has the key ('a',)" in str(
        error.value
    )
    assert "Title.on(merchant=SomeBuilder), or gather it: Title.over(SomeKeySet)" in str(error.value)


def test_a_gather_needs_the_groups_fields() -> None:
    with pytest.raises(DefinitionError, match="its key .* lacks .*'market'.* of the key set's group"):
        Graph([node("Top", shop.Title.over(shop.ProductIds), key=("merchant",))])


def test_a_source_has_no_deps() -> None:
    source = type("Src", (Source,), {**GOOD, "deps": (node("A"),)})
    with pytest.raises(
        DefinitionError, match="Src is a Source and has deps; put what it derives into a builder"
    ):
        Graph([source])
