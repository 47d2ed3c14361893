"""Tokens that the provider did not count come back from workers as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.session import Limits
from tests.letter_shop import Desk, run

pytestmark = [pytest.mark.spark, pytest.mark.slow]


@pytest.mark.parametrize("collect_mb", [256, 0], ids=["stages", "tables"])
def test_estimated_tokens(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    limits = Limits(in_process_keys=0, collect_mb=collect_mb, partitions=1)
    cache = DeltaCache(str(tmp_path / "cache"))
    counts = run(cache, Desk(), engine="spark", spark=spark, limits=limits).builders["Ask"]
    assert (counts.calls, counts.tokens, counts.estimated_tokens) == (3, 21, 7)
