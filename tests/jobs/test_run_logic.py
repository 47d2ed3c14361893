"""jobs/run_logic.py under a real spark-submit."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import redis
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.sinks import read_recs
from featurekit_spark.testing.chat import ChatServer, chat_server
from featurekit_spark.testing.redis import redis_server
from featurekit_spark.testing.samples import write_catalog

pytestmark = [pytest.mark.jobs, pytest.mark.slow]

Submitter = Any
PRODUCTS = 60
LLM, SIMILAR = (f"featurekit_spark.apps.product_recs:{name}" for name in ("LLMLogic", "SimilarProducts"))


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    with chat_server(lambda prompt: "1. " + prompt.removeprefix("get recommendations for ")) as server:
        yield server


@pytest.fixture(scope="module")
def titles(submit: Submitter) -> dict[str, str]:
    """The catalog of shop US in the folder `catalogs`, by product; two more products try ids and titles."""
    path = write_catalog(submit.home / "catalogs", merchant="shop", market="US", products=PRODUCTS, seed=3)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    rows += [["caf\u00e9 'x'\n", "Espresso Machine \u2603", *[""] * 3], ["cafe\u0301", "", *[""] * 3]]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return {row[0]: row[1] for row in rows[1:]}


def options(chat: ChatServer, *more: str) -> list[str]:
    return [
        *("--merchant", "shop", "--market", "US", "--output", "json"),
        *("--set", "product_db.path=catalogs", "--set", "warehouse=warehouse"),
        *("--set", f"llm={{provider: openai, model: m, base_url: '{chat.url}', api_key_env: SHOP_KEY}}"),
        *more,
    ]


def published(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    query = QueryBuilder().register("t", DeltaTable(str(folder)))
    rows = query.execute("SELECT * FROM t").read_all()
    columns = [rows.column(name).to_pylist() for name in rows.schema.names]
    found = [dict(zip(rows.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
    return {(row["product_id"], row["logic_builder"]): row for row in found}


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_every_stage_on_workers(
    submit: Submitter, chat: ChatServer, titles: dict[str, str], tmp_path: Path
) -> None:
    """Two of the library's logic builders and one of a user's own module, a model behind HTTP, both sinks."""
    (tmp_path / "own_logic.py").write_text(
        dedent(
            """
            import pyarrow as pa
            from featurekit_spark import FeatureBuilder
            from featurekit_spark.apps.product_recs import ProductEmbeddingString

            class LongTitles(FeatureBuilder):
                key = ("merchant", "market", "product_id")
                deps = (ProductEmbeddingString,)
                value = pa.list_(pa.string())

                def build(self, inputs, config, context):
                    from pyspark import TaskContext
                    where = "worker" if TaskContext.get() else "driver"
                    return [[where, title] for title in inputs["ProductEmbeddingString"]]
            """
        )
    )
    env = {"PYTHONPATH": str(tmp_path), "SHOP_KEY": "sk-secret"}
    with redis_server() as url, redis.Redis.from_url(url) as client:
        wanted = options(
            chat,
            *("--set", "engine.in_process_keys=0", "--set", "engine.partitions=2"),
            *("--set", f"logic_builders=[{LLM}, {SIMILAR}, own_logic:LongTitles]"),
            *("--set", f"sinks=[{{kind: delta}}, {{kind: redis, url: '{url}'}}]"),
        )
        cold = submit.run(*wanted, env=env)
        assert cold.code == 0, cold.err
        assert cold.out.count("\n") == 1 and "Traceback" not in cold.err and "sk-secret" not in cold.err
        assert cold.summary["products"] == len(titles)
        assert {name: sink["rows"] for name, sink in cold.summary["sinks"].items()} == {
            "delta": 3 * len(titles),
            "redis": 3 * len(titles),
        }
        assert cold.summary["quality"]["missing_title"] == 1
        with_title = Counter({title for title in titles.values() if title})
        assert Counter(prompt.removeprefix("get recommendations for ") for prompt in chat.prompts) == (
            with_title
        )
        assert cold.counts["LLMCompletion"]["calls"] == len(with_title)
        rows = published(submit.home / "warehouse" / "recommendations")
        assert {product for product, _ in rows} == set(titles)
        for product, title in titles.items():
            assert rows[product, "LongTitles"]["recs"] == (["worker", title] if title else [])
            similar = rows[product, "SimilarProducts"]
            assert len(similar["scores"] or []) == len(similar["recs"])
            recs = read_recs(client, product, merchant="shop", market="US")
            assert recs == rows[product, "LLMLogic"]["recs"] and product not in (recs or [])

        again = submit.run(*wanted, env=env)
        assert again.code == 0, again.err
        assert again.computed == 0 and len(chat.requests) == len(with_title)
        assert {sink["status"] for sink in again.summary["sinks"].values()} == {"unchanged"}


def test_a_catalog_too_large_for_the_driver(
    submit: Submitter, chat: ChatServer, titles: dict[str, str]
) -> None:
    """The same answers where keys and results stay in Spark, and sinks are written by it."""
    env = {"SHOP_KEY": "any"}
    small = options(chat, "--set", f"logic_builders=[{LLM}, {SIMILAR}]", "--set", "warehouse=one")
    large = [option.replace("warehouse=one", "warehouse=two") for option in small]
    assert submit.ended(submit.featurekit(*small), env).code == 0
    ran = submit.run(*large, "--set", "engine.collect_mb=0", env=env)
    assert ran.code == 0, ran.err
    tables = [published(submit.home / name / "recommendations") for name in ("one", "two")]
    one, two = ({key: (row["recs"], row["scores"]) for key, row in table.items()} for table in tables)
    assert one == two
    again = submit.ended(submit.featurekit(*large), env)  # what one engine made, another finds
    assert again.summary["unchanged"] and again.summary["sinks"]["delta"]["status"] == "unchanged"
    # Ids that never reached the driver have no entry to be found.
    assert {name for name, counts in again.counts.items() if counts["computed"]} <= {"ProductIds"}


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--set", "search.topk=3"], 3, "--set search.topk: unknown key"),
        (["--frobnicate"], 2, "No such option: --frobnicate"),
    ],
)
def test_exit_codes_pass_through_spark_submit(
    submit: Submitter, chat: ChatServer, more: list[str], code: int, said: str
) -> None:
    ran = submit.run(*options(chat, *more))
    assert ran.code == code and said in ran.err and "Traceback" not in ran.err


def test_one_run_at_a_time_and_a_killed_one_leaves_no_lock(
    submit: Submitter, chat: ChatServer, titles: dict[str, str]
) -> None:
    command = submit.featurekit(*options(chat, "--set", "warehouse=locked"))
    env, asked = {"SHOP_KEY": "any"}, len(chat.requests)
    chat.delay_s = 5.0
    with submit.start(command, env) as first:
        deadline = time.monotonic() + 60
        while len(chat.requests) == asked and time.monotonic() < deadline:
            time.sleep(0.05)
        second = submit.ended(command, env)
        os.kill(first.pid, signal.SIGKILL)
    assert second.code == 75
    assert f"locked by process {first.pid} on " in second.err and "(shop in US) since " in second.err
    chat.delay_s = 0.0
    third = submit.ended(command, env)
    assert third.code == 0, third.err
