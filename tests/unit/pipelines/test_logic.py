"""Compute, gate, publish: in which order, and what a failure in between leaves."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import Context, FeatureBuilder, MemoryCache, Session
from featurekit_spark.apps.product_recs import LLMLogic, ProductIds, SimilarProducts
from featurekit_spark.errors import (
    ContextError,
    DefinitionError,
    FeaturekitError,
    PublishGateError,
    ServiceError,
)
from featurekit_spark.pipelines.logic import Gate, LogicOutcome, run_logic
from featurekit_spark.sinks import Publication, PublishedState, SinkResult
from featurekit_spark.testing.fakes import CountingLLM, ProductDBFake


@dataclass
class ListSink:
    """Keeps publications in a list; raises `failure` instead where there is one."""

    name: str = "list"
    layout: str | None = "1"
    failure: FeaturekitError | None = None
    unreachable: FeaturekitError | None = None
    published: list[Publication] = field(default_factory=list)

    def check(self) -> None:
        if self.unreachable:
            raise self.unreachable

    def state(self, merchant: str, market: str) -> PublishedState | None:
        if not self.published:
            return None
        last = self.published[-1]
        return PublishedState(last.run_id, len(last.rows), sum(map(bool, last.rows["recs"].to_pylist())))

    def publish(self, publication: Publication) -> SinkResult:
        if self.failure:
            raise self.failure
        self.published.append(publication)
        return SinkResult(self.name, rows=len(publication.rows), seconds=0.0)


@dataclass
class Shop:
    titles: dict[str, str]
    llm: CountingLLM = field(default_factory=CountingLLM)
    cache: MemoryCache = field(default_factory=MemoryCache)

    def run(self, *sinks: ListSink, builders: tuple[Any, ...] = (LLMLogic,), **options: Any) -> LogicOutcome:
        products = ProductDBFake({product: {"title": title} for product, title in self.titles.items()})
        session = Session(Context(product_db=products, llm=self.llm), self.cache, engine="local")
        return run_logic(session, builders, ProductIds, merchant="m", market="K", sinks=sinks, **options)


@pytest.fixture
def shop() -> Shop:
    return Shop({"a": "red lamp", "b": "blue lamp", "c": "coffee cup", "d": "tea cup"})


def test_what_is_published(shop: Shop) -> None:
    sink = ListSink()
    outcome = shop.run(sink, builders=(SimilarProducts, LLMLogic), run_id="r1")
    [publication] = sink.published
    assert (publication.merchant, publication.market, publication.run_id) == ("m", "K", "r1")
    assert publication.logic_builders == ("SimilarProducts", "LLMLogic")
    assert publication.ts == outcome.result.ts
    rows = publication.rows.to_pylist()
    assert [(row["logic_builder"], row["product_id"]) for row in rows] == [
        (name, product) for name in ("SimilarProducts", "LLMLogic") for product in "abcd"
    ]
    assert rows[0]["recs"][0] == "b" and len(rows[0]["scores"]) == 3
    assert rows[-1]["recs"][0] == "c" and rows[-1]["scores"] is None
    assert outcome.sinks == {"list": {"status": "published", "rows": 8, "seconds": 0.0}}


def test_a_sink_that_is_up_to_date_is_left_alone(shop: Shop) -> None:
    sink = ListSink()
    first = shop.run(sink)
    outcome = shop.run(sink)
    held = {"status": "unchanged", "rows": 4, "run_id": first.result.run_id}
    assert outcome.sinks == {"list": held}
    assert outcome.result.unchanged and len(sink.published) == 1


def test_a_sink_that_is_up_to_date_is_written_to_on_request(shop: Shop) -> None:
    sink = ListSink()
    shop.run(sink)
    outcome = shop.run(sink, republish=True)
    assert outcome.result.unchanged and outcome.sinks["list"]["status"] == "published"
    first, again = (publication.rows for publication in sink.published)
    assert again.equals(first)
    assert shop.run(sink).sinks["list"]["status"] == "unchanged"


def test_a_sink_is_written_to_again_where_the_same_rows_would_not_stand_there(shop: Shop) -> None:
    sink = ListSink()
    shop.run(sink)
    sink.layout = "2"  # such as other key names
    shop.run(sink)
    sink.layout = None  # what was written expires
    shop.run(sink)
    assert len(sink.published) == 3
    other = Publication("m", "K", "somebody-else", sink.published[0].ts, ("L",), sink.published[0].rows)
    sink.layout = "2"
    shop.run(sink)
    sink.published.append(other)
    assert shop.run(sink).sinks["list"]["status"] == "published"


def test_a_change_of_one_answer_is_published_whole(shop: Shop) -> None:
    sink = ListSink()
    shop.run(sink)
    shop.titles["d"] = "green lamp"
    shop.run(sink)
    assert len(sink.published[1].rows) == 4
    assert shop.llm.calls["get recommendations for green lamp"] == 1
    assert max(shop.llm.calls.values()) == 1


def test_the_second_sink_fails(shop: Shop) -> None:
    first, second = ListSink("first"), ListSink("second", failure=ServiceError("down"))
    with pytest.raises(ServiceError, match="down"):
        shop.run(first, second)
    second.failure = None
    outcome = shop.run(first, second)
    assert [sink["status"] for sink in outcome.sinks.values()] == ["unchanged", "published"]
    assert sum(shop.llm.calls.values()) == 4


def test_an_unreachable_sink_stops_the_run_before_anything_is_paid(shop: Shop) -> None:
    with pytest.raises(ServiceError, match="down"):
        shop.run(ListSink(), ListSink("second", unreachable=ServiceError("down")))
    assert not shop.llm.calls


def test_the_gate_of_one_sink_stops_all(shop: Shop) -> None:
    full, fresh, computed = ListSink("full"), ListSink("fresh"), []
    shop.run(full)
    for product in "abc":
        del shop.titles[product]
    with pytest.raises(PublishGateError):
        shop.run(fresh, full, gate=Gate(max_row_drop=0.5), on_computed=computed.append)
    assert (len(full.published), len(fresh.published)) == (1, 0)
    assert [result.keys for result in computed] == [1]
    outcome = shop.run(fresh, full)
    assert [sink["rows"] for sink in outcome.sinks.values()] == [1, 1]
    assert outcome.result.builders["LLMLogic"].computed == 0


def test_a_failed_key_keeps_its_answer(shop: Shop) -> None:
    sink = ListSink()
    shop.run(sink)
    before = sink.published[0].rows.to_pylist()
    shop.titles["a"] = "yellow lamp"
    shop.llm.failures["get recommendations for yellow lamp"] = ValueError("no answer")
    outcome = shop.run(sink)
    assert outcome.result.status == "partial" and outcome.quality["kept"] == 1
    assert "LLMCompletion" in outcome.result.errors['["m","K","a"]']
    after = (sink.published or [])[-1].rows.to_pylist()
    assert after[0] == before[0]
    shop.llm.failures.clear()
    assert shop.run(sink).result.status == "ok"
    assert sum(shop.llm.calls.values()) == 6


def test_counts_of_the_data(shop: Shop) -> None:
    shop.titles["e"] = ""
    outcome = shop.run(ListSink(), quality=lambda: {"rows": 5})
    assert outcome.quality == {"rows": 5, "kept": 0, "without_recommendations": 1}


def test_counts_are_those_of_the_data_that_was_read(shop: Shop) -> None:
    sink = ListSink()
    shop.run(sink, quality=lambda: {"rows": 5})
    again = shop.run(sink, quality=lambda: {"rows": 6})  # a row that was dropped, say
    assert again.result.unchanged and again.quality["rows"] == 6


def test_no_products(shop: Shop) -> None:
    shop.titles.clear()
    sink = ListSink()
    outcome = shop.run(sink, builders=(LLMLogic, SimilarProducts))
    assert (outcome.result.status, len(sink.published[0].rows)) == ("ok", 0)
    assert sink.published[0].rows.schema.field("recs").type == pa.list_(pa.string())


class Bare(FeatureBuilder[list[int]]):
    key = ("merchant", "market", "product_id")
    value = pa.list_(pa.int64())

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[int]:
        return []


class Turned(FeatureBuilder[list[str]]):
    key = ("product_id", "merchant", "market")
    value = pa.list_(pa.string())

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("builder", "said"),
    [(Bare, "its value must be .*; found list<item: int64>"), (Turned, "its key must be")],
)
def test_what_is_no_logic_builder(shop: Shop, builder: Any, said: str) -> None:
    with pytest.raises(DefinitionError, match=f"{builder.name} is no logic builder.*{said}"):
        shop.run(ListSink(), builders=(builder,))


def test_a_context_that_cannot_travel_is_found_before_anything_runs() -> None:
    @dataclass
    class Locked(ProductDBFake):
        lock: Any = field(default_factory=threading.Lock)

    products, llm = Locked({"a": {"title": "red lamp"}}), CountingLLM()
    session = Session(Context(product_db=products, llm=llm), MemoryCache(), engine="spark")
    with pytest.raises(ContextError, match=r"context\.product_db \(.*Locked\) cannot travel"):
        run_logic(session, [LLMLogic], ProductIds, merchant="m", market="K", sinks=[])
    assert not products.requests and not llm.calls
