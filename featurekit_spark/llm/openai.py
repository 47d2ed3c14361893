"""A chat model behind any OpenAI-compatible server, through the `openai` package's async client.

Owns the one retry layer (the SDK's own is off), the bound on calls in flight, and the translation of the
SDK's errors. The API key is read from the environment when a call is made; it is never kept in this object.
"""

from __future__ import annotations

import asyncio
import os
import random
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.llm.base import Completion

if TYPE_CHECKING:
    import openai

__all__ = ["OpenAIChat"]

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_RETRIED_STATUS = frozenset({408, 409, 429})  # and all from 500


class OpenAIChat:
    """`model` at `base_url` (vLLM, Ollama, Azure and Databricks serving speak the same protocol).

    At most `concurrency` calls are in flight per process, each attempt ends after `timeout_s` seconds, and a
    call is tried up to `attempts` times where that can help (rate limits, server errors, lost connections).
    Needs the extra `featurekit-spark[llm]`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_s: float = 60.0,
        attempts: int = 5,
    ) -> None:
        if concurrency < 1 or attempts < 1 or timeout_s <= 0:
            raise UsageError(
                "concurrency, attempts and timeout_s must be positive, found "
                f"{concurrency!r}, {attempts!r}, {timeout_s!r}"
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.identity = f"openai:{model}@{self.base_url}"
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"OpenAIChat({self.base_url!r}, {self.model!r}, api_key_env={self.api_key_env!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lines"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lines=weakref.WeakKeyDictionary())

    async def complete(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Completion:
        """One answer. ServiceError after the last attempt, BuildError where no attempt can help, BudgetError
        where the account has no quota left, ContextError without an API key."""
        request: dict[str, Any] = {"model": self.model, "messages": _messages(system, prompt)}
        if temperature is not None:
            request["temperature"] = temperature
        if max_tokens is not None:
            request["max_tokens"] = max_tokens
        line = self._line()
        async with line.free:
            for attempt in range(1, self.attempts + 1):
                try:
                    return _completion(await line.client.chat.completions.create(**request))
                except Exception as error:
                    failure, wait = _judged(error, attempt)
                    if not failure.retryable or attempt == self.attempts:
                        tried = f" (attempt {attempt} of {self.attempts})" if failure.retryable else ""
                        raise type(failure)(f"{self.model} at {self.base_url}: {failure}{tried}") from error
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def aclose(self) -> None:
        """Close the running loop's connections; another call opens new ones."""
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.client.close()

    def _line(self) -> _Line:
        """The client and semaphore of the running loop; both are bound to the loop that first uses them."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ContextError(
                    f"the environment variable {self.api_key_env} is not set, but {self.model} at "
                    f"{self.base_url} takes its API key from it. Set it (to any text if none is needed)."
                )
            try:
                from openai import AsyncOpenAI
            except ImportError as error:
                raise ContextError(
                    "OpenAIChat needs the openai package: pip install 'featurekit-spark[llm]'"
                ) from error
            client = AsyncOpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout_s, max_retries=0)
            self._lines[loop] = _Line(client, asyncio.Semaphore(self.concurrency))
        return self._lines[loop]


@dataclass(frozen=True)
class _Line:
    client: openai.AsyncOpenAI
    free: asyncio.Semaphore


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    user = {"role": "user", "content": prompt}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _completion(answer: Any) -> Completion:
    """The answer as a Completion; what is no answer raises."""
    try:
        choice = answer.choices[0]
        message, reason = choice.message, choice.finish_reason or "stop"
        text, refusal = message.content, getattr(message, "refusal", None)
    except (AttributeError, IndexError, TypeError) as error:
        raise ServiceError(f"the server's answer has no choices: {str(answer)[:200]}") from error
    if refusal:
        raise BuildError(f"the model refused: {str(refusal)[:200]}")
    if reason == "content_filter":
        raise BuildError("the provider's content filter stopped the answer")
    if not isinstance(text, str):
        raise ServiceError(f"the server's answer has no text (finish_reason {reason!r})")
    usage = answer.usage
    return Completion(
        text,
        prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
        completion_tokens=getattr(usage, "completion_tokens", None) or 0,
        finish_reason=reason,
    )


def _judged(error: Exception, attempt: int) -> tuple[FeaturekitError, float]:
    """What an attempt's failure means, and how many seconds to wait before the next attempt."""
    import openai

    wait = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
    match error:
        case FeaturekitError():
            return error, wait
        case openai.APITimeoutError():
            return ServiceError("no answer in time"), wait
        case openai.APIStatusError():
            said = f"status {error.status_code}: {error.message[:300]}"
            if error.code == "insufficient_quota" or error.status_code == 402:
                return BudgetError(f"no quota left ({said})"), 0.0
            if error.status_code in _RETRIED_STATUS or error.status_code >= 500:
                return ServiceError(said), max(wait, _retry_after(error.response.headers))
            return BuildError(said), 0.0
        case _:  # a lost connection, or an answer that is no JSON
            return ServiceError(f"{type(error).__name__}: {error}"), wait


def _retry_after(headers: Any) -> float:
    """Seconds the server asks to wait, bounded; 0 where it does not say (a date is not understood)."""
    try:
        if "retry-after-ms" in headers:
            return min(float(headers["retry-after-ms"]) / 1000, _LONGEST_WAIT_S)
        return min(float(headers.get("retry-after", 0)), _LONGEST_WAIT_S)
    except ValueError:
        return 0.0
