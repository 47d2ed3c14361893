"""What a run's record and today's builders have to say of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.changes import Change, ChangeKind, changed_builders
from featurekit_spark.graph import Graph
from featurekit_spark.session import Session
from tests import shop

TARGET = shop.Logic.over(shop.ProductIds)
ABT = {"merchant": "abt", "market": "US"}


@pytest.fixture
def session() -> Session:
    world = shop.World(products={("abt", "US", "p1"): shop.Product()})
    session = Session(shop.ShopContext(world), MemoryCache(), engine="local")
    session.run(TARGET, **ABT)
    return session


def changes(session: Session, *targets: Any, **kwargs: Any) -> list[Change]:
    graph = Graph([*targets, shop.ProductIds])
    bindings = Bindings(session.context, kwargs.pop("configs", None)).bind_all(graph)
    return changed_builders(graph, bindings, session.cache.last_run('["abt","US"]'), **kwargs)


@dataclass(frozen=True)
class Config:
    words: int = 3


def made(version: str = "1", value: Any = pa.string()) -> type[FeatureBuilder[Any]]:  # noqa: B008
    body = {"name": "Told", "key": shop.PRODUCT, "value": value, "version": version, "Config": Config}
    return type("Told", (FeatureBuilder,), {**body, "build_one": lambda *_: "1"})


def told(**kwargs: Any) -> Session:
    session = Session(shop.ShopContext(shop.World()), MemoryCache(), engine="local")
    session.run(made().over(shop.ProductIds), **ABT)
    return session


def test_nothing_changed(session: Session) -> None:
    assert changes(session, shop.Logic) == []


def test_without_a_record_nothing_is_known(session: Session) -> None:
    graph = Graph([shop.Logic])
    assert changed_builders(graph, Bindings(session.context).bind_all(graph), None) == []


def test_code() -> None:
    (change,) = changes(told(), made("2"))
    assert (change.builder, change.kinds, change.adoptable) == ("Told", (ChangeKind.CODE,), True)
    assert (change.version_before, change.version_after) == ("1", "2")
    assert change.before != change.after
    assert str(change) == "Told: its code changed (version '1' to '2')"


def test_code_that_was_adopted() -> None:
    (change,) = changes(told(), made("2"))
    assert change.after is not None
    (again,) = changes(told(), made("2"), adopted={change.after})
    assert again.adopted and not again.adoptable
    assert str(again).endswith("its entries were adopted")


def test_config() -> None:
    (change,) = changes(told(), made(), configs={"Told": {"words": 4}})
    assert (change.kinds, change.adoptable) == ((ChangeKind.CONFIG,), False)
    assert str(change) == "Told: its config changed from Config(words=3) to Config(words=4)"


def test_several_at_once() -> None:
    (change,) = changes(told(), made("2", pa.int64()), configs={"Told": {"words": 4}})
    assert change.kinds == (ChangeKind.CODE, ChangeKind.CONFIG, ChangeKind.TYPE)
    assert not change.adoptable
    assert "its values are int64 and were string" in str(change)


def test_type() -> None:
    (change,) = changes(told(), made("1", pa.int64()))
    assert change.kinds == (ChangeKind.TYPE,)


def test_new_and_gone(session: Session) -> None:
    found = changes(session, shop.Label)
    assert {change.builder: change.kinds for change in found if change.kinds[0] is ChangeKind.NEW} == {
        "Label": (ChangeKind.NEW,)
    }
    gone = [change.builder for change in found if change.kinds == (ChangeKind.GONE,)]
    assert gone == sorted(gone) and {"Logic", "Matrix", "Answer"} <= set(gone)
    assert "Title" not in {change.builder for change in found}
    assert str(found[0]) == "Label: was not in the last run"


def test_a_ttl_is_no_identity() -> None:
    from featurekit_spark.freshness import Freshness

    other = made()
    other.freshness = Freshness(ttl="1h")
    assert changes(told(), other) == []
