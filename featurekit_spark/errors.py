"""The errors of featurekit_spark, all in one tree.

* FeaturekitError
  + DefinitionError            a builder, a dep or a graph is declared wrongly
    - CycleError               deps lead back to where they started
    - UnknownBuilderError      a name that no builder of the graph has
  + ConfigError                a configuration value or a file it names cannot be used
  + UsageError                 arguments that make no sense (a key of the wrong length, a bad merchant)
  + ContextError               a context attribute is missing, undeclared, or cannot travel to workers
  + DataError                  the data breaks a rule that the run depends on
    - PublishGateError         the result is too small to replace what is published
  + ValueMismatchError         a value does not fit the builder's declared type
  + BuildError                 a builder failed for a key
  + NotBuiltError              the group a feature needs was never computed
  + CacheError                 the cache's tables cannot be read or written as they are
  + BudgetError                a budget or quota stopped the run
    - BudgetReachedError (retryable) the run's own limit was reached; running it again goes on
      = AnswersPendingError (retryable) calls were handed in, and a later run takes the answers in
    - NewCallsError            something would have to be paid for, and the run may not
  + ServiceError   (retryable) an outside service failed or did not answer
  + LockedError    (retryable) somebody else holds the lock

A message says what failed, what was found, and what to do. `retryable` lives on the class; exit and
HTTP codes belong to the command line and to serving.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar, Self

__all__ = [
    "AnswersPendingError",
    "BudgetError",
    "BudgetReachedError",
    "BuildError",
    "CacheError",
    "ConfigError",
    "ContextError",
    "CycleError",
    "DataError",
    "DefinitionError",
    "FeaturekitError",
    "LockedError",
    "NewCallsError",
    "NotBuiltError",
    "PublishGateError",
    "ServiceError",
    "UnknownBuilderError",
    "UsageError",
    "ValueMismatchError",
    "known_names",
]


class FeaturekitError(Exception):
    """Root of every error this library raises on purpose. `tokens`, `usd`: what it cost, where anybody knows, all
    attempts together; `estimated_tokens`: how many of them were counted here and not by the provider.
    `answer`: a model's text that could not be used, kept with the error. `attempts`: how many requests were made, None
    where nobody counted. `blames_request`: the request is at fault, and not what it was made with (a wrong key)."""

    retryable: ClassVar[bool] = False
    tokens: int | None = None
    usd: float | None = None
    estimated_tokens: int = 0
    attempts: int | None = None
    blames_request: bool = True
    answer: str | None = None

    def with_cost(self, tokens: int | None, usd: float | None, estimated_tokens: int = 0) -> Self:
        """The same error, of a call that was paid for all the same: a refusal is."""
        self.tokens, self.usd, self.estimated_tokens = tokens, usd, estimated_tokens
        return self


class DefinitionError(FeaturekitError):
    """A builder, a dep or a graph is declared wrongly; found before anything runs."""


class CycleError(DefinitionError):
    """Deps lead back to where they started; the message draws the loop."""


class UnknownBuilderError(DefinitionError):
    """A name that no builder of the graph has; the message lists those that exist."""


class ConfigError(FeaturekitError):
    """A configuration value, or a file it names, cannot be used; the message gives file and key path."""


class UsageError(FeaturekitError):
    """Arguments that make no sense, such as a key with too few fields."""


class ContextError(FeaturekitError):
    """A context attribute is missing, not declared in `needs`, or cannot travel to Spark workers."""


class DataError(FeaturekitError):
    """The data breaks a rule that the run depends on (missing column, refused duplicates)."""


class PublishGateError(DataError):
    """The result shrank by more than the configured share; nothing was published."""


class ValueMismatchError(FeaturekitError):
    """A value does not fit the declared type; the message names builder and key."""


class BuildError(FeaturekitError):
    """A builder failed for a key; the message names the root builder and key."""


class NotBuiltError(FeaturekitError):
    """A group-level feature has no entry yet and gathering was not asked for."""


class CacheError(FeaturekitError):
    """The cache's tables cannot be read or written as they are (damage, newer schema)."""


class BudgetError(FeaturekitError):
    """A budget or quota stopped the run; everything paid for is kept."""


class BudgetReachedError(BudgetError):
    """The run's own limit on calls or money was reached; everything paid for is kept, and the next run goes on."""

    retryable: ClassVar[bool] = True


class AnswersPendingError(BudgetReachedError):
    """Calls were handed in whose answers are still to come: the run ended, and a later one takes them in."""


class NewCallsError(BudgetError):
    """Calls would have to be paid for, and the run may make none: it names them, and did not begin."""


class ServiceError(FeaturekitError):
    """An outside service failed or did not answer in time."""

    retryable: ClassVar[bool] = True


class LockedError(FeaturekitError):
    """Somebody else holds the lock; the message says who and since when."""

    retryable: ClassVar[bool] = True


def known_names(wanted: str, existing: Iterable[str]) -> str:
    """The tail of an error message: what exists, and the nearest name if one is near."""
    names = sorted(existing)
    near = get_close_matches(wanted, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Known: {', '.join(names) or 'none'}.{hint}"
