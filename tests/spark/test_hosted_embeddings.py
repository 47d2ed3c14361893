"""Hosted embeddings on Spark's workers: each text is asked for once, in few requests, and nothing again after that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import Context, DeltaCache, MemoryCache, Session
from featurekit_spark.apps.product_recs import ProductIds, SimilarProducts, hosted
from featurekit_spark.embed import HashingEmbedder, OpenAIEmbedder
from featurekit_spark.search import MatrixStore
from featurekit_spark.session import Limits
from featurekit_spark.testing.embeddings import embedding_server
from featurekit_spark.testing.fakes import ProductDBFake

pytestmark = pytest.mark.spark

GROUP = {"merchant": "abt", "market": "US"}


def test_workers_ask_for_each_text_once(spark: Any, tmp_path: Path) -> None:
    titles = [f"lamp number {i} in {colour}" for i in range(60) for colour in ("red", "green")]
    local = Context(
        product_db=ProductDBFake({f"p{i}": {"title": title} for i, title in enumerate([*titles, *titles])}),
        embedder=HashingEmbedder(32),
        matrices=MatrixStore(tmp_path / "matrices"),
    )
    expected = Session(local, MemoryCache(), engine="local").run(SimilarProducts.over(ProductIds), **GROUP)
    with embedding_server() as server:
        # The workers are those of other tests, started before the variable was set: PATH is in every environment.
        embedder = OpenAIEmbedder(server.url, "m", dim=32, batch_size=16, requests=4, api_key_env="PATH")
        session = Session(
            replace(local, embedder=embedder),
            DeltaCache(str(tmp_path / "cache")),
            engine="spark",
            spark=spark,
            limits=Limits(in_process_keys=0, partitions=2),
        )
        result = session.run(hosted.SimilarProducts.over(ProductIds), **GROUP)
        assert result.status == "ok" and result.builders["ProductEmbedding"].calls == 120
        assert sorted(server.texts) == sorted(titles)
        assert len(server.requests) <= 12, "120 texts in requests of up to 16, by two tasks"
        assert result.values("SimilarProducts") == expected.values("SimilarProducts")

        again = session.run(hosted.SimilarProducts.over(ProductIds), **GROUP)
        assert again.unchanged and len(server.texts) == 120
