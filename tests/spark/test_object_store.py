"""Workers of Spark and a cache on an object store that only options open: they keep answers there and stage entries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.session import Limits, Session
from tests.paid_shop import MICRO_BATCH, Counter, Ids, Use, World
from tests.s3 import Store, s3_server

pytestmark = pytest.mark.spark

EVERY = {f"p{i}" for i in range(160)}


@pytest.fixture
def store() -> Iterator[Store]:
    with s3_server() as store:
        yield store


def run(spark: Any, cache: DeltaCache, counter: Counter) -> Any:
    limits = Limits(in_process_keys=0, batch_rows=40, partitions=2, micro_batch=MICRO_BATCH)
    session = Session(World(counter), cache, engine="spark", spark=spark, limits=limits)
    return session.run(Use.over(Ids), shop="a")


def left(cache: DeltaCache) -> list[str]:
    return [info.path for info in cache.journals.infos(recursive=True) if info.is_file]


def staged(cache: DeltaCache) -> list[str]:
    """Data files that workers wrote."""
    found = cache.table("entries")
    assert found is not None
    return [uri for uri in found.file_uris() if re.search(r"/part-[0-9a-f]{32}\.zstd\.parquet$", uri)]


def test_a_killed_worker_loses_no_more_than_its_calls_in_flight(
    spark: Any, store: Store, tmp_path: Path
) -> None:
    cache = DeltaCache("s3://lake/cache", storage_options=store.options)
    first = Counter(tmp_path / "calls", 160, kill_at=30)
    with pytest.raises(Exception, match="crashed|terminated|exited"):
        run(spark, cache, first)
    before = first.asked()
    assert 30 <= len(before) < 160
    second = Counter(tmp_path / "calls again", 160)
    result = run(spark, cache, second)
    assert (result.status, len(result.values(Use))) == ("ok", 160)
    after = second.asked()
    assert len(set(before) & set(after)) <= 2 * MICRO_BATCH
    assert len(after) == len(set(after)) and set(before) | set(after) == EVERY
    assert staged(cache)
    assert not left(cache)


def test_workers_that_lack_a_variable_send_rows(
    spark: Any, store: Store, tmp_path: Path, monkeypatch: Any
) -> None:
    """It is set for the driver alone: what workers answer is durable when the stage ends."""
    monkeypatch.setenv("LAKE_SECRET", store.secret_key)
    options = {**store.options, "AWS_SECRET_ACCESS_KEY": "${env:LAKE_SECRET}"}
    cache, counter = DeltaCache("s3://lake/cache", storage_options=options), Counter(tmp_path / "calls", 160)
    assert run(spark, cache, counter).status == "ok"
    assert sorted(counter.asked()) == sorted(EVERY)
    assert not staged(cache) and not left(cache)
    assert run(spark, cache, counter).builders["Use"].hit == 160
