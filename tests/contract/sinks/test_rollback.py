"""Going back: what an earlier run had published stands again, in every sink, and the next run publishes anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.pipelines.logic import published_group
from featurekit_spark.pipelines.outputs import Step, rollback
from featurekit_spark.sinks import DeltaSink, Publication, PublishedState, RedisSink, Sink, read_recs

Publish = Callable[..., Publication]
NOW = datetime(2026, 2, 1, tzinfo=UTC)
OLD, NEW = {"1": ["2"], "2": ["1"]}, {"2": ["3"], "3": []}


@pytest.fixture
def table(tmp_path: Path) -> DeltaSink:
    return DeltaSink(str(tmp_path / "r"))


def back(sinks: Sequence[Sink], run: str, cache: MemoryCache | None = None, **options: Any) -> list[Step]:
    options = {"merchant": "abt", "market": "US", "logic_builders": ["Main"]} | options
    runs = {sink.name: run for sink in sinks}
    return rollback(sinks, cache or MemoryCache(), runs=runs, run_id="back", now=NOW, **options)


def rows(sink: DeltaSink, market: str = "US") -> list[dict[str, Any]]:
    query = f"SELECT * FROM t WHERE market = '{market}' ORDER BY product_id"
    found = QueryBuilder().register("t", DeltaTable(sink.path)).execute(query)
    return pa.table(found.read_all()).to_pylist()


def test_a_table_goes_back_row_by_row_in_one_commit(table: DeltaSink, publication: Publish) -> None:
    table.publish(publication("r1", OLD))
    before = rows(table)
    table.publish(publication("r2", NEW))
    table.publish(publication("r1", {"1": ["9"]}, market="NO"))
    version = DeltaTable(table.path).version()
    (step,) = back([table], "r1")
    assert (step.found, step.rows, step.how) == ("r2", 2, "delta version 1")
    assert rows(table) == before
    assert [row["recs"] for row in rows(table, "NO")] == [["9"]]
    assert DeltaTable(table.path).version() == version + 1
    (step,) = back([table], "r2")  # and forth again
    assert table.state("abt", "US") == PublishedState("r2", 2, 1)


def test_the_last_publication_of_a_name_counts(table: DeltaSink, publication: Publish) -> None:
    for recs in (OLD, {"7": ["8"]}):
        table.publish(publication("r1", recs))
    table.publish(publication("r2", NEW))
    back([table], "r1")
    assert [row["product_id"] for row in rows(table)] == ["7"]


def test_an_empty_publication_comes_back(table: DeltaSink, publication: Publish) -> None:
    table.publish(publication("r1", {}))
    table.publish(publication("r2", NEW))
    back([table], "r1")
    assert rows(table) == []


def test_names_with_quotes(table: DeltaSink, publication: Publish) -> None:
    for run in ("r'1", "r2"):
        table.publish(publication(run, OLD, merchant="a'b\\"))
    back([table], "r'1", merchant="a'b\\")
    assert table.state("a'b\\", "US") == PublishedState("r'1", 2, 2)


def test_a_table_without_notes_is_read_version_by_version(table: DeltaSink, publication: Publish) -> None:
    """As tables are that an earlier release wrote."""
    for run, recs in (("r1", OLD), ("r2", NEW)):
        table.publish(publication(run, recs))
        found = pa.Table.from_pylist(rows(table))
        path = table.path + "-plain"
        write_deltalake(path, found, mode="overwrite", partition_by=["merchant", "market"])
    plain = DeltaSink(path)
    assert plain.runs("abt", "US") == []
    held = plain.earlier("abt", "US", "r1")
    assert held is not None and held.version == 0 and held.rows["product_id"].to_pylist() == ["1", "2"]
    assert plain.earlier("abt", "US", "r3") is None


def test_a_version_whose_files_were_removed(table: DeltaSink, publication: Publish) -> None:
    table.publish(publication("r1", OLD))
    table.publish(publication("r2", NEW))
    DeltaTable(table.path).vacuum(0, enforce_retention_duration=False, dry_run=False)
    with pytest.raises(DataError, match=r"run 'r1' is version 1 .* cannot be read any more"):
        back([table], "r1")
    assert table.state("abt", "US") == PublishedState("r2", 2, 1)


def test_a_run_that_nobody_knows_changes_nothing(table: DeltaSink, publication: Publish) -> None:
    with pytest.raises(UsageError, match="No run is known there"):
        back([table], "r1")
    table.publish(publication("r1", OLD))
    table.publish(publication("r2", NEW))
    cache, version = MemoryCache(), DeltaTable(table.path).version()
    with pytest.raises(UsageError, match=r"cannot go back to run 'r3' .*known: r2, r1\. Nothing was changed"):
        back([table], "r3", cache)
    assert cache.last_run(published_group("abt", "US")) is None
    assert DeltaTable(table.path).version() == version


def test_a_dry_run_changes_nothing(table: DeltaSink, publication: Publish) -> None:
    table.publish(publication("r1", OLD))
    table.publish(publication("r2", NEW))
    cache, version = MemoryCache(), DeltaTable(table.path).version()
    assert [step.how for step in back([table], "r1", cache, dry_run=True)] == ["delta version 1"]
    assert DeltaTable(table.path).version() == version
    assert cache.last_run(published_group("abt", "US")) is None


def test_marks_of_what_went_back_are_dropped_first(
    table: DeltaSink, publication: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.publish(publication("r1", OLD))
    table.publish(publication("r2", NEW))
    cache, group = MemoryCache(), published_group("abt", "US")
    marks = {"delta": {"run_id": "r2"}, "elsewhere": {"run_id": "r2"}}
    cache.record_run(RunRecord("r2", group, NOW, "ok", {"sinks": marks}))
    assert [step.how for step in back([table], "r2", cache)] == ["holds it already"]
    assert cache.last_run(group).record["sinks"] == marks  # type: ignore[union-attr]

    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(DeltaSink, "publish", broken)
    with pytest.raises(OSError, match="disk full"):
        back([table], "r1", cache)
    last = cache.last_run(group)
    assert last is not None and last.record["sinks"] == {"elsewhere": {"run_id": "r2"}}
    assert last.record["to"] == {"delta": "r1"}


# -- Redis ---------------------------------------------------------------------------------------------------


def held_by(client: redis.Redis, sink: RedisSink) -> dict[str, list[str]]:
    found = {
        product: read_recs(client, product, merchant="abt", market="US", publish=sink.publish_as)
        for product in ("1", "2", "3")
    }
    return {product: recs for product, recs in found.items() if recs is not None}


@pytest.mark.redis
@pytest.mark.parametrize("publish_as", ["keys", "versioned"])
def test_redis_is_filled_from_the_tables_history(
    table: DeltaSink, publication: Publish, client: redis.Redis, redis_url: str, publish_as: Any
) -> None:
    sink = RedisSink(redis_url, publish_as=publish_as, batch=2)
    for run, recs in (("r1", OLD), ("r2", NEW), ("r3", {})):
        for each in (table, sink):
            each.publish(publication(run, recs))
    steps = back([sink, table], "r1")
    assert [step.how for step in steps] == ["delta version 1", "delta version 1"]
    assert held_by(client, sink) == OLD
    assert sink.state("abt", "US") == table.state("abt", "US") == PublishedState("r1", 2, 2)
    sink.publish(publication("r4", NEW))
    assert held_by(client, sink) == NEW


@pytest.mark.redis
def test_a_versioned_redis_goes_back_by_its_pointer_alone(
    publication: Publish, client: redis.Redis, redis_url: str
) -> None:
    sink = RedisSink(redis_url, publish_as="versioned")
    sink.publish(publication("r0", {"3": ["1"]}))
    sink.publish(publication("r1", OLD))
    sink.publish(publication("r2", NEW))
    assert [step.switch for step in back([sink], "r1", dry_run=True)] == [True]
    assert held_by(client, sink) == NEW
    back([sink], "r1")
    assert held_by(client, sink) == OLD
    assert sink.state("abt", "US") == PublishedState("r1", 2, 2)
    back([sink], "r2")
    assert held_by(client, sink) == NEW
    back([sink], "r1")
    sink.publish(publication("r3", {"1": ["3"]}))  # beside the live generation, which stays readable
    assert held_by(client, sink) == {"1": ["3"]}
    back([sink], "r1")
    assert held_by(client, sink) == OLD
    generations = client.smembers("featurekit/abt:US:generations")
    assert generations == {"r1", "r3"}
    with pytest.raises(UsageError, match="redis cannot go back to run 'r0' .*without a Delta sink"):
        back([sink], "r0")


@pytest.mark.redis
def test_another_layout_is_not_pointed_at(publication: Publish, client: redis.Redis, redis_url: str) -> None:
    RedisSink(redis_url, publish_as="versioned").publish(publication("r1", OLD))
    sink = RedisSink(redis_url, publish_as="versioned", key_template="recs:{product_id}")
    sink.publish(publication("r2", NEW))
    with pytest.raises(UsageError, match="cannot go back"):
        back([sink], "r1")
    expires = RedisSink(redis_url, publish_as="versioned", ttl_s=60)
    for run in ("r3", "r4"):
        expires.publish(publication(run, NEW))
    with pytest.raises(UsageError, match="cannot go back"):
        back([expires], "r3")
