"""What a server of the OpenAI protocol says to a request for embeddings: vectors and a token count, or why not.

Owns which vector is whose, and whether asking again helps. Knows no client, and nothing of how texts come together.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurekit_spark.paid.retry import CallFailure, Clock, FailureKind, Sign, retry_after

__all__ = ["Answer", "answer_of", "judged"]

_TRIED_AGAIN = frozenset({408, 409})  # beside 429, and all from 500
_OF_ONE_TEXT = frozenset({400, 413, 422})  # may be the fault of one text, and not of key or model


@dataclass(frozen=True)
class Answer:
    """One vector per text, in their order; `tokens` None: the provider does not say."""

    vectors: list[Any]
    tokens: int | None


def answer_of(body: bytes, count: int) -> Answer:
    """An answer for `count` texts. CallFailure for what is none, or does not say which vector is whose: a vector may
    never go to another text."""
    try:
        answer = json.loads(body)
        found = {item["index"]: _numbers(item["embedding"]) for item in answer["data"]}
        usage = answer.get("usage") or {}
        tokens = usage.get("prompt_tokens")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unclear(f"the server's answer has no vectors ({error!r}): {body[:200]!r}") from None
    if len(answer["data"]) != count or set(found) != set(range(count)):
        raise _unclear(f"the server's answer has other vectors than those of the {count} texts it was sent")
    counted = tokens if isinstance(tokens, int) and tokens > 0 else None
    return Answer([found[index] for index in range(count)], counted)


def _numbers(embedding: Any) -> Any:
    """A vector as base64 of little-endian float32, or as a list: servers need not do what was asked for."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    vector = np.asarray(embedding, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError("no list of numbers")
    return vector


def _unclear(message: str) -> CallFailure:
    return CallFailure(message, FailureKind.RETRYABLE, Sign.BROKEN)


def judged(error: Exception, clock: Clock) -> CallFailure:
    """What an attempt's failure means; `Sign.WORKS` where it may be the fault of one text."""
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
            sign = Sign.WORKS if status in _OF_ONE_TEXT else Sign.BROKEN
            return CallFailure(said, FailureKind.TERMINAL, sign)
        case ValueError() | TypeError():  # half of a surrogate pair, say
            said = f"the request cannot be sent: {type(error).__name__}: {error}"
            return CallFailure(said, FailureKind.TERMINAL, Sign.WORKS)
        case _:  # a lost connection
            return _unclear(f"{type(error).__name__}: {error}")
