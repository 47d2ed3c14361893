"""A run that hands its prompts in as a batch: `python -m tests.batch_shop CACHE URL SHOP PROMPTS [--wait]`. Prints its
answers as JSON, or `pending`; the server that it talks to may kill it at any step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, KeySet, Source
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_desk import BatchLimits
from featurekit_spark.paid.prices import Price
from featurekit_spark.session import RunResult, Session

FAST = BatchLimits(unsure_s=0.0, poll_s=0.01)


@dataclass
class World:
    """A context: a model, and each shop's prompts by product."""

    llm: Any
    prompts: dict[str, dict[str, str]]
    merchant_config: dict[str, Any] = field(default_factory=dict)


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("prompts",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return sorted(context.prompts[inputs["shop"]])


class Prompt(Source[str]):
    key, value, needs = ("shop", "id"), pa.string(), ("prompts",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(context.prompts[inputs["shop"]][inputs["id"]])


class Reply(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (LLMCompletion.on(prompt=Prompt),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"<{inputs['LLMCompletion']}>"


def model(url: str, folder: str, *, limits: BatchLimits = FAST, **options: Any) -> OpenAIBatch:
    """A model with a price: 7 and 3 tokens are 27 usd online."""
    chat = OpenAIChat(url, "m", api_key_env="TEST_CHAT_KEY", price=Price.of(3_000_000, 2_000_000))
    return OpenAIBatch(chat, folder, limits=limits, **options)


def run(
    cache: DeltaCache, llm: OpenAIBatch, prompts: dict[str, dict[str, str]], shop: str, **how: Any
) -> RunResult:
    """One run; its connections are closed."""
    try:
        engine = how.pop("session", {"engine": "local"})
        return Session(World(llm, prompts), cache, **engine).run(Reply.over(Ids), shop=shop, **how)
    finally:
        aio.run(llm.aclose())


if __name__ == "__main__":
    path, url, shop, prompts, *more = sys.argv[1:]
    llm = model(url, f"{path}/batches", wait_s=600.0 if more else 0.0)
    try:
        done = run(DeltaCache(path), llm, json.loads(prompts), shop)
    except AnswersPendingError:
        print("pending")
    else:
        print(json.dumps({key[1]: value for key, value in done.values(Reply).items()}))
