"""Tasks that run at once share a model's concurrency and rate limit, stage by stage and table by table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import Rates
from featurekit_spark.session import Limits, Session
from featurekit_spark.testing.load import load_server
from tests import shop
from tests.shop import Product, ProductIds, ShopContext

pytestmark = pytest.mark.spark

ABT = {"merchant": "abt", "market": "US"}


@dataclass(frozen=True)
class ModelContext(ShopContext):
    llm: Any = None
    merchant_config: Mapping[str, Any] = field(default_factory=dict)


class Asked(FeatureBuilder[str]):
    key, value = shop.PRODUCT, pa.string()
    deps = (LLMCompletion.on(prompt=shop.Title),)
    version = "1"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return str(inputs["LLMCompletion"])


@pytest.mark.parametrize("by_tables", [False, True], ids=["stages", "tables"])
@pytest.mark.parametrize(("concurrency", "per_minute"), [(1, None), (4, None), (4, 1200)])
def test_the_run_s_total(
    spark: Any, tmp_path: Path, by_tables: bool, concurrency: int, per_minute: int | None
) -> None:
    products = {("abt", "US", f"p{i}"): Product(f"lamp {i}", "acme", 1) for i in range(48)}
    limits = Limits(in_process_keys=0, batch_rows=8, partitions=2, collect_mb=0 if by_tables else 256)
    with load_server(delay_s=0.05, per_minute=per_minute or 0) as server:
        limiter = HostLimiter(str(tmp_path / "limits"), "m", Rates(per_minute)) if per_minute else None
        # A variable that Spark's workers have as well; the server takes any key.
        model = OpenAIChat(server.url, "m", api_key_env="HOME", concurrency=concurrency, limiter=limiter)
        context = ModelContext(shop.World(products=products), llm=model)
        session = Session(
            context, DeltaCache(str(tmp_path / "cache")), engine="spark", spark=spark, limits=limits
        )
        result = session.run(Asked.over(ProductIds), **ABT)
        seen = server.seen()
    assert result.status == "ok"
    assert (seen.requests, seen.paid_twice) == (48, 0) and seen.kinds == {"answered": 48}
    assert seen.most_in_flight <= concurrency
    if concurrency > 1 and not per_minute and not by_tables:  # so few rows are one task there
        assert seen.most_in_flight > concurrency // 2, "both tasks call"
