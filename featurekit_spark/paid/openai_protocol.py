"""What clients of the OpenAI protocol have in common: what a failed attempt means, the API key, and travelling.

Knows the SDK's errors and clients of any kind; what is asked and what an answer holds, it does not.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from featurekit_spark.errors import ContextError
from featurekit_spark.paid.retry import CallFailure, Clock, FailureKind, Sign, retry_after

__all__ = ["api_key", "copied", "final", "judged", "received", "unclear"]

State = tuple[tuple[str, Any], ...]
_TRIED_AGAIN = frozenset({408, 409})  # beside 429, and all from 500


def unclear(message: str) -> CallFailure:
    """An answer that is none, or a connection that was lost: another attempt may help."""
    return CallFailure(message, FailureKind.RETRYABLE, Sign.BROKEN)


def final(message: str) -> CallFailure:
    """The fault of what was asked: no attempt helps, and the server works."""
    return CallFailure(message, FailureKind.TERMINAL, Sign.WORKS)


def judged(error: Exception, clock: Clock, *, blames_request: Callable[[int], bool]) -> CallFailure:
    """What an attempt's failure means. `blames_request`: whether a status that is not worth another attempt is the
    fault of this one request, and not of key, model or address."""
    import openai

    match error:
        case openai.APIStatusError():
            said = f"status {error.status_code}: {error.message[:300]}"
            wait = retry_after(error.response.headers, clock)
            status = error.status_code
            if error.code == "insufficient_quota" or status == 402:
                return CallFailure(f"no quota left ({said})", FailureKind.QUOTA, Sign.BUSY)
            if status == 429:
                return CallFailure(said, FailureKind.RETRYABLE, Sign.BUSY, retry_after_s=wait)
            if status in _TRIED_AGAIN or status >= 500:
                return CallFailure(said, FailureKind.RETRYABLE, Sign.BROKEN, retry_after_s=wait)
            return (
                final(said)
                if blames_request(status)
                else CallFailure(said, FailureKind.TERMINAL, Sign.BROKEN)
            )
        case ValueError() | TypeError():  # half of a surrogate pair, say
            return final(f"the request cannot be sent: {type(error).__name__}: {error}")
        case _:  # a lost connection
            return unclear(f"{type(error).__name__}: {error}")


def api_key(variable: str, *, what: str) -> str:
    """The key that the environment holds now; ContextError where it holds none."""
    key = os.environ.get(variable)
    if not key:
        raise ContextError(
            f"the environment variable {variable} is not set, but {what} takes its API key from it. Set it (to any "
            "text if none is needed)."
        )
    return key


def received(kind: Any, state: State) -> Any:
    """A client that travelled: one for each configuration and process, so that its tasks keep its connections."""
    try:
        return _shared(kind, state)
    except TypeError:  # an attribute of a subclass that cannot be hashed
        return copied(kind, state)


def copied(kind: Any, state: State) -> Any:
    """A client with these attributes and connections of its own (`_lines`)."""
    made = kind.__new__(kind)
    made.__dict__.update(state, _lines=weakref.WeakKeyDictionary())
    return made


_shared = lru_cache(maxsize=16)(copied)
