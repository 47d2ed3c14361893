"""Spark reads and appends to tables out of which care took rows, and care takes out what Spark wrote."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.gc import GcOptions, collect
from featurekit_spark.cache.upkeep import compact, forget_log, vacuum
from featurekit_spark.errors import CacheError
from featurekit_spark.testing.behaviour import entry, rows

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("builder", ["Title", "a b/c%"])
def test_care_and_spark_on_one_table(spark: Any, tmp_path: Path, builder: str) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "old", builder=builder, inputs="i1"), entry("b", "x", builder=builder)))
    cache.append(rows(entry("a", "new", builder=builder, inputs="i2")))
    path, later = cache.table_path("entries"), datetime.now(UTC) + timedelta(days=1)
    options = GcOptions(older_than=timedelta(0), include_paid=True)
    assert collect(cache, options, now=later)["rows"] == 1

    def seen() -> list[tuple[str, str]]:
        found = spark.read.format("delta").load(path).selectExpr("builder", "CAST(value AS STRING) AS v")
        return sorted((row["builder"], row["v"]) for row in found.collect())

    assert seen() == [(builder, "new"), (builder, "x")]
    # What Spark appends (it spells the folder in its own way) goes like the rest: older, so not current.
    older = (
        spark.read.format("delta")
        .load(path)
        .selectExpr(
            "* EXCEPT (entry_id, recorded)", "concat('s', entry_id) AS entry_id", "recorded - 1 AS recorded"
        )
    )
    older.select(*cache.entry_columns()).write.format("delta").mode("append").save(path)
    assert len(cache.history(builder)) == 4
    compact(cache, "entries")
    assert collect(cache, options, now=later)["rows"] == 2
    vacuum(cache, "entries", hours=0)
    forget_log(path)
    assert seen() == [(builder, "new"), (builder, "x")]
    assert len(cache.history(builder)) == 2


def test_a_folder_that_deltalake_spells_otherwise(spark: Any, tmp_path: Path) -> None:
    """Taken out by deltalake, a file there would stay for deltalake and be gone for Spark: refused, and told."""
    builder = "Gr\u00f6\u00dfe"
    cache = DeltaCache(str(tmp_path / "cache"))
    cache.append(rows(entry("a", "x", builder=builder), entry("a", "x")))
    cache.append(rows(entry("b", "x", builder=builder), entry("b", "x")))
    path, later = cache.table_path("entries"), datetime.now(UTC) + timedelta(days=1)
    options = GcOptions(older_than=timedelta(0), include_paid=True)
    older = spark.read.format("delta").load(path).where(f"builder = '{builder}'")
    older = older.selectExpr("* EXCEPT (entry_id, recorded)", "'s' AS entry_id", "recorded - 1 AS recorded")
    older.select(*cache.entry_columns()).write.format("delta").mode("append").save(path)
    assert compact(cache, "entries")["skipped"] == [builder]
    assert len(cache.history(builder)) == 4 and len(cache.history("Title")) == 2
    with pytest.raises(CacheError, match="Delete them with Spark"):
        collect(cache, options, now=later)
    assert len(cache.history(builder)) == 4
    assert spark.read.format("delta").load(path).count() == 6
