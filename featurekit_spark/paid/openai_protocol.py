"""What clients of the OpenAI protocol have in common: their connections, what a failed attempt means, and travelling.

Knows the SDK, its errors, and clients of any kind; what is asked and what an answer holds, it does not.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import ContextError, UsageError
from featurekit_spark.paid.retry import Breaker, CallFailure, Clock, FailureKind, Sign, retry_after
from featurekit_spark.paid.secrets import ApiKey

if TYPE_CHECKING:
    import openai

__all__ = [
    "Line",
    "blames_request",
    "copied",
    "final",
    "holds_a_password",
    "judged",
    "no_quota",
    "received",
    "server_url",
    "unclear",
]

State = tuple[tuple[str, Any], ...]
_TRIED_AGAIN = frozenset({408, 409})  # beside 429, and all from 500
_OF_NOBODY = frozenset({401, 403, 404})  # no request gets an answer with this key, or from this address
_OF_NOBODY_BY_CODE = frozenset({"invalid_api_key", "model_not_found"})
_SHORTEST_KEY = 8  # what stands for a key where none is needed may be a word
_NO_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
# A password may hold what ends the host of a URL; after the colon of a host there is a number.
_USER = re.compile(r"://([^/]*@|[^/@]*:(?!\d+/)[^@]*@)")


class Line:
    """What calls on one event loop share: the SDK's client, which belongs to the loop that first uses it, the bound of
    `at_once` on calls in flight, a clock and a breaker. Requests to `model` go to `path` below `base_url`. ContextError
    without an API key, or without the packages."""

    def __init__(self, base_url: str, path: str, *, model: str, key: ApiKey, at_once: int) -> None:
        what = f"{model} at {base_url}"
        own_key = key.value(what=what)
        try:
            import httpx2
            from openai import AsyncOpenAI, DefaultAioHttpClient

            # It parses in C, and sends a request at once: a third less CPU for a call than the SDK's other transport.
            http = DefaultAioHttpClient(timeout=None)
        except (ImportError, RuntimeError) as error:  # the SDK's word for a missing aiohttp
            raise ContextError(
                f"{what} needs the openai package with aiohttp: pip install 'featurekit-spark[llm]'"
            ) from error
        # An attempt's time is measured as a whole, not per read.
        self.client = AsyncOpenAI(
            api_key=own_key, base_url=base_url, timeout=None, max_retries=0, http_client=http
        )
        self.free = asyncio.Semaphore(at_once)
        self.clock, self.breaker = Clock(), Breaker()
        self._path, self._bare = path, httpx2.Response
        self._left = weakref.finalize(self, _close, self.client, asyncio.get_running_loop(), os.getpid())

    async def ask(self, request: Mapping[str, Any]) -> bytes:
        """The bare response: making the SDK's models of it takes as long as all the rest."""
        try:
            answer = await self.client.post(self._path, body=request, cast_to=self._bare)
        except (ValueError, TypeError):
            _refuse_unsendable(request)
            raise
        return answer.content

    async def aclose(self) -> None:
        self._left.detach()
        await self.client.close()


def _close(client: openai.AsyncOpenAI, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    """For one that nobody closed: aiohttp complains on stderr about connections that are left open."""
    if os.getpid() == pid and loop.is_running():
        done = asyncio.run_coroutine_threadsafe(client.close(), loop)
        if threading.current_thread() is threading.main_thread():  # at the end of the process, that is
            with suppress(Exception):
                done.result(timeout=1.0)


def unclear(message: str) -> CallFailure:
    """An answer that is none, or a connection that was lost: another attempt may help."""
    return CallFailure(message, FailureKind.RETRYABLE, Sign.BROKEN)


def final(message: str) -> CallFailure:
    """The fault of what was asked: no attempt helps, and the server works."""
    return CallFailure(message, FailureKind.TERMINAL, Sign.WORKS)


def blames_request(status: int | None, code: object) -> bool:
    """Whether a refusal is the fault of this one request, and not of key, model or address."""
    return status not in _OF_NOBODY and str(code) not in _OF_NOBODY_BY_CODE


def no_quota(status: int | None, code: object) -> bool:
    """Whether somebody has to pay before anything is answered."""
    return status == 402 or str(code) in _NO_QUOTA


def judged(
    error: Exception, clock: Clock, *, blames: Callable[[int, object], bool] = blames_request
) -> CallFailure:
    """What an attempt's failure means. `blames`: whether a status and code that are not worth another attempt are the
    fault of this one request."""
    import openai

    match error:
        case openai.APIStatusError():
            _hide_key(error)
            said = f"status {error.status_code}: {error.message[:300]}"
            wait = retry_after(error.response.headers, clock)
            status = error.status_code
            if no_quota(status, error.code):
                return CallFailure(f"no quota left ({said})", FailureKind.QUOTA, Sign.BUSY)
            if status == 429:
                return CallFailure(said, FailureKind.RETRYABLE, Sign.BUSY, retry_after_s=wait)
            if status in _TRIED_AGAIN or status >= 500:
                return CallFailure(said, FailureKind.RETRYABLE, Sign.BROKEN, retry_after_s=wait)
            return (
                final(said)
                if blames(status, error.code)
                else CallFailure(said, FailureKind.TERMINAL, Sign.BROKEN)
            )
        case ValueError() | TypeError():  # no fault of the body, which `ask` blames itself
            said = f"the request cannot be sent: {type(error).__name__}: {error}"
            return CallFailure(said, FailureKind.TERMINAL, Sign.BROKEN)
        case _:  # a lost connection
            return unclear(f"{type(error).__name__}: {error}")


def _hide_key(error: openai.APIStatusError) -> None:
    """Some servers repeat the key that they refuse, and errors are kept."""
    key = error.request.headers.get("authorization", "").removeprefix("Bearer ")
    if len(key) >= _SHORTEST_KEY and key in error.message:
        error.message = error.message.replace(key, "***")
        error.args = (error.message,)


def _refuse_unsendable(request: Mapping[str, Any]) -> None:
    try:
        json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:  # half of a surrogate pair, say
        raise final(f"the request cannot be sent: {type(error).__name__}: {error}") from error


def holds_a_password(base_url: str) -> bool:
    """Whether a URL names a user, and maybe its password."""
    return _USER.search(base_url) is not None


def server_url(base_url: str) -> str:
    """The URL as requests begin with it. UsageError for one with a user: calls have a key, and errors show the URL."""
    if holds_a_password(base_url):
        raise UsageError(
            "base_url names a user (user:password@host), which calls with an API key cannot have: leave it out, and "
            "put what the server takes as key into the variable that api_key_env names, or the secret api_key_secret."
        )
    return base_url.rstrip("/")


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
