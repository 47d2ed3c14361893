"""What a server of the OpenAI protocol says to a request for embeddings: vectors and a token count.

Owns which vector is whose. Knows no client, and nothing of how texts come together.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurekit_spark.paid.openai_protocol import unclear
from featurekit_spark.paid.retry import CallFailure

__all__ = ["Answer", "answer_of"]


@dataclass(frozen=True)
class Answer:
    """One vector per text, in their order; `tokens` None: the provider does not say."""

    vectors: list[Any]
    tokens: int | None


def answer_of(body: bytes, count: int) -> Answer:
    """An answer for `count` texts. CallFailure, with the tokens that it says it took, for what is none, or does not say
    which vector is whose: a vector may never go to another text."""
    counted = None
    try:
        answer = json.loads(body)
        counted = _tokens(answer)
        found = {item["index"]: _numbers(item["embedding"]) for item in answer["data"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _none(f"no vectors ({error!r}): {body[:200]!r}", counted) from None
    if len(answer["data"]) != count or set(found) != set(range(count)):
        raise _none(f"other vectors than those of the {count} texts it was sent", counted)
    return Answer([found[index] for index in range(count)], counted)


def _none(has: str, tokens: int | None) -> CallFailure:
    failure = unclear(f"the server's answer has {has}")
    failure.tokens = tokens
    return failure


def _tokens(answer: Any) -> int | None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0 else None


def _numbers(embedding: Any) -> Any:
    """A vector as base64 of little-endian float32, or as a list: servers need not do what was asked for."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    vector = np.asarray(embedding, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError("no list of numbers")
    return vector
