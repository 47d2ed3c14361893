"""Filters mean the same in every store, whatever is in them; an index ends as what was exported last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.errors import UsageError
from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.filters import And, Equals, Filter, In, Or, Range, checked_filter, matches
from featurekit_spark.search.index import IndexSpec, VectorIndex
from featurekit_spark.search.stores import FlatVectorIndex, LanceIndex, QdrantIndex
from featurekit_spark.search.stores.names import checked_name, name_from

SPEC = IndexSpec(4, "ip", {"t": "str", "i": "int", "f": "float", "b": "bool"})
ALPHABET = st.characters(codec="utf-8")
TEXTS = st.one_of(
    st.sampled_from(["a", "A", "é", "'", "a'b", '"', "\\", "%", "_", "\n", "🙂", "\0", ""]),
    st.text(ALPHABET, max_size=4),
)
INTS = st.one_of(st.integers(-3, 3), st.integers(-(2**53), 2**53))
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.1, -2.5]), st.floats(allow_nan=False, allow_infinity=False)
)
VALUES: dict[str, st.SearchStrategy[Any]] = {"t": TEXTS, "i": INTS, "f": FLOATS, "b": st.booleans()}
PAYLOADS = st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in VALUES.items()})


@st.composite
def conditions(draw: st.DrawFn) -> Filter:
    name = draw(st.sampled_from(sorted(VALUES)))
    values = VALUES[name]
    kind = draw(st.sampled_from(["equals", "in", "range"]))
    if kind == "in" or (kind == "range" and name == "b"):
        return In(name, draw(st.lists(values, max_size=3)))
    if kind == "range":
        sides = draw(st.sets(st.sampled_from(["gt", "gte", "lt", "lte"]), min_size=1, max_size=2))
        return Range(name, **{side: draw(values) for side in sorted(sides)})
    return Equals(name, draw(values))


def joined(parts: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    some = st.lists(parts, max_size=3)
    return some.map(lambda found: And(*found)) | some.map(lambda found: Or(*found))


FILTERS = st.recursive(conditions(), joined, max_leaves=5)


@pytest.fixture(params=["lancedb", "qdrant"], scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    with TemporaryDirectory() as folder:
        yield request.param, Path(folder)


def opened(store: tuple[str, Path]) -> VectorIndex:
    kind, folder = store
    return LanceIndex("p", SPEC, uri=folder) if kind == "lancedb" else QdrantIndex("p", SPEC, path=folder)


@settings(max_examples=25)
@given(st.lists(PAYLOADS, min_size=1, max_size=6), st.lists(FILTERS, min_size=4, max_size=8), st.data())
def test_a_store_finds_what_meets_the_filter(
    store: tuple[str, Path], payloads: list[dict[str, Any]], wanted: list[Filter], data: st.DataObject
) -> None:
    # Values that are there are the ones worth asking for.
    for payload in payloads:
        for name, value in payload.items():
            if value is not None:
                wanted.append(Equals(name, value))
                if name != "b":
                    wanted.append(Range(name, gte=value))
    index = opened(store)
    ids, vectors = (
        [f"{place}" for place in range(len(payloads))],
        np.eye(4, dtype=np.float32)[[0] * len(payloads)],
    )
    export_vectors(index, ids, vectors, payloads, in_place=1.0)
    for asked in wanted:
        checked = checked_filter(asked, SPEC.fields)
        expected = [
            name
            for name, payload in zip(ids, payloads, strict=True)
            if (checked if isinstance(checked, bool) else matches(checked, _stored(payload)))
        ]
        if store[0] == "qdrant" and "Range(field='t'" in repr(checked):
            with pytest.raises(UsageError, match="ranges of text"):
                index.search(vectors[:1], 10, filter=asked)
            continue
        found = index.search(vectors[:1], 10, filter=asked)[0]
        assert sorted(hit.id for hit in found) == expected, asked
        assert index.count(asked) == len(expected), asked
        for hit in found:
            assert hit.payload == {**dict.fromkeys(SPEC.fields), **_stored(payloads[int(hit.id)])}
    index.close()


def _stored(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: value + 0.0 if isinstance(value, float) else value for name, value in payload.items()}


NAMES = st.sampled_from([f"p{number}" for number in range(8)])
STATES = st.dictionaries(NAMES, st.tuples(st.integers(1, 5), st.none() | st.integers(0, 2)), max_size=8)


@settings(max_examples=60)
@given(st.lists(STATES, min_size=1, max_size=5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 5))
def test_an_index_ends_as_what_was_exported_last(
    states: list[dict[str, tuple[int, int | None]]], in_place: float, batch: int
) -> None:
    index = FlatVectorIndex(SPEC)
    for state in states:
        ids = list(state)
        vectors = np.array([[1, math.sqrt(n), n, 0] for n, _ in state.values()], np.float32).reshape(-1, 4)
        payloads = [{"i": number} for _, number in state.values()]
        done = export_vectors(index, ids, vectors, payloads, in_place=in_place, batch=batch)
        assert done.rows == len(state) == index.count()
        # A change sends what differs; a new generation resumes one of the same content that is there.
        assert done.sent + done.same == len(state)
        found = index.search(np.ones((1, 4)), 10)[0]
        assert {hit.id: hit.payload["i"] for hit in found} == {
            name: number for name, (_, number) in state.items()
        }
        again = export_vectors(index, ids[::-1], vectors[::-1], payloads[::-1], in_place=in_place)
        assert (again.how, again.content, again.sent) == ("unchanged", done.content, 0)
        assert len(index.store.generations()) <= 2


PARTS = st.text(st.sampled_from("ab2dé_-. "), min_size=1, max_size=5)
TEMPLATES = (
    "{merchant}-{market}",
    "{market}.{merchant}",
    "x_{merchant}_-_{market}_y",
    "a{merchant}b.c{market}",
)


@given(one=st.tuples(PARTS, PARTS), other=st.tuples(PARTS, PARTS), template=st.sampled_from(TEMPLATES))
def test_each_merchant_and_market_has_a_name_of_its_own(
    one: tuple[str, str], other: tuple[str, str], template: str
) -> None:
    names = [name_from(template, merchant=group[0], market=group[1]) for group in (one, other)]
    assert (names[0] == names[1]) == (one == other)
    assert [checked_name(name) for name in names] == names
