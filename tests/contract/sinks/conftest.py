"""Sinks to run the same behaviour suite over, and the real Redis server that two of them need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
import redis

from featurekit_spark.errors import ConfigError
from featurekit_spark.sinks import DeltaSink, Publication, RedisSink, Sink
from featurekit_spark.testing.redis import redis_server

Publish = Callable[..., Publication]


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    try:
        with redis_server() as url:
            yield url
    except ConfigError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture(
    params=[
        "delta",
        pytest.param("redis-keys", marks=pytest.mark.redis),
        pytest.param("redis-versioned", marks=pytest.mark.redis),
    ]
)
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Sink:
    if request.param == "delta":
        return DeltaSink(str(tmp_path / "with space" / "recommendations"))
    request.getfixturevalue("client")
    url = request.getfixturevalue("redis_url")
    return RedisSink(url, publish_as=request.param.removeprefix("redis-"), batch=2)


@pytest.fixture
def publication() -> Publish:
    """`publication(run_id, {product_id: recs}, market=...)`: a publication of the builder `Main`."""
    runs = 0

    def make(
        run_id: str, recs: dict[str, list[str]], *, merchant: str = "abt", market: str = "US"
    ) -> Publication:
        nonlocal runs
        runs += 1
        rows = pa.table(
            {
                "product_id": pa.array(list(recs), pa.string()),
                "logic_builder": pa.array(["Main"] * len(recs), pa.string()),
                "recs": pa.array(list(recs.values()), pa.list_(pa.string())),
                "scores": pa.array([[0.5] * len(ids) for ids in recs.values()], pa.list_(pa.float32())),
            }
        )
        ts = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=runs)
        return Publication(merchant, market, run_id, ts, ("Main", "Other"), rows)

    return make
