"""Runs that pay for prompts, one for each line of stdin: a process of `scripts/bench/kills`, which kills it, and of
`scripts/bench/calls`.

    {"cache": FOLDER, "shop": "NAME", "prompts": N, "products": M}

M products (N where it is left out) share N prompts. Prints what became of each run. Its builders are found by Spark's
workers, which import this module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from featurekit_spark import Context, DeltaCache, FeatureBuilder, KeySet
from featurekit_spark.engines.spark import SparkEngine
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.session import Session

KEY_VARIABLE = "FEATUREKIT_BENCH_KEY"


class Ids(KeySet):
    """As many products as the shop's name says: `NAME:M:N`."""

    key, of, value = ("shop",), "id", pa.list_(pa.string())

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"{number:06d}" for number in range(int(inputs["shop"].split(":")[1]))]


class Question(FeatureBuilder[str]):
    key, value, inline = ("shop", "id"), pa.string(), True

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return question(inputs["shop"], inputs["id"])


class Answer(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (LLMCompletion.on(prompt=Question),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["LLMCompletion"])


def question(shop: str, number: str) -> str:
    name, _, prompts = shop.split(":")
    return f"What goes with {int(number) % int(prompts)} of {name}?"


def run(
    model: OpenAIChat, engine: Any, cache: str, shop: str, prompts: int, products: int | None = None
) -> dict[str, Any]:
    """One run, and whether its answers are the server's."""
    session = Session(Context(llm=model), DeltaCache(cache), engine=engine)
    result = session.run(Answer.over(Ids), shop=f"{shop}:{products or prompts}:{prompts}")
    values: Mapping[Any, Any] = result.values(Answer)
    right = sum(value == f"1. like {question(*key)}" for key, value in values.items())
    return {"status": result.status, "right": right, "calls": result.builders["LLMCompletion"].calls}


def spark_session(master: str) -> Any:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("kills")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        # A session is ready when all its executors are: else the first run has one of them.
        "spark.scheduler.minRegisteredResourcesRatio": "1.0",
        "spark.scheduler.maxRegisteredResourcesWaitingTime": "60s",
    }.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--master", help="without it, the local engine")
    options = parser.parse_args()
    model = OpenAIChat(options.url, "m", api_key_env=KEY_VARIABLE, concurrency=options.concurrency)
    engine: Any = "local"
    if options.master:
        session = spark_session(options.master)
        engine = SparkEngine(session, in_process_keys=0)
    say({"ready": True})
    for line in sys.stdin:
        try:
            say(run(model, engine, **json.loads(line)))
        except Exception as error:  # told, and judged elsewhere
            say({"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]})


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    import kills_run  # the same classes for this process and for Spark's workers

    kills_run.main()
