"""Calls by batch on Spark: the driver hands in, workers do the rest, and both engines find the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.session import Limits
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import Reply, model, run

pytestmark = pytest.mark.spark

PROMPTS = {"a": {f"p{i}": f"lamp {i % 7}" for i in range(20)}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "any")
    with chat_server(str.upper) as chat:
        yield chat


def test_the_driver_hands_in_and_collects(spark: Any, server: ChatServer, tmp_path: Path) -> None:
    limits = Limits(in_process_keys=0, batch_rows=2, partitions=2)
    how = {"session": {"engine": "spark", "spark": spark, "limits": limits}}
    cache, folder = DeltaCache(str(tmp_path / "cache")), str(tmp_path / "cache" / "batches")
    with pytest.raises(AnswersPendingError, match="7 answers"):
        run(cache, model(server.url, folder), PROMPTS, "a", **how)
    assert sorted(server.batches.prompts) == [f"lamp {i}" for i in range(7)], "one batch, equal prompts once"
    assert len(server.batches.batches) == 1
    server.batches.polls = 0
    found = run(cache, model(server.url, folder), PROMPTS, "a", **how).values(Reply)
    assert found == {("a", key): f"<{prompt.upper()}>" for key, prompt in PROMPTS["a"].items()}
    assert run(cache, model(server.url, folder), PROMPTS, "a").values(Reply) == found, (
        "the local engine agrees"
    )
    assert len(server.batches.prompts) == 7
    assert server.requests == []


def test_a_run_on_spark_that_waits(spark: Any, server: ChatServer, tmp_path: Path) -> None:
    limits = Limits(in_process_keys=0, batch_rows=2, partitions=2)
    how = {"session": {"engine": "spark", "spark": spark, "limits": limits}}
    cache = DeltaCache(str(tmp_path / "cache"))
    llm = model(server.url, str(tmp_path / "cache" / "batches"), wait_s=30.0)
    assert len(run(cache, llm, PROMPTS, "a", **how).values(Reply)) == 20
    assert len(server.batches.prompts) == 7
