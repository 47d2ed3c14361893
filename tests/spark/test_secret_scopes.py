"""An API key out of a scope of Databricks secrets: read by the driver, used by workers, left nowhere."""

from __future__ import annotations

import base64
import json
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import ContextError
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.chat import chat_server
from featurekit_spark.testing.fakes import MovingClock
from tests import shop
from tests.databricks import Workspace, workspace
from tests.shop import Product, ProductIds, ShopContext

pytestmark = pytest.mark.spark

KEY = "sk-kept-in-a-scope-0123456789"
PRODUCTS = 80
ABT = {"merchant": "abt", "market": "US"}
# As it is, and as a part of anything longer in base64.
FORMS = (KEY, *(base64.b64encode(b"-" * at + KEY.encode()).decode()[4:-4] for at in range(3)))


@dataclass(frozen=True)
class ModelContext(ShopContext):
    llm: Any = None
    merchant_config: dict[str, Any] = field(default_factory=dict)


class Prompt(FeatureBuilder[str]):
    key, deps, value, version = shop.PRODUCT, (shop.Title,), pa.string(), "1"

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return f"about {inputs['Title']}"


class Asked(FeatureBuilder[str]):
    key, value, version = shop.PRODUCT, pa.string(), "1"
    deps = (LLMCompletion.on(prompt=Prompt),)

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        return str(inputs["LLMCompletion"])


@pytest.fixture
def scopes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    # Workers were started before, and know no workspace.
    with workspace(shop={"openai": KEY.encode()}) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def session(spark: Any, cache: DeltaCache, llm: OpenAIChat, *, executor: Any = "workers") -> Session:
    world = shop.World(
        products={("abt", "US", f"p{i:03}"): Product(f"lamp {i}", "acme", 1) for i in range(PRODUCTS)}
    )
    return Session(
        ModelContext(world, llm=llm, clock=MovingClock()),
        cache,
        spark=spark,
        limits=Limits(in_process_keys=0, batch_rows=20, partitions=2, executor=executor),
    )


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file's path and what it says, what is packed in it included."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                yield str(path), json.dumps(pq.read_table(path).to_pylist(), default=repr)


@pytest.mark.parametrize("executor", ["workers", "driver"])
def test_workers_have_the_key_and_files_have_not(
    spark: Any, tmp_path: Path, scopes: Workspace, capfd: Any, caplog: Any, executor: str
) -> None:
    caplog.set_level(logging.INFO)
    cache = DeltaCache(str(tmp_path / "warehouse" / "cache"))
    with chat_server() as server:
        llm = OpenAIChat(server.url, "m", api_key_secret="shop/openai", concurrency=4)
        runs = session(spark, cache, llm, executor=executor)
        assert str(runs.plan(Asked.over(ProductIds), **ABT)) and not scopes.asked, "a plan needs no key"
        result: RunResult = runs.run(Asked.over(ProductIds), **ABT)
        assert result.status == "ok", list(result.errors.values())[:3]
        assert set(server.keys) == {f"Bearer {KEY}"} and len(server.keys) == PRODUCTS
        assert scopes.asked == ["shop/openai"], "once, by the driver"

        assert runs.run(Asked.over(ProductIds), **ABT).unchanged
        assert scopes.asked == ["shop/openai"] and len(server.keys) == PRODUCTS
    out = capfd.readouterr()
    shown = f"{out.out}{out.err}{caplog.text}{result!r}{llm!r}{runs.context!r}{llm.identity}"
    assert not any(form in shown for form in FORMS)
    files = list(texts(tmp_path))
    assert len({path for path, _ in files if path.endswith(".parquet")}) >= 2
    for path, text in files:
        assert not any(form in text for form in FORMS), path
    assert KEY.encode() in pickle.dumps(llm), "it travels with the client, in the task alone"


def test_a_key_that_cannot_be_read_is_told_before_anything_is_computed(
    spark: Any, tmp_path: Path, scopes: Workspace
) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    with chat_server() as server:
        llm = OpenAIChat(server.url, "m", api_key_secret="shop/other")
        runs = session(spark, cache, llm)
        with pytest.raises(
            ContextError, match="the Databricks secret shop/other, the API key of m at .* cannot be"
        ):
            runs.run(Asked.over(ProductIds), **ABT)
        assert not server.requests and not cache.has("LLMCompletion") and not cache.has("Prompt")
        asked = len(scopes.asked)
        assert runs.estimate(Asked.over(ProductIds), **ABT).calls == PRODUCTS
        with pytest.raises(Exception, match="80 calls would have to be paid for"):
            runs.run(Asked.over(ProductIds), budget=Budget(no_new_calls=True), **ABT)
        assert len(scopes.asked) == asked, "nor does what makes no calls need one"
