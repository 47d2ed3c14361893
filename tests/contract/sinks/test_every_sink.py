"""What every sink promises, whatever it writes to."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.sinks import DeltaSink, Publication, PublishedState, RedisSink, Sink, read_recs

Publish = Callable[..., Publication]
Published = dict[str, list[str]]

PRODUCTS = ["1", "2", "3", "a:b", "a%3Ab", "é", "version", "x'y\\"]


@pytest.fixture
def read(sink: Sink, request: pytest.FixtureRequest) -> Callable[..., Published]:
    """`read(merchant, market)`: what a consumer finds for those of PRODUCTS that are published."""

    def from_delta(merchant: str = "abt", market: str = "US") -> Published:
        assert isinstance(sink, DeltaSink)
        found = QueryBuilder().register("t", DeltaTable(sink.path)).execute("SELECT * FROM t").read_all()
        rows = pa.table(found).to_pylist()
        here = [row for row in rows if (row["merchant"], row["market"]) == (merchant, market)]
        assert len({row["product_id"] for row in here}) == len(here)
        return {row["product_id"]: row["recs"] for row in here}

    def from_redis(merchant: str = "abt", market: str = "US") -> Published:
        assert isinstance(sink, RedisSink)
        client = request.getfixturevalue("client")
        found = {
            product: read_recs(client, product, merchant=merchant, market=market, publish=sink.publish_as)
            for product in PRODUCTS
        }
        return {product: recs for product, recs in found.items() if recs is not None}

    return from_delta if isinstance(sink, DeltaSink) else from_redis


Read = Callable[..., Published]


def test_nothing_is_published_at_first(sink: Sink) -> None:
    sink.check()
    assert sink.state("abt", "US") is None


def test_what_is_published_can_be_read(sink: Sink, publication: Publish, read: Read) -> None:
    recs = {product: ["9", "ü:8"] for product in PRODUCTS}
    result = sink.publish(publication("run-1", recs))
    assert read() == recs
    assert (result.sink, result.rows) == (sink.name, len(PRODUCTS))
    assert sink.state("abt", "US") == PublishedState("run-1", len(PRODUCTS), len(PRODUCTS))
    sink.check()


def test_a_new_result_replaces_the_old_one_whole(sink: Sink, publication: Publish, read: Read) -> None:
    sink.publish(publication("run-1", {"1": ["2"], "2": ["1"], "version": ["1"]}))
    sink.publish(publication("run-2", {"2": ["3"], "3": []}))
    assert read() == {"2": ["3"], "3": []}
    assert sink.state("abt", "US") == PublishedState("run-2", rows=2, covered=1)
    sink.publish(publication("run-3", {"version": ["2"]}))
    assert read() == {"version": ["2"]}


def test_other_merchants_and_markets_stay_as_they_are(sink: Sink, publication: Publish, read: Read) -> None:
    others = [("abt", "NO"), ("ABT", "US"), ("a'b\\", "US")]
    for number, (merchant, market) in enumerate(others):
        sink.publish(publication("run-1", {"1": [str(number)]}, merchant=merchant, market=market))
    sink.publish(publication("run-1", {"1": ["9"]}))
    sink.publish(publication("run-2", {"2": ["9"]}))
    sink.publish(publication("run-3", {}))
    for number, (merchant, market) in enumerate(others):
        assert read(merchant, market) == {"1": [str(number)]}
        assert sink.state(merchant, market) == PublishedState("run-1", 1, 1)
    assert read() == {}


def test_an_empty_result(sink: Sink, publication: Publish, read: Read) -> None:
    assert sink.publish(publication("run-1", {})).rows == 0
    assert sink.state("abt", "US") is None
    sink.publish(publication("run-2", {"1": ["2"]}))
    sink.publish(publication("run-3", {}))
    assert read() == {}
    assert sink.state("abt", "US") is None


def test_publishing_again_changes_nothing(sink: Sink, publication: Publish, read: Read) -> None:
    for _ in range(3):
        sink.publish(publication("run-1", {"1": ["2"], "2": []}))
        assert read() == {"1": ["2"], "2": []}
        assert sink.state("abt", "US") == PublishedState("run-1", 2, 1)
    sink.publish(publication("run-1", {"1": ["3"]}))
    assert read() == {"1": ["3"]}


def test_a_long_run_id_comes_back_whole(sink: Sink, publication: Publish) -> None:
    run_id = "run of 2026-01-01T00:00:00Z/" + "x" * 50
    sink.publish(publication(run_id, {"1": ["2"]}))
    assert sink.state("abt", "US") == PublishedState(run_id, 1, 1)
