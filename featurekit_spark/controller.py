"""One feature, or a batch of them, in-process: the controller, and the answer object that everyone gets.

Knows the evaluator and the cache's protocol; no Spark, no files.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Literal, TypeVar

import pyarrow as pa

from featurekit_spark.asking import asking
from featurekit_spark.bindings import Bindings
from featurekit_spark.budget import Purse
from featurekit_spark.build import Built
from featurekit_spark.builder import (
    Bound,
    FeatureBuilder,
    import_path,
    load_builder,
    parse_key,
)
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.errors import BudgetError, BuildError, ContextError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.failures import Failures, RetryErrors, retrying
from featurekit_spark.fingerprint import entry_id, inputs_hash, key_json
from featurekit_spark.freshness import NO_FALLBACK
from featurekit_spark.graph import Graph
from featurekit_spark.results import ROW_SCHEMA, Origin, Read, Result, new_entries, new_pointers, to_rows

__all__ = ["BoundFeature", "Controller", "Feature", "commit", "run_clock"]

V = TypeVar("V")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Feature(Generic[V]):
    """An answer. `ts`: when the value was computed (aware, UTC; None where there is none), `age`: since then.

    `status`: fresh, stale, fallback (the declared stand-in) or error; `origin`: how this request came by it.
    """

    value: V | None
    ts: datetime | None
    value_hash: str
    status: Literal["fresh", "stale", "fallback", "error"]
    age: timedelta | None
    origin: str
    error: str | None = None

    def require(self) -> V | None:
        """The value; raises BuildError where the status is error."""
        if self.status == "error":
            raise BuildError(self.error or "failed without a message")
        return self.value


class Controller:
    """Gets features for single keys or batches through `cache`, computing what is missing. Paid keys that failed for
    good are not asked again, unless `retry_errors` is "terminal" or "all".

    >>> Controller(context, cache).get(LLMLogic, ("abt", "US", "abt-00001")).value  # doctest: +SKIP
    ['abt-00017', ...]
    """

    def __init__(self, context: Any, cache: FeatureCache, *, retry_errors: RetryErrors | None = None) -> None:
        self.context = context
        self.cache = cache
        self.retry_errors = retry_errors
        self.purse: Purse | None = None
        self.failures: Failures | None = None
        self._bindings: dict[type, Bindings] = {}

    def get(
        self,
        feature_builder: type[FeatureBuilder[V]],
        key: Key | Mapping[str, Any],
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> Feature[V]:
        """One feature. `key`: a tuple in the order of the builder's key fields, or a mapping by name.

        `configs`: overrides for any builder in the graph, by class or name. `gather=True` builds a group-level
        feature that was never built; without it that is a NotBuiltError. Also UsageError, DefinitionError.
        """
        return self.get_many(feature_builder, [key], configs, gather=gather)[0]

    def get_many(
        self,
        feature_builder: type[FeatureBuilder[V]],
        keys: Sequence[Key | Mapping[str, Any]],
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> list[Feature[V]]:
        """Features for a batch of keys, in their order."""
        parsed = [parse_key(feature_builder, key) for key in keys]
        now = run_clock(self.context)
        evaluator = Evaluator(
            self._bound(feature_builder, configs),
            self.context,
            self.cache,
            now=now,
            gather="build" if gather else "current",
            controller=lambda e: HandController(self.context, self.cache, e),
            purse=self.purse,
            failures=self.failures or retrying(self.cache, self.retry_errors),
        )
        try:
            results = evaluator.resolve(feature_builder, parsed)
        finally:
            # What was built before an error is kept: it may have been paid for.
            if commit(self.cache, evaluator, run_id="in-process"):
                self.cache.drop_marks()
        return [_feature(evaluator.bindings[feature_builder], result, now) for result in results]

    async def aget(
        self,
        feature_builder: type[FeatureBuilder[V]],
        key: Key | Mapping[str, Any],
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> Feature[V]:
        """`get` for async callers; the caller's loop stays free."""
        return await asyncio.to_thread(self.get, feature_builder, key, configs, gather=gather)

    def _bound(self, builder: type, configs: Mapping[Any, Any] | None) -> Bindings:
        if configs:
            return Bindings(self.context, configs).bind_all(Graph([builder]))
        if builder not in self._bindings:
            self._bindings[builder] = Bindings(self.context).bind_all(Graph([builder]))
        return self._bindings[builder]


class HandController(Controller):
    """What a hand-written `get` reads through: the same evaluation, with a record of what was read."""

    def __init__(self, context: Any, cache: FeatureCache, evaluator: Evaluator) -> None:
        super().__init__(context, cache)
        self._evaluator, self.purse, self.failures = evaluator, evaluator.purse, evaluator.failures
        self._reads: list[Read] | None = None

    def get_many(
        self,
        feature_builder: type[FeatureBuilder[V]],
        keys: Sequence[Key | Mapping[str, Any]],
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> list[Feature[V]]:
        if configs or gather:
            features = super().get_many(feature_builder, keys, configs, gather=gather)
            own = [f"?{feature.value_hash}" for feature in features]
        else:
            parsed = [parse_key(feature_builder, key) for key in keys]
            graph = Graph([feature_builder])
            self._evaluator.bindings.include(graph)
            results = self._evaluator.resolve(feature_builder, parsed)
            bound = self._evaluator.bindings[feature_builder]
            features = [_feature(bound, result, self._evaluator.now) for result in results]
            own = [import_path(feature_builder)] * len(features)
        if self._reads is not None:
            for path, key, feature in zip(own, keys, features, strict=True):
                text = key_json(parse_key(feature_builder, key))
                self._reads.append((path, text, feature.value_hash))
        return features

    def still_reads(self, recorded: str) -> bool:
        """Whether everything in a recorded list of reads has the same value today."""
        for path, key, value_hash in json.loads(recorded):
            if path.startswith("?"):  # read with a config of its own, which is not recorded
                return False
            if self.get(load_builder(path), tuple(json.loads(key))).value_hash != value_hash:
                return False
        return True

    def run_by_hand(self, bound: Bound, key: Key, now: datetime) -> Result:
        """Call the hand-written `get`; what it read becomes its inputs."""
        self._reads = []
        # Declared needs are enforced; a get that declares none reads what it likes, and only what it reads through
        # the controller makes it run again.
        context = bound.view(self.context) if bound.builder.needs else self.context
        try:
            with asking(bound.name, key):
                value, own_hash = bound.builder.get(key, bound.config, context, self)
            built = Built(value)
        except (BudgetError, ContextError):
            raise
        except Exception as error:
            built, own_hash = Built(error=error), ""
        reads = tuple(dict.fromkeys(self._reads))
        text = key_json(key)
        inputs = inputs_hash([f"{path} {read} {value_hash}" for path, read, value_hash in reads])
        identity = entry_id(bound.name, bound.config_hash, text, inputs)
        result = built.result(bound, key, now, inputs_hash=inputs, entry_id=identity, reads=reads)
        if not result.failed and own_hash:
            result.value_hash = own_hash
        return result


@dataclass(frozen=True)
class BoundFeature(Generic[V]):
    """A builder bound to a cache, `cache(Builder)`: its `get` returns the bare value."""

    builder: type[FeatureBuilder[V]]
    cache: FeatureCache

    def get(
        self,
        *,
        key: Key | Mapping[str, Any],
        context: Any,
        cache: FeatureCache | None = None,
        config: Any = None,
        gather: bool = False,
    ) -> V | None:
        """The value for `key`; without `config` the builder's `default_config(context)`. Raises BuildError."""
        configs = None if config is None else {self.builder: config}
        controller = Controller(context, self.cache if cache is None else cache)
        return controller.get(self.builder, key, configs, gather=gather).require()


def run_clock(context: Any) -> datetime:
    """The instant of `context.clock`, checked to be aware; in UTC. Without a clock, now."""
    clock = getattr(context, "clock", None)
    now = clock() if clock is not None else datetime.now(UTC)
    if now.tzinfo is None:
        raise ContextError(
            f"context.clock returned {now!r} without a zone; return an aware datetime, such as UTC"
        )
    return now.astimezone(UTC)


def commit(cache: FeatureCache, evaluator: Evaluator, *, run_id: str) -> bool:
    """Append what the evaluator made since the last commit: its entries, then the pointers to them. Whether there was
    anything."""
    tables, by_hand = [], set()
    bound: dict[str, tuple[str, bool, bool]] = {}
    for builder, known in evaluator.bindings.items():
        bound[builder.name] = (known.config_hash, builder.inline, builder.is_dynamic())
    for name, pairs in evaluator.take_made().items():
        config_hash, inline, dynamic = bound[name]
        if not inline:
            tables.append(to_rows(name, config_hash, pairs))
        if dynamic:
            by_hand.add(name)
    rows = pa.concat_tables(tables) if tables else ROW_SCHEMA.empty_table()
    entries, pointers = new_entries(rows, run_id), new_pointers(rows, by_hand, evaluator.now, run_id)
    if len(entries) or pointers:
        cache.append(entries, pointers)
    return bool(len(entries) or pointers)


def _feature(bound: Bound, result: Result, now: datetime) -> Feature[Any]:
    fallback = bound.builder.freshness.fallback
    if result.failed:
        if fallback is not NO_FALLBACK:
            value, value_hash = bound.builder.hashed(fallback, bound.config)
            return Feature(value, None, value_hash, "fallback", None, "fallback", result.error)
        return Feature(None, result.ts, "", "error", None, result.origin.value, result.error)
    age = None if result.ts is None else now - result.ts
    origin = Origin.COMPUTED if result.origin is Origin.EMPTY else result.origin
    return Feature(result.value, result.ts or now, result.value_hash or "", "fresh", age, origin.value)
