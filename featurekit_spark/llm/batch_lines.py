"""Lines of a batch's files: what each says of one request, as the provider words it and as it is kept.

Knows no files, no batches and no provider's state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featurekit_spark.paid.openai_protocol import blames_request, no_quota
from featurekit_spark.paid.retry import FailureKind

__all__ = ["Line", "lines_of"]


@dataclass(frozen=True)
class Line:
    """What became of one request: the body of its answer, or why there is none. `blames_request`: the request is at
    fault for that, and not key, model or address."""

    custom_id: str
    body: str | None = None
    kind: FailureKind | None = None
    message: str = ""
    blames_request: bool = True

    def to_json(self) -> str:
        kind = None if self.kind is None else self.kind.value
        # In ASCII, since a text may hold what no bytes stand for, half of an emoji say.
        return json.dumps({**asdict(self), "kind": kind})

    @classmethod
    def from_json(cls, text: str) -> Line:
        told = json.loads(text)
        kind = told.pop("kind")
        return cls(**told, kind=None if kind is None else FailureKind(kind))


def lines_of(content: bytes) -> Iterator[Line]:
    """The lines of a file of answers or errors; what is none is passed over, and its request counts as unanswered."""
    for text in content.splitlines():
        try:
            told = json.loads(text)
            custom_id = told["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not isinstance(custom_id, str):
            continue
        response, error = _fields(told.get("response")), _fields(told.get("error"))
        status, body = response.get("status_code"), response.get("body")
        status = status if isinstance(status, int) else None
        if status == 200 and not error:
            yield Line(custom_id, json.dumps(body))
            continue
        error = error or _fields(_fields(body).get("error"))
        code, message = str(error.get("code") or ""), str(error.get("message") or "no message")[:300]
        said = f"status {status}: {message}" if status else f"{code or 'error'}: {message}"
        yield Line(custom_id, None, _kind(status, code), said, blames_request(status, code))


def _fields(told: Any) -> Mapping[str, Any]:
    """What is none says nothing."""
    if isinstance(told, str):
        return {"message": told}
    return told if isinstance(told, Mapping) else {}


def _kind(status: int | None, code: str) -> FailureKind:
    if no_quota(status, code):
        return FailureKind.QUOTA
    if status is None or status in (408, 409, 429) or status >= 500:  # without a status: expired or cancelled
        return FailureKind.RETRYABLE
    return FailureKind.TERMINAL
