"""A sample of cached keys, built again by a builder's code of today and compared with what is cached.

Fair by construction: a key counts only where its inputs are, by their hashes, those of the cached entry. Writes
nothing but answers that were paid for; pays for nothing but the sampled builder's own, and only if asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from featurekit_spark.batch import Batch
from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound, FeatureBuilder
from featurekit_spark.cache.base import FeatureCache, Found
from featurekit_spark.controller import Feature, HandController, run_clock
from featurekit_spark.errors import BuildError, NotBuiltError, UsageError
from featurekit_spark.evaluate import Evaluator, Lookup
from featurekit_spark.fingerprint import digest
from featurekit_spark.results import Origin, Result, new_entries, to_rows

__all__ = ["Disagreement", "Sample", "take_sample"]

Key = tuple[Any, ...]
_SHORT = 100
# So many keys are tried for each that is wanted, where inputs have moved on.
_TRIES = 20


@dataclass(frozen=True)
class Disagreement:
    """A key whose value is another by the new code: both values as text, shortened."""

    key: str
    old: str
    new: str


@dataclass
class Sample:
    """What a sample found. `skipped`: keys that could not be compared, by reason."""

    compared: int = 0
    disagreements: tuple[Disagreement, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    tokens: int = 0
    usd: float | None = 0.0


@dataclass(frozen=True)
class _Cached:
    value_hash: str
    payload: bytes | None


def take_sample(
    bound: Bound,
    old: pa.Table,
    *,
    bindings: Bindings,
    context: Any,
    cache: FeatureCache,
    group: Mapping[str, Any],
    size: int,
) -> Sample:
    """Build up to `size` keys of the entries `old` (ENTRY_SCHEMA, one config, ok) anew, and compare.

    The keys of `group`, in an order of chance that is the same each time. Where the sampled builder is paid, its calls
    are made; what they answered is kept as the new code's entries, whether or not it agrees.
    """
    columns = (old[name].to_pylist() for name in ("key", "inputs_hash", "value_hash", "value"))
    cached = {
        (key, inputs): _Cached(value_hash, value)
        for key, inputs, value_hash, value in zip(*columns, strict=True)
    }
    at = [(i, group[name]) for i, name in enumerate(bound.key) if name in group]
    keys = {text: tuple(json.loads(text)) for text, _ in cached}
    mine = [text for text, key in keys.items() if all(key[i] == value for i, value in at)]
    mine.sort(key=lambda text: digest("sample", bound.config_hash, text))
    found = Sample()
    if len(mine) < len(keys):
        found.skipped["another group's key"] = len(keys) - len(mine)
    sampler = _Sampler(bound, cached, bindings=bindings, context=context, cache=cache)
    wrong: list[Disagreement] = []
    for texts in _chunks(mine[: size * _TRIES], size):
        if found.compared >= size:
            break
        texts = texts[: size - found.compared]
        try:
            results = sampler.results_of([keys[text] for text in texts])
        finally:
            sampler.keep_paid(found)
        for text, result in zip(texts, results, strict=True):
            before = cached.get((text, result.inputs_hash or ""))
            reason = _not_compared(bound, result, before)
            if reason is not None or before is None:
                found.skipped[reason or ""] += 1
                continue
            found.compared += 1
            if result.failed or result.value_hash != before.value_hash:
                was = None if before.payload is None else bound.type.decode(before.payload)
                now = result.error if result.failed else _short(result.value)
                wrong.append(Disagreement(text, _short(was), now or ""))
    found.disagreements = tuple(wrong)
    return found


def _not_compared(bound: Bound, result: Result, before: _Cached | None) -> str | None:
    """Why a key says nothing about the new code, or None where it does."""
    if isinstance(result.cause, _NotTried):
        return str(result.cause)
    if result.origin is Origin.UPSTREAM or (
        bound.builder.is_dynamic() and isinstance(result.cause, BuildError)
    ):
        return "an input failed, or would have to be paid for"
    if result.origin is Origin.EMPTY:
        return "an input is null now"
    if result.failed and bound.builder.paid:
        return "its call failed"
    return "its inputs are others now" if before is None else None


def _chunks(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."


class _NotTried(Exception):
    """Stands for a value that the sample did not compute."""


class _Sampler(Evaluator):
    """Resolves one builder without its entries of today, and only where its inputs are those of a cached entry."""

    def __init__(
        self,
        sampled: Bound,
        cached: Mapping[tuple[str, str], _Cached],
        *,
        bindings: Bindings,
        context: Any,
        cache: FeatureCache,
    ) -> None:
        gathers = any(dep.keyset is not None for dep in sampled.deps)
        super().__init__(
            bindings,
            context,
            _Without(cache, sampled.name),
            now=run_clock(context),
            # Group-level inputs are taken as they are, except where gathering is what is compared.
            gather="build" if gathers else "current",
            controller=lambda evaluator: _Reader(context, cache, evaluator),
        )
        self._sampled, self._cached, self._cache = sampled, cached, cache
        self._bought: list[tuple[str, Result]] = []

    def results_of(self, keys: Sequence[Key]) -> list[Result]:
        try:
            return self.resolve(type(self._sampled.builder), keys)
        except NotBuiltError as error:
            raise UsageError(
                f"{self._sampled.name} cannot be sampled: {error} If its code changed as well, adopt that first."
            ) from error

    def keep_paid(self, found: Sample) -> None:
        """Append what was paid for since the last call, and count it."""
        bound, bought = self._sampled, self._bought
        self._bought = []
        if not bought:
            return
        for _, result in bought:
            found.calls += 1
            found.tokens += result.tokens or 0
            found.usd = None if found.usd is None or result.usd is None else found.usd + result.usd
        rows = to_rows(bound.name, bound.config_hash, bought)
        self._cache.append(new_entries(rows, "adopt-sample"))

    def _build(self, batch: Batch, misses: list[int]) -> None:
        name, paid = batch.bound.name, batch.bound.builder.paid
        sampled = name == self._sampled.name
        todo = []
        for row in misses:
            if sampled and batch.identities[row][:2] not in self._cached:
                batch.results[row] = _not_tried("its inputs are others now")
            elif paid and not sampled:
                batch.results[row] = _not_tried(f"{name} would have to be paid for")
            else:
                todo.append(row)
        if not todo:
            return
        try:
            self._build_anew(batch, todo)  # not by update: what the code makes of the inputs is asked
        finally:
            if sampled and paid:
                made = ((batch.identities[row][0], batch.results[row]) for row in todo)
                self._bought += [(text, result) for text, result in made if result is not None]

    def _resolve_source(self, bound: Bound, keys: list[Key]) -> Sequence[Result | None]:
        if bound.builder.paid:
            return [_not_tried(f"{bound.name} would have to be paid for") for _ in keys]
        return super()._resolve_source(bound, keys)

    def _resolve_dynamic(self, bound: Bound, key: Key) -> Result:
        if bound.builder.paid:
            return _not_tried("a paid builder with a get by hand cannot be sampled")
        return super()._resolve_dynamic(bound, key)


def _not_tried(reason: str) -> Result:
    result = Result(Origin.ERROR, None, error=reason)
    result.cause = _NotTried(reason)
    return result


class _Without:
    """A cache as an evaluator reads it, one builder's entries left out."""

    def __init__(self, cache: Lookup, name: str) -> None:
        self._cache, self._name = cache, name

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> Mapping[str, Found]:
        return {} if builder == self._name else self._cache.find(builder, config_hash, wanted)

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> Mapping[str, Found]:
        return {} if builder == self._name else self._cache.current(builder, config_hash, keys)

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> Sequence[Found]:
        return [] if builder == self._name else self._cache.candidates(builder, config_hash, keys)


class _Reader(HandController):
    """What a hand-written get reads through in a sample. Reads with a config of their own would write and pay."""

    def get_many(
        self,
        feature_builder: type[FeatureBuilder[Any]],
        keys: Sequence[Key | Mapping[str, Any]],
        configs: Mapping[Any, Any] | None = None,
        *,
        gather: bool = False,
    ) -> list[Feature[Any]]:
        if configs or gather:
            raise _NotTried("its get reads with configs of its own, or gathers")
        return super().get_many(feature_builder, keys)
