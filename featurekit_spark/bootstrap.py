"""The one place that picks real adapters from settings: cache, product_db, llm, embedder, sinks, session."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurekit_spark.builder import FeatureBuilder, KeySet, load_builder
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.context import Context, FixedClock, utc_now
from featurekit_spark.embed.base import Embedder
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.errors import ConfigError
from featurekit_spark.execute import Progress
from featurekit_spark.llm.base import ChatModel
from featurekit_spark.llm.offline import OfflineLLM
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.locks import file_lock
from featurekit_spark.search.matrix import MatrixStore
from featurekit_spark.session import Limits, Session
from featurekit_spark.settings import DeltaSinkSettings, Settings
from featurekit_spark.sinks.base import Sink
from featurekit_spark.sinks.delta import DeltaSink
from featurekit_spark.sinks.redis import RedisSink
from featurekit_spark.sources.base import ProductDB, ScannableProductDB
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.sources.interactions import (
    DeltaInteractionDB,
    FileInteractionDB,
    InteractionDataDB,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Bootstrap"]


class Bootstrap:
    """Everything a run of one merchant and market needs, each built once, when first asked for."""

    def __init__(
        self,
        settings: Settings,
        *,
        merchant: str,
        market: str,
        run_date: date | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings, self.merchant, self.market = settings, merchant, market
        self.run_date, self.progress = run_date, progress
        self._spark: SparkSession | None = None

    @cached_property
    def cache(self) -> FeatureCache:
        if self.settings.cache.kind == "memory":
            return MemoryCache()
        return DeltaCache(self.settings.cache_path)

    @cached_property
    def context(self) -> Context:
        settings = self.settings
        return Context(
            product_db=self.get_product_db(),
            interaction_data_db=self.get_interaction_data_db(),
            merchant_config=self.get_merchant_config(self.merchant),
            llm=self.get_llm(),
            embedder=self.get_embedder(),
            matrices=MatrixStore(f"{settings.warehouse.rstrip('/')}/matrices"),
            clock=self.get_clock(),
        )

    def get_feature_cache(self) -> FeatureCache:
        """The cache at `cache.path`."""
        return self.cache

    def get_product_db(self) -> ProductDB:
        """The catalog of this merchant and market. Raises ConfigError where it is not there."""
        db = self.settings.product_db
        make = {"files": FileProductDB, "delta": DeltaProductDB}[db.kind]
        product_db: ProductDB = make(
            db.required_path(), merchant=self.merchant, market=self.market, duplicates=db.duplicates
        )
        return product_db

    def get_interaction_data_db(self) -> InteractionDataDB | None:
        """The interaction log, where one is configured."""
        db = self.settings.interaction_data_db
        if db.kind == "none" or db.path is None:
            return None
        make = {"files": FileInteractionDB, "delta": DeltaInteractionDB}[db.kind]
        interactions: InteractionDataDB = make(db.path)
        return interactions

    def get_merchant_config(self, merchant: str) -> Mapping[str, Any]:
        """What builders read of a merchant's configuration: plain values, no secrets."""
        settings = self.settings
        return {
            "merchant": merchant,
            "market": self.market,
            "logic_builders": list(settings.logic_builders),
            "prompt_template": settings.prompt_template,
            "title_attribute": settings.product_db.title_attribute,
            "dimensions": dict(settings.product_db.dimensions.get(self.market, {})),
            "top_k": settings.search.top_k,
            "suggestions": settings.llm.suggestions,
            "temperature": settings.llm.temperature,
            "max_tokens": settings.llm.max_tokens,
        }

    def get_llm(self) -> ChatModel:
        """The configured chat model; `offline` is a stand-in that says it is one."""
        llm = self.settings.llm
        if llm.provider == "offline":
            return OfflineLLM(suggestions=llm.suggestions)
        return OpenAIChat(
            base_url=llm.base_url,
            model=llm.model or "",
            api_key_env=llm.api_key_env,
            concurrency=llm.concurrency,
            timeout_s=llm.timeout_s,
        )

    def get_embedder(self) -> Embedder:
        return HashingEmbedder(dim=self.settings.embedder.dim)

    def get_clock(self) -> Any:
        """The clock of a run: the real one, or noon UTC of `run_date`."""
        if self.run_date is None:
            return utc_now
        return FixedClock(datetime.combine(self.run_date, time(12), tzinfo=UTC))

    def get_session(self) -> Session:
        """The session; no SparkSession is started before a stage needs one."""
        engine = self.settings.engine
        limits = Limits(
            in_process_keys=engine.in_process_keys,
            batch_rows=engine.batch_rows,
            partitions=engine.partitions,
            collect_mb=engine.collect_mb,
        )
        return Session(
            self.context, self.cache, engine=engine.kind, spark=self.get_spark, limits=limits, progress=self.progress
        )

    def get_spark(self) -> SparkSession:
        """The SparkSession of spark-submit, of the notebook, or a new one; never with a master of our own."""
        from pyspark.sql import SparkSession

        if self._spark is None:
            builder = SparkSession.builder.appName(f"featurekit {self.merchant} {self.market}")
            self._spark = builder.getOrCreate()
        return self._spark

    def get_logic_builders(self) -> list[type[FeatureBuilder[Any]]]:
        """The classes that `logic_builders` names."""
        return [load_builder(path) for path in self.settings.logic_builders]

    def get_logic_keys(self) -> type[KeySet]:
        """The key set that `logic_keys` names."""
        found = load_builder(self.settings.logic_keys)
        if not issubclass(found, KeySet):
            raise ConfigError(f"logic_keys: {self.settings.logic_keys!r} is a {found.__name__}, not a KeySet class")
        return found

    def get_sinks(self) -> list[Sink]:
        """Where recommendations are published."""
        sinks: list[Sink] = []
        for sink in self.settings.sinks:
            if isinstance(sink, DeltaSinkSettings):
                sinks.append(DeltaSink(self.settings.sink_path(sink)))
            else:
                sinks.append(
                    RedisSink(
                        sink.url,
                        key_template=sink.key_template,
                        key_template_other=sink.key_template_other,
                        ttl_s=sink.ttl_s,
                        publish_as=sink.publish,
                        batch=sink.batch,
                        timeout_s=sink.timeout_s,
                    )
                )
        return sinks

    def get_quality(self) -> Mapping[str, int]:
        """What the catalog's reader counted: rows, dropped duplicates, missing titles."""
        product_db = self.context.product_db
        if not isinstance(product_db, ScannableProductDB):
            return {}
        config = self.settings.product_db
        dimensions = config.dimensions.get(self.market, {})
        return product_db.scan([config.title_attribute], dimensions=dimensions).quality()

    def run_lock(self) -> AbstractContextManager[Any]:
        """One run per merchant and market at a time, wherever the warehouse is on a local path."""
        warehouse = self.settings.warehouse
        if "://" in warehouse and not warehouse.startswith("file://"):
            return nullcontext()  # an object store has no lock; the scheduler keeps runs apart there
        path = Path(warehouse.removeprefix("file://")) / "locks" / f"{self.merchant}_{self.market}.lock"
        return file_lock(path, timeout_s=0, owner=f"run of {self.merchant} {self.market}")

    def close(self) -> None:
        """Stop the SparkSession, if one was started."""
        if self._spark is not None:
            self._spark.stop()
            self._spark = None
