"""Prompts of which only hashes are kept are found where look-ups are joins in Spark."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import HASHED_KEY_SQL, hashed_key
from featurekit_spark.cache.retention import Retention, retain
from featurekit_spark.fingerprint import key_json
from featurekit_spark.session import Limits
from tests.letter_shop import Desk, Initial, run

pytestmark = pytest.mark.spark
ODD = ["plain", 'with "quotes"', "Grüße, 日本", "two\nlines", "", "a\\b"]


def test_spark_hashes_keys_as_python_does(spark: Any) -> None:
    keys = [key_json((text,)) for text in ODD]
    found = spark.createDataFrame([(key,) for key in keys], "key string").selectExpr("key", HASHED_KEY_SQL)
    assert dict(map(tuple, found.collect())) == {key: hashed_key(key) for key in keys}


@pytest.mark.slow
def test_nothing_is_paid_for_again_where_a_catalog_stays_in_tables(spark: Any, tmp_path: Path) -> None:
    cache, desk = DeltaCache(str(tmp_path / "cache")), Desk()
    run(cache, desk)
    retain(cache, Retention(timedelta(0)), now=datetime.now(UTC) + timedelta(days=1))
    limits = Limits(in_process_keys=0, collect_mb=0, partitions=1)
    counts = run(cache, desk, Initial, engine="spark", spark=spark, limits=limits).builders["Ask"]
    assert (counts.hit, counts.calls) == (3, 0)
