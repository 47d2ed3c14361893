"""Publishing a Spark DataFrame: the same tables and keys as from an Arrow table, each row evaluated once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.sinks import DeltaSink, Publication, PublishedState, RedisSink, read_recs
from featurekit_spark.sinks.delta import recommendations_schema
from featurekit_spark.testing.redis import redis_server

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

pytestmark = pytest.mark.spark

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
SCHEMA = "product_id string, logic_builder string, recs array<string>, scores array<float>"
ROWS = [("1", "Main", ["2", "é"], [0.5, 0.25]), ("2", "Main", [], None), ("1", "Other", ["2"], None)]


def frame(spark: SparkSession, rows: list[tuple[object, ...]]) -> DataFrame:
    return spark.createDataFrame(rows, SCHEMA).repartition(2)


def arrow(rows: list[tuple[object, ...]]) -> pa.Table:
    schema = pa.schema([recommendations_schema().field(name.split()[0]) for name in SCHEMA.split(", ")])
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)


def publication(
    run_id: str, rows: DataFrame | pa.Table, *, merchant: str = "abt", market: str = "US"
) -> Publication:
    return Publication(merchant, market, run_id, NOW, ("Main", "Other"), rows)


def contents(path: Path) -> list[dict[str, object]]:
    query = "SELECT * FROM t ORDER BY merchant, market, product_id, logic_builder"
    return pa.table(QueryBuilder().register("t", DeltaTable(path)).execute(query).read_all()).to_pylist()


def test_a_frame_and_an_arrow_table_give_the_same_table(spark: SparkSession, tmp_path: Path) -> None:
    by_spark, by_arrow = DeltaSink(str(tmp_path / "by spark")), DeltaSink(str(tmp_path / "arrow"))
    result = by_spark.publish(publication("run-1", frame(spark, ROWS)))
    by_arrow.publish(publication("run-1", arrow(ROWS)))
    assert (result.rows, result.detail["covered"]) == (3, 2)
    assert contents(tmp_path / "by spark") == contents(tmp_path / "arrow")
    assert by_spark.state("abt", "US") == by_arrow.state("abt", "US") == PublishedState("run-1", 3, 2)
    table = DeltaTable(tmp_path / "by spark")
    assert (table.protocol().min_reader_version, table.protocol().min_writer_version) == (1, 2)


def test_both_writers_replace_in_turn(spark: SparkSession, tmp_path: Path) -> None:
    sink = DeltaSink(str(tmp_path / "r"))
    odd = "a'b\\"
    sink.publish(publication("run-1", frame(spark, ROWS), merchant=odd))
    sink.publish(publication("run-1", arrow(ROWS), market="NO"))
    sink.publish(publication("run-2", arrow(ROWS[:2]), merchant=odd))
    version = DeltaTable(sink.path).version()
    sink.publish(publication("run-3", frame(spark, ROWS[:1]), merchant=odd))
    sink.publish(publication("run-4", frame(spark, []), market="NO"))
    assert DeltaTable(sink.path).version() == version + 2
    assert [(row["merchant"], row["run_id"]) for row in contents(tmp_path / "r")] == [(odd, "run-3")]
    assert sink.state("abt", "NO") is None
    assert spark.read.format("delta").load(sink.path).count() == 1


def test_a_long_run_id_written_by_spark_comes_back_whole(spark: SparkSession, tmp_path: Path) -> None:
    sink = DeltaSink(str(tmp_path / "r"))
    sink.publish(publication("x" * 60, frame(spark, ROWS)))
    assert sink.state("abt", "US") == PublishedState("x" * 60, 3, 2)


def test_a_commit_that_spark_loses_is_tried_again(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the lock that keeps local writers apart, as on an object store.
    monkeypatch.setattr("featurekit_spark.sinks.delta.table_lock", lambda path, owner: nullcontext())
    sink = DeltaSink(str(tmp_path / "r"))
    sink.publish(publication("run-0", arrow(ROWS)))
    version = DeltaTable(sink.path).version()
    frames = {f"run-{number}": frame(spark, ROWS) for number in range(1, 4)}
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda run: sink.publish(publication(run, frames[run])), frames))
    assert [result.rows for result in results] == [3, 3, 3]
    assert DeltaTable(sink.path).version() == version + 3
    assert len({row["run_id"] for row in contents(tmp_path / "r")}) == 1


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    try:
        with redis_server() as url:
            yield url
    except ConfigError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.redis
@pytest.mark.parametrize("publish_as", ["keys", "versioned"])
def test_workers_write_to_redis_what_the_driver_would(
    spark: SparkSession, redis_url: str, publish_as: str, tmp_path: Path
) -> None:
    from pyspark.sql import functions as F

    seen = tmp_path / "seen"
    seen.mkdir()

    @F.udf("string", useArrow=False)  # Spark cannot tell the kind from annotations kept as text
    def noted(product_id: str) -> str:
        with (seen / product_id).open("a") as file:
            file.write("x")
        return product_id

    rows = frame(spark, [(str(number), "Main", ["0"], None) for number in range(50)])
    sink = RedisSink(redis_url, publish_as=publish_as, batch=7)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        sink.publish(publication("run-0", arrow(ROWS)))
        result = sink.publish(publication("run-1", rows.withColumn("product_id", noted("product_id"))))
        assert (result.rows, result.detail["covered"]) == (50, 50)
        assert sink.state("abt", "US") == PublishedState("run-1", 50, 50)
        found = [
            read_recs(client, str(number), merchant="abt", market="US", publish=publish_as)
            for number in range(51)
        ]
        assert found == [["0"]] * 50 + [None]
        assert {file.name: file.read_text() for file in seen.iterdir()} == {str(n): "x" for n in range(50)}
        assert client.exists("abt:US:1:Other") == 0


@pytest.mark.redis
def test_a_server_that_goes_away_is_told_without_a_worker_traceback(spark: SparkSession) -> None:
    with redis_server() as url:
        sink = RedisSink(url)
        sink.publish(publication("run-1", frame(spark, ROWS)))
        assert sink.state("abt", "US") == PublishedState("run-1", 3, 2)
    with pytest.raises(ServiceError, match="cannot be reached") as caught:
        sink.publish(publication("run-2", frame(spark, ROWS)))
    assert "Traceback" not in str(caught.value)


def test_the_history_tells_what_a_frame_published(spark: SparkSession, tmp_path: Path) -> None:
    sink = DeltaSink(str(tmp_path / "r"))
    sink.publish(publication("run-1", frame(spark, ROWS)))
    sink.publish(publication("run-2", frame(spark, ROWS[:1])))
    assert sink.runs("abt", "US") == ["run-2", "run-1"]
    held = sink.earlier("abt", "US", "run-1")
    assert held is not None and held.ts == NOW
    found = {(row["product_id"], row["logic_builder"]): row["recs"] for row in held.rows.to_pylist()}
    assert found == {(product, builder): recs for product, builder, recs, _ in ROWS}
