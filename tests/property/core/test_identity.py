"""Hashes, keys and canonical bytes over generated values; results over generated layouts."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.fingerprint import digest, entry_id, group_hash, key_json, member_texts
from featurekit_spark.graph import Graph
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.fakes import MovingClock
from featurekit_spark.testing.parity import assert_parity
from featurekit_spark.values import value_type, vector
from tests import shop

TEXT = st.text()  # never a lone surrogate: those are no valid text
INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INSTANTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))
STRUCT = pa.struct([("a", pa.string()), ("b", pa.list_(pa.int64()))])
STRUCTS = st.fixed_dictionaries({"a": TEXT | st.none(), "b": st.lists(INTS | st.none()) | st.none()})

TYPES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (pa.string(), TEXT),
    (pa.int64(), INTS),
    (pa.float64(), FLOATS),
    (pa.bool_(), st.booleans()),
    (pa.binary(), st.binary()),
    (pa.date32(), st.dates()),
    (pa.timestamp("us", tz="UTC"), INSTANTS),
    (pa.decimal128(20, 4), st.decimals(-(10**15), 10**15, places=4)),
    (pa.list_(pa.string()), st.lists(TEXT | st.none())),
    (pa.list_(pa.float64()), st.lists(FLOATS | st.none())),
    (pa.list_(pa.date32()), st.lists(st.dates() | st.none())),
    (STRUCT, STRUCTS),
    (pa.list_(STRUCT), st.lists(STRUCTS | st.none())),
    (pa.map_(pa.string(), pa.int64()), st.dictionaries(TEXT, INTS | st.none())),
]
KEYS = st.lists(TEXT | st.integers() | st.booleans()).map(tuple)


@pytest.mark.parametrize(("spec", "values"), TYPES, ids=[str(spec) for spec, _ in TYPES])
def test_values_survive_their_bytes(spec: Any, values: st.SearchStrategy[Any]) -> None:
    kind = value_type(spec)

    @given(values)
    @settings(max_examples=60)
    def check(value: Any) -> None:
        checked = kind.checked(value)
        payload = kind.encode(checked)
        back = kind.decode(payload)
        assert kind.checked(back) == kind.checked(kind.decode(kind.encode(back)))
        assert kind.encode(kind.checked(back)) == payload
        assert kind.hash(kind.checked(back)) == kind.hash(checked, payload)
        assert pa.array([back], type=kind.arrow).equals(pa.array([back], type=kind.arrow))

    check()


@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=8))
def test_vectors_survive_their_bytes(numbers: list[float]) -> None:
    kind = value_type(vector())
    checked = kind.checked(numbers)
    assert np.array_equal(kind.decode(kind.encode(checked)), checked)
    assert kind.hash(kind.decode(kind.encode(checked))) == kind.hash(checked)


@given(TEXT, TEXT)
def test_equal_text_and_equal_hash_are_one_thing(one: str, other: str) -> None:
    kind = value_type(str)
    assert (kind.hash(one) == kind.hash(other)) == (one == other)


@given(KEYS)
def test_key_json_is_what_json_says(key: tuple[Any, ...]) -> None:
    assert key_json(key) == json.dumps(list(key), ensure_ascii=False, separators=(",", ":"))
    assert tuple(json.loads(key_json(key))) == key


@given(KEYS, KEYS)
def test_key_json_is_injective(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    same = [(type(a), a) for a in one] == [(type(b), b) for b in other]
    assert (key_json(one) == key_json(other)) == same


PARTS = st.text(st.characters(codec="utf-8"), max_size=5)


@given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4))
def test_digests_of_lists_do_not_collide(one: list[str], other: list[str]) -> None:
    assert (digest("k", *one) == digest("k", *other)) == (one == other)


PART = st.sampled_from(["a", "b", "aa"])
IDENTITIES = st.tuples(PART, PART, PART, PART)


@given(IDENTITIES, IDENTITIES)
def test_every_part_of_an_entrys_identity_counts(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    assert (entry_id(*one) == entry_id(*other)) == (one == other)


PAIRS = st.dictionaries(
    st.text(max_size=3).map(lambda t: key_json((t,))), st.sampled_from(["h1", "h2", "h3"])
)


@given(PAIRS, st.randoms(use_true_random=False))
def test_a_groups_hash_has_no_order(pairs: dict[str, str], shuffler: random.Random) -> None:
    rows = list(pairs.items())
    before = group_hash(rows)
    shuffler.shuffle(rows)
    assert group_hash(rows) == before


@given(PAIRS, PAIRS)
def test_a_groups_hash_sees_every_pair(one: dict[str, str], other: dict[str, str]) -> None:
    assert (group_hash(one.items()) == group_hash(other.items())) == (one == other)


# -- graphs --------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """For node i the nodes below it, of 0 .. i - 1."""
    size = draw(st.integers(1, 8))
    return [tuple(sorted(draw(st.sets(st.integers(0, i - 1))))) if i else () for i in range(size)]


def define(edges: list[tuple[int, ...]], shuffler: random.Random) -> type[FeatureBuilder[Any]]:
    made: list[type[FeatureBuilder[Any]]] = []
    for i, below in enumerate(edges):
        deps = [made[j] for j in below]
        shuffler.shuffle(deps)
        body = {"key": ("k",), "value": pa.string(), "deps": tuple(deps), "build_one": lambda *_: "x"}
        made.append(type(f"N{i}", (FeatureBuilder,), body))
    top = {"key": ("k",), "value": pa.string(), "deps": tuple(made), "build_one": lambda *_: "x"}
    return type("Top", (FeatureBuilder,), top)


@given(graphs(), st.randoms(use_true_random=False))
def test_order_is_topological_and_independent_of_how_deps_are_listed(
    edges: list[tuple[int, ...]], shuffler: random.Random
) -> None:
    order = [builder.name for builder in Graph([define(edges, random.Random(0))])]
    assert order == [builder.name for builder in Graph([define(edges, shuffler)])]
    assert sorted(order) == sorted([*(f"N{i}" for i in range(len(edges))), "Top"])
    for i, below in enumerate(edges):
        assert all(order.index(f"N{j}") < order.index(f"N{i}") for j in below)


@given(graphs())
def test_relations_are_each_others_inverse(edges: list[tuple[int, ...]]) -> None:
    graph = Graph([define(edges, random.Random(0))])
    for one in graph:
        for other in graph:
            if one is not other:
                assert (one in graph.consequences_of(other)) == (other in graph.needs_of(one))
        assert graph.needs_of(one)[-1] is one


# -- how a run is cut decides nothing ------------------------------------------------------------------------

PRODUCTS = st.dictionaries(
    st.tuples(
        st.just("abt"), st.just("US"), st.sampled_from(["p1", "p2", "p3", "acme", "\u00e9", "e\u0301"])
    ),
    st.builds(
        shop.Product,
        st.sampled_from(["red lamp", "sofa", "big red lamp", "", None]),
        st.sampled_from(["acme", "p1", None]),
        st.sampled_from([1, 5, None]),
    ),
)


def context(products: dict[Any, shop.Product], failing: set[str]) -> shop.ShopContext:
    members = [key[2] for key in products][::2]
    world = shop.World(
        products=products, featured={("abt", "US"): members}, slogans={"acme": "it works"}, failing=failing
    )
    return shop.ShopContext(world, MovingClock())


@given(PRODUCTS, st.sets(st.sampled_from(["sofa", "lamp", "hello: red lamp"])), st.integers(1, 7))
@settings(max_examples=25)
def test_keys_one_by_one_and_in_batches_agree(products: Any, failing: set[str], rows: int) -> None:
    for target in (shop.Logic, shop.Card):
        over = target.over(shop.ProductIds)
        # A context each way would do; one is enough, because nothing but its counters changes.
        assert_parity(over, context(products, failing), batch_rows=rows, merchant="abt", market="US")


@given(PRODUCTS, st.permutations([shop.Logic, shop.Card, shop.Label, shop.Price]))
@settings(max_examples=25)
def test_targets_together_or_apart_agree(products: Any, targets: list[Any]) -> None:
    own = context(products, set())
    over = [target.over(shop.ProductIds) for target in targets]
    together = Session(own, MemoryCache(), engine="local").run(*over, merchant="abt", market="US")
    cache = MemoryCache()
    for target, single in zip(targets, over, strict=True):
        session = Session(own, cache, engine="local", limits=Limits(batch_rows=2))
        alone = session.run(single, merchant="abt", market="US")
        assert alone.table(target).equals(together.table(target))


def test_dates_before_the_epoch() -> None:
    kind = value_type(pa.timestamp("us", tz="UTC"))
    early = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert kind.encode(early) == b"-1"
    assert kind.decode(b"-1") == early
    assert value_type(pa.date32()).decode(b"1969-12-31") == date(1969, 12, 31)
    assert math.isclose(value_type(pa.float64()).decode(b"1e-300"), 1e-300)


@given(group=st.tuples(st.text(), st.text()), members=st.lists(st.text() | st.integers()))
def test_texts_of_members_are_those_of_their_keys(group: tuple[str, str], members: list[Any]) -> None:
    assert member_texts(group, members) == [key_json((*group, member)) for member in members]
