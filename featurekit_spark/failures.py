"""Failures of paid keys: what an error's text tells of one, and which of them are remembered instead of asked again.

Knows errors and the cache's rows. How a call fails, and when it is tried again within a run, it does not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Literal, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import Bound, FeatureBuilder
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.cache.current import listed, newest_rows
from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    FeaturekitError,
    UsageError,
    ValueMismatchError,
    known_names,
)
from featurekit_spark.graph import Graph

__all__ = [
    "FailedKeys",
    "Failure",
    "FailureKind",
    "Failures",
    "KnownFailure",
    "RetryErrors",
    "failed_keys",
    "failure_in",
    "kind_of",
    "of_others",
    "retrying",
    "tagged",
    "unasked",
]


class FailureKind(Enum):
    """Whether asking again helps: later, never, or not before somebody pays."""

    RETRYABLE = "retryable"
    TERMINAL = "terminal"
    QUOTA = "quota"


RetryErrors: TypeAlias = Literal["retryable", "terminal", "quota", "all"]
"""Kinds of errors to ask again for."""

_TAG = re.compile(r"\[(retryable|terminal|quota), (\d+) attempts?\] ")
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Failure:
    """What an error's text tells: its kind, how many requests were made, and the message."""

    kind: FailureKind
    attempts: int
    message: str


def kind_of(error: Exception) -> FailureKind:
    """What an error of a paid builder means for later runs: what the library calls final is terminal, where it is the
    request's fault; what nobody knows may be another tomorrow."""
    match error:
        case BudgetError() if not error.retryable:
            return FailureKind.QUOTA
        case BuildError() | ValueMismatchError() if error.blames_request:
            return FailureKind.TERMINAL
        case _:
            return FailureKind.RETRYABLE


def of_others(error: Exception) -> Exception:
    """The same failure for requests that were not tried, because of those before them: they are not to blame."""
    match kind_of(error):
        case FailureKind.RETRYABLE:
            return error
        case FailureKind.TERMINAL:
            passed_on: FeaturekitError = BuildError(str(error))
        case FailureKind.QUOTA:
            passed_on = BudgetError(str(error))
    passed_on.attempts, passed_on.blames_request = 0, False
    return passed_on


def unasked(error: Exception | None) -> bool:
    """Whether a call was not made because another one had spent the quota: its key has no entry, and no error."""
    return isinstance(error, BudgetError) and error.attempts == 0


def tagged(message: str, error: Exception) -> str:
    """`message` as it is kept with a paid key: `[terminal, 1 attempt] the model refused`."""
    attempts = getattr(error, "attempts", None)
    attempts = 1 if attempts is None else attempts
    return f"[{kind_of(error).value}, {attempts} attempt{'' if attempts == 1 else 's'}] {message}"


def failure_in(error: str | None) -> Failure | None:
    """What the text of an error tells, `Builder["key"]: [terminal, 1 attempt] why`, the key's own or passed on by an
    input; None for a builder that is not paid, and for entries of before kinds were kept."""
    start = -1 if error is None else error.find("[")
    if error is None or start < 0:
        return None
    try:
        _, end = _JSON.raw_decode(error, start)
    except ValueError:
        return None
    found = _TAG.match(error, end + 2) if error.startswith(": ", end) else None
    if found is None:
        return None
    return Failure(FailureKind(found[1]), int(found[2]), error[found.end() :])


@dataclass(frozen=True, slots=True)
class KnownFailure:
    """An identity whose newest entry is an error. `kind`: None where its entry does not tell, which is asked again as
    what is retryable; `attempts`: of all its entries together."""

    error: str
    ts: datetime
    kind: FailureKind | None
    attempts: int

    @property
    def named(self) -> FailureKind:
        return self.kind or FailureKind.RETRYABLE


@dataclass(frozen=True)
class FailedKeys:
    """Keys of a paid builder that failed and were not answered since. `attempts`: requests made for them in all runs;
    `example`: the error of one of them."""

    builder: str
    kind: FailureKind
    keys: int
    attempts: int
    example: str

    @classmethod
    def summed(cls, builder: str, failures: Iterable[KnownFailure]) -> list[FailedKeys]:
        """A line for each kind that is there."""
        found: dict[FailureKind, list[KnownFailure]] = {}
        for failure in failures:
            found.setdefault(failure.named, []).append(failure)
        return [
            cls(builder, kind, len(own), sum(f.attempts for f in own), own[0].error)
            for kind in FailureKind
            if (own := found.get(kind, []))
        ]


class Failures:
    """What paid builders failed at before, by entry_id. A terminal failure stands as long as an answer would: its key
    is not asked again, unless `again` has its kind (of these `builders`, None: all).

    Reads each builder's entries once, when they are first asked for; travels to workers with what it has read.
    """

    def __init__(
        self,
        cache: FeatureCache,
        *,
        again: Collection[FailureKind] = (),
        builders: Collection[str] | None = None,
    ) -> None:
        self._cache: FeatureCache | None = cache
        self._again, self._builders = frozenset(again), None if builders is None else frozenset(builders)
        self._known: dict[tuple[str, str], Mapping[str, KnownFailure]] = {}
        self._asked_until: datetime | None = None

    def anew(self, now: datetime) -> Failures:
        """For another go of a run that began `now`: with what failed since, which is not asked again."""
        assert self._cache is not None  # a worker has no other go
        other = Failures(self._cache, again=self._again, builders=self._builders)
        other._asked_until = now
        return other

    def known(self, bound: Bound) -> Mapping[str, KnownFailure]:
        """Identities whose newest entry is an error of their own, of any kind."""
        place = bound.name, bound.config_hash
        if place not in self._known:
            self._known[place] = {} if self._cache is None else _read(self._cache, *place)
        return self._known[place]

    def remembers(self, bound: Bound) -> bool:
        """Whether what failed for good is not asked again."""
        asked = self._again if self._builders is None or bound.name in self._builders else ()
        return FailureKind.TERMINAL not in asked

    def standing(self, bound: Bound, now: datetime) -> Mapping[str, KnownFailure]:
        """Those that are not asked again now."""
        remembers, asked_until = self.remembers(bound), self._asked_until
        if not remembers and asked_until is None:
            return {}
        found = {}
        for identity, failure in self.known(bound).items():
            if not remembers and asked_until is not None and failure.ts < asked_until:
                continue
            until = bound.builder.freshness.expiry(failure.ts)
            if failure.kind is FailureKind.TERMINAL and (until is None or now < until):
                found[identity] = failure
        return found

    def read(self, bounds: Iterable[Bound]) -> Failures:
        """Itself, with what some builders failed at in memory: a worker has no cache."""
        for bound in bounds:
            self.known(bound)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}


def retrying(
    cache: FeatureCache,
    errors: RetryErrors | None,
    builders: Iterable[type[FeatureBuilder[Any]] | str] | None = None,
    *,
    graph: Graph | None = None,
) -> Failures:
    """The failures of a run that asks again for `errors` of some builders of a graph (None: of all). Raises UsageError
    for words and builders that mean nothing."""
    kinds = get_args(RetryErrors)
    if errors is not None and errors not in kinds:
        raise UsageError(f"retry_errors must be one of {', '.join(kinds)}; found {errors!r}")
    again = () if errors is None else FailureKind if errors == "all" else (FailureKind(errors),)
    names = None if builders is None else [b if isinstance(b, str) else b.name for b in builders]
    paid = [builder.name for builder in graph or () if builder.paid]
    for name in names or ():
        if name not in paid:
            raise UsageError(
                f"{name!r} is no paid builder of these targets, so there is nothing of it to ask again. "
                + known_names(name, paid)
            )
    return Failures(cache, again=frozenset(again), builders=names)


def failed_keys(cache: FeatureCache, paid: Iterable[Bound]) -> list[FailedKeys]:
    """What paid builders failed at and were not answered since, of all keys in the cache."""
    failures = Failures(cache)
    return [line for bound in paid for line in FailedKeys.summed(bound.name, failures.known(bound).values())]


def _read(cache: FeatureCache, name: str, config_hash: str) -> dict[str, KnownFailure]:
    if not cache.has(name):
        return {}
    # First whether there is any error at all: mostly there is none, and these columns are next to nothing.
    narrow = cache.history(name, ["config_hash", "status"])
    failed = pc.and_(pc.equal(narrow["config_hash"], config_hash), pc.equal(narrow["status"], "error"))
    if not pc.any(failed).as_py():
        return {}
    rows = cache.history(name, ["config_hash", "entry_id", "status", "error", "ts", "recorded"])
    rows = rows.filter(pc.equal(rows["config_hash"], config_hash))
    attempts: Counter[str] = Counter()
    for identity, text, _ in _own_errors(rows, name):
        told = failure_in(text)
        attempts[identity] += 1 if told is None else told.attempts
    found = {}
    for identity, text, ts in _own_errors(newest_rows(rows, "entry_id"), name):
        told = failure_in(text)
        found[identity] = KnownFailure(text, ts, None if told is None else told.kind, attempts[identity])
    return found


def _own_errors(rows: pa.Table, name: str) -> Iterator[tuple[str, str, datetime]]:
    """(entry_id, error, ts) of errors, those that an input passed on left out: these begin with another builder."""
    errors = rows.filter(pc.equal(rows["status"], "error"))
    errors = errors.filter(pc.starts_with(pc.fill_null(errors["error"], ""), f"{name}["))
    return zip(*(listed(errors[column]) for column in ("entry_id", "error", "ts")), strict=True)
