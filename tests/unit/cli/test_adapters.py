"""The main job with what is real in production: a model behind HTTP, and Redis."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pytest
import redis

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.llm.completion import LIST_INSTRUCTION
from featurekit_spark.sinks import read_recs
from featurekit_spark.sinks.redis import KEY_TEMPLATE_OTHER
from featurekit_spark.testing.chat import chat_server
from featurekit_spark.testing.redis import redis_server

Workplace = Any
BOTH = (
    "logic_builders=[featurekit_spark.apps.product_recs:LLMLogic, "
    "featurekit_spark.apps.product_recs:SimilarProducts]"
)


def suggest(prompt: str) -> str:
    return "1. table lamp\n2. " + prompt.removeprefix("get recommendations for ")


def test_a_model_behind_http(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-secret")
    titles = {"p1": "red table lamp", "p2": "blue table lamp", "p3": 'the "{title}" \u00e9', "p4": "tea cup"}
    workplace.catalog({**titles, "p5": "red table lamp"})
    with chat_server(suggest) as server:
        llm = f"llm={{provider: openai, model: m, base_url: '{server.url}', api_key_env: SHOP_KEY}}"
        ran = workplace.run("--set", llm)
        assert ran.code == 0 and len(ran.err.splitlines()) == 1
        assert ran.err.startswith("warning: LLMCompletion made 4 calls whose price is not known")
        assert Counter(server.prompts) == Counter(f"get recommendations for {t}" for t in titles.values())
        assert server.requests[0]["messages"][0]["content"].startswith(LIST_INSTRUCTION)
        assert server.requests[0]["model"] == "m" and server.requests[0]["temperature"] == 0.0
        counts = ran.summary["builders"]["LLMCompletion"]
        assert (counts["computed"], counts["calls"], counts["tokens"]) == (4, 4, 40)
        assert counts["usd"] is None  # no price is known
        assert workplace.recs()["p4"][0] in {"p1", "p2", "p5"}

        again = workplace.run("--set", llm)
        assert again.calls == 0 and len(server.requests) == 4
        workplace.run("--set", llm, "--set", "search.top_k=2")
        assert len(server.requests) == 4
    assert "sk-secret" not in ran.out + ran.err


def test_a_prompt_that_the_model_refuses(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chat_server(suggest) as server:
        llm = f"llm={{provider: openai, model: m, base_url: '{server.url}', concurrency: 1}}"
        server.fails(400)
        ran = workplace.run("--set", llm)
        assert (ran.code, ran.summary["builders"]["LLMCompletion"]["error"]) == (5, 1)
        assert "LLMCompletion" in ran.err and "status 400" in ran.err
        assert len(workplace.recs()) == 6 and ran.summary["quality"]["without_recommendations"] == 1
        ran = workplace.run("--set", llm)
        assert (ran.code, ran.calls) == (5, 0)
        assert len(server.requests) == 6


def test_an_account_without_quota(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chat_server(suggest) as server:
        llm = f"llm={{provider: openai, model: m, base_url: '{server.url}', concurrency: 1}}"
        for _ in range(6):
            server.fails(429, "insufficient_quota")
        ran = workplace.run("--set", llm)
        assert ran.code == 6 and "no quota left" in ran.err and "Traceback" not in ran.err
        assert not (workplace.warehouse / "recommendations").exists()
        server.script.clear()
        assert workplace.run("--set", llm).code == 0


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis(workplace: Workplace) -> None:
    workplace.catalog({"p1": "red lamp", "p/2": "blue lamp", "p\u00e93": "green lamp"})
    with redis_server() as url, redis.Redis.from_url(url) as client:
        sinks = f"sinks=[{{kind: delta}}, {{kind: redis, url: '{url}'}}]"
        ran = workplace.run("--set", sinks, "--set", BOTH)
        assert (ran.code, ran.summary["sinks"]["redis"]["rows"]) == (0, 6)
        assert client.get("abt:US:p%2F2") is not None
        found = {(row["product_id"], row["logic_builder"]): row["recs"] for row in workplace.published()}
        for (product, builder), recs in found.items():
            more = {} if builder == "LLMLogic" else {"logic_builder": builder, "template": KEY_TEMPLATE_OTHER}
            assert read_recs(client, product, merchant="abt", market="US", **more) == recs

        again = workplace.run("--set", sinks, "--set", BOTH)
        assert {sink["status"] for sink in again.summary["sinks"].values()} == {"unchanged"}
        client.flushall()
        ran = workplace.run("--set", sinks, "--set", BOTH)
        assert [sink["status"] for sink in ran.summary["sinks"].values()] == ["unchanged", "published"]
        assert client.get("abt:US:p1") is not None and ran.computed == 0

        template = sinks.replace("url", "key_template: 'recs/{product_id}', url")
        ran = workplace.run("--set", template, "--set", BOTH)
        assert ran.summary["sinks"]["redis"]["status"] == "published"
        assert client.get("recs/p1") is not None and client.get("abt:US:p1") is None


def test_calls_by_batch_end_a_run_and_the_next_collects(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chat_server(suggest) as server:
        llm = (
            f"llm={{provider: openai, model: m, base_url: '{server.url}', mode: batch, "
            "price: {input: 1000000, output: 1000000}}"
        )
        stopped = workplace.run("--set", llm)
        assert (stopped.code, stopped.summary["status"], stopped.summary["sinks"]) == (75, "stopped", {})
        assert stopped.err.startswith("stopped: waiting for batch batch_1 (validating, 0 of 6 done")
        server.batches.polls = 0
        ran = workplace.run("--set", llm)
        assert (ran.code, ran.calls, len(server.batches.prompts)) == (0, 0, 6), (
            "they were the other run's calls"
        )
        assert workplace.recs()["p4"]
        entries = DeltaCache(str(workplace.warehouse / "cache")).history("LLMCompletion")
        assert entries["usd"].to_pylist() == [5.0] * 6, "ten tokens, each at half a dollar"
        again = workplace.run("--set", llm)
        assert (again.code, again.calls, len(server.batches.prompts)) == (0, 0, 6)
        refused = workplace.run("--set", llm, "--set", "cache.kind=memory")
        assert refused.code == 3 and "llm.mode is batch, but cache.kind is memory" in refused.err
    assert "sk-secret" not in stopped.out + stopped.err + ran.out + ran.err
