"""Tokens that the provider did not count, and attempts that led to no answer, come back from workers as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.session import Limits
from tests.letter_shop import Desk, older, run

pytestmark = [pytest.mark.spark, pytest.mark.slow]


@pytest.mark.parametrize("collect_mb", [256, 0], ids=["stages", "tables"])
def test_estimated_tokens(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    limits = Limits(in_process_keys=0, collect_mb=collect_mb, partitions=1)
    cache = DeltaCache(str(tmp_path / "cache"))
    counts = run(cache, Desk(), engine="spark", spark=spark, limits=limits).builders["Ask"]
    assert (counts.calls, counts.tokens, counts.estimated_tokens) == (3, 21, 7)
    assert (counts.attempts, counts.failed_attempts) == (5, 2)
    rows = cache.history("Ask").to_pylist()
    assert sorted((row["attempts"], row["estimated_tokens"]) for row in rows if row["attempts"] == 3) == [
        (3, 7)
    ]


@pytest.mark.parametrize("collect_mb", [256, 0], ids=["stages", "tables"])
def test_a_refusal_and_a_table_of_before(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    limits = Limits(in_process_keys=0, collect_mb=collect_mb, partitions=1)
    cache = DeltaCache(str(tmp_path / "cache"))
    run(cache, Desk(names={"p9": "Barbara"}), engine="spark", spark=spark, limits=limits)
    older(cache)
    cache = DeltaCache(cache.path)
    desk = Desk(refused=frozenset({"write to Grace"}))
    counts = run(cache, desk, engine="spark", spark=spark, limits=limits).builders["Ask"]
    assert (counts.calls, counts.tokens, counts.estimated_tokens) == (3, 17, 9)
    assert (counts.attempts, counts.failed_attempts) == (6, 4)
    found = {row["attempts"] for row in cache.history("Ask").to_pylist()}
    assert found == {None, 1, 2, 3}
