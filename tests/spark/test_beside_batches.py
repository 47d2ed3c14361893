"""A run online on Spark, beside a batch that is on its way: workers know what not to ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import aio
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.llm import OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_beside import ChatBesideBatches
from featurekit_spark.llm.batch_desk import BatchLimits
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.chat import ChatServer, chat_server
from tests.batch_shop import Ids, Reply, World

SHOPS = {"a": {f"p{i}": f"lamp {i}" for i in range(8)}, "b": {"p1": "lamp 3", "p2": "desk"}}
GIVEN = {"model": "m", "api_key_env": "PATH"}  # workers may have been started before a variable was set


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(str.upper) as chat:
        yield chat


def test_workers_leave_what_is_on_its_way(spark: Any, server: ChatServer, tmp_path: Path) -> None:
    cache, folder = DeltaCache(str(tmp_path / "cache")), str(tmp_path / "cache" / "batches")

    def run(llm: Any, shop: str, engine: Any) -> RunResult:
        limits = Limits(in_process_keys=0, batch_rows=2, partitions=2)
        try:
            own = Session(World(llm, SHOPS), cache, engine=engine, spark=spark, limits=limits)
            return own.run(Reply.over(Ids), shop=shop)
        finally:
            aio.run(llm.aclose())

    server.batches.polls = 1_000
    chat = OpenAIChat(server.url, **GIVEN)
    with pytest.raises(AnswersPendingError):
        run(OpenAIBatch(chat, folder, limits=BatchLimits(unsure_s=0.0)), "b", "local")
    online = ChatBesideBatches(folder, base_url=server.url, **GIVEN)
    with pytest.raises(AnswersPendingError, match=r"2 answers of openai:m@.* are still to come"):
        run(online, "a", "spark")
    assert "lamp 3" not in server.prompts
    server.batches.polls = 0
    assert run(online, "a", "spark").values(Reply)["a", "p3"] == "<LAMP 3>"
    assert sorted(server.prompts) == [f"lamp {i}" for i in range(8) if i != 3], "each was paid for once"
