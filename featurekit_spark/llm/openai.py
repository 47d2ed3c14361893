"""A chat model behind any OpenAI-compatible server, through the `openai` package's async client.

Owns the bound on calls in flight, and the translation of the SDK's answers and errors; `paid` owns retries and rate
limits (the SDK's own retries are off). The API key is read when a client is made, from where `paid.secrets` says.
"""

from __future__ import annotations

import asyncio
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from featurekit_spark.costs import Expected
from featurekit_spark.errors import UsageError
from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.paid.limits import LocalLimiter, RateLimiter
from featurekit_spark.paid.openai_protocol import (
    Line,
    copied,
    final,
    judged,
    received,
    server_url,
    unclear,
)
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.retry import CallFailure, FailureKind, RetryPolicy, with_retries
from featurekit_spark.paid.secrets import api_key
from featurekit_spark.paid.usage import expected_cost, usage_of

if TYPE_CHECKING:
    import openai

__all__ = ["OpenAIChat"]

_log = logging.getLogger(__name__)

_FIRST_GUESS = 256


class OpenAIChat:
    """`model` at `base_url` (vLLM, Ollama, Azure and Databricks serving speak the same protocol).

    At most `concurrency` calls are in flight per process. Each attempt ends after `timeout_s` seconds, and a call is
    tried up to `attempts` times within `deadline_s` seconds where that can help (rate limits, server errors, lost
    connections). `limiter` paces calls; without one only a server's Retry-After does. `price`: of its tokens; without
    one answers carry no usd. `answer_tokens`: how many an answer is taken to have before there are any (None: as many
    as it may have). The API key is in the environment variable `api_key_env`, or in the Databricks secret
    `api_key_secret`, `scope/key`. Needs the extra `featurekit-spark[llm]`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        api_key_secret: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        attempts: int = 6,
        limiter: RateLimiter | None = None,
        price: Price | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        if concurrency < 1:
            raise UsageError(f"concurrency must be positive, found {concurrency!r}")
        self.base_url = server_url(base_url)
        self.model = model
        self.key = api_key(api_key_env, api_key_secret)
        self.concurrency = concurrency
        self.policy = RetryPolicy(attempts, timeout_s, deadline_s)
        self.limiter = LocalLimiter() if limiter is None else limiter
        self.price, self.answer_tokens = price, answer_tokens
        self.identity = f"openai:{model}@{self.base_url}"
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"OpenAIChat({self.base_url!r}, {self.model!r}, key={str(self.key)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        state = ((name, value) for name, value in self.__dict__.items() if name != "_lines")
        return received, (type(self), tuple(state))

    def divided(self, n: int, *, one_host: bool = False) -> OpenAIChat:
        """The model as each of `n` tasks that run at once is given it: with its share of concurrency (at least one
        call) and of the rate limit. `one_host`: all tasks run on this machine."""
        share: OpenAIChat = copied(
            type(self), tuple(item for item in self.__dict__.items() if item[0] != "_lines")
        )
        share.concurrency = max(1, self.concurrency // n)
        share.limiter = self.limiter.divided(n, one_host=one_host)
        return share

    def ready(self) -> None:
        """Before the model travels to those who ask it: get hold of a key that they cannot read. Raises as calls do
        without one."""
        self.key.ready(what=f"{self.model} at {self.base_url}")

    def warm_up(self) -> None:
        """Load the client library."""
        with suppress(ImportError):
            import openai  # noqa: F401

    async def complete(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        earlier: Sequence[Message] = (),
    ) -> Completion:
        """One answer. ServiceError after the last attempt, BuildError where no attempt can help, BudgetError
        where the account has no quota left, ContextError without an API key."""
        line = self._line()
        async with line.free:  # before anything else: thousands may wait here
            request = self.request(
                prompt,
                system=system,
                temperature=temperature,
                max_tokens=max_tokens,
                response_format=response_format,
                earlier=earlier,
            )
            called = await with_retries(
                lambda: self._attempt(line, request),
                lambda error: judged(error, line.clock),
                what=f"{self.model} at {self.base_url}",
                limiter=self.limiter,
                breaker=line.breaker,
                policy=self.policy,
                clock=line.clock,
                tokens=line.expected(request),
                used=line.used,
            )
        if called.attempts == 1:
            return called.value
        return replace(called.value, attempts=called.attempts, lost=called.lost)

    def expected_cost(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None
    ) -> Expected:
        """What a call will take, told without making it."""
        answer = self.answer_tokens or max_tokens
        return expected_cost(prompt, system=system, answer_tokens=answer, model=self.model, price=self.price)

    def request(
        self,
        prompt: str,
        *,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        earlier: Sequence[Message] = (),
    ) -> dict[str, Any]:
        """The body of a request."""
        first = [] if system is None else [{"role": "system", "content": system}]
        messages = [*first, *map(dict, earlier), {"role": "user", "content": prompt}]
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if temperature is not None:
            body["temperature"] = temperature
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if response_format is not None:
            body["response_format"] = dict(response_format)
        return body

    def client(self) -> openai.AsyncOpenAI:
        """A client of the running loop; ContextError without an API key. `aclose` closes it."""
        return self._line().client

    async def _attempt(self, line: _Line, request: dict[str, Any]) -> Completion:
        return self.completion(await line.ask(request), request, price=self.price)

    def completion(self, body: bytes, request: Mapping[str, Any], *, price: Price | None) -> Completion:
        """What the server's answer to a request says. CallFailure where it is none, or holds no text to be had."""
        reply = _read(body)
        first, last = request["messages"][0], request["messages"][-1]
        usage = usage_of(
            reply.usage,
            prompt=last["content"],
            system=first["content"] if first["role"] == "system" else None,
            text=reply.text,
            model=self.model,
            price=price,
        )
        told, failure = usage.counted_by == "provider", reply.failure
        # What holds no answer may not have been paid for, unless the server says so; a refusal is one.
        if failure is not None and not told and failure.kind is not FailureKind.TERMINAL:
            raise failure
        if not told:
            _counted_here(self.model, self.base_url, usage.counted_by)
        tokens = usage.prompt_tokens, usage.completion_tokens
        if failure is not None:
            failure.tokens, failure.usd = sum(tokens), usage.usd
            failure.estimated_tokens = 0 if told else sum(tokens)
            raise failure
        return Completion(reply.text, *tokens, usage.usd, reply.finish_reason, usage.counted_by)

    async def aclose(self) -> None:
        """Close the running loop's connections; another call opens new ones."""
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.aclose()
        await self.limiter.aclose()

    def _line(self) -> _Line:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            self._lines[loop] = _Line(
                self.base_url,
                "/chat/completions",
                model=self.model,
                key=self.key,
                at_once=self.concurrency,
            )
        return self._lines[loop]


class _Line(Line):
    """What calls on one event loop share, and how long their answers have been."""

    answered = 0.0

    def expected(self, request: Mapping[str, Any]) -> int:
        """About how many tokens a call takes: the limiter is told the true number afterwards."""
        answer = self.answered or min(_FIRST_GUESS, request.get("max_tokens", _FIRST_GUESS))
        return round(sum(len(message["content"]) for message in request["messages"]) / 4 + answer)

    def used(self, answer: Completion) -> int:
        """What a call took; answers of a run are much alike in length, so the next is expected to be."""
        self.answered += (answer.completion_tokens - self.answered) * (0.1 if self.answered else 1.0)
        return answer.tokens


@dataclass(frozen=True)
class _Reply:
    """What is in an answer. `failure`: why there is no text to be had."""

    text: str
    finish_reason: str
    usage: Any
    failure: CallFailure | None = None


def _read(body: bytes) -> _Reply:
    """What cannot be read raises."""
    try:
        answer = json.loads(body, object_hook=lambda fields: SimpleNamespace(**fields))
    except ValueError:
        raise unclear(f"the server's answer is no JSON: {body[:200]!r}") from None
    usage = getattr(answer, "usage", None)
    try:
        choice = answer.choices[0]
        message, reason = choice.message, getattr(choice, "finish_reason", None) or "stop"
        text, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    except (AttributeError, IndexError, TypeError):
        return _Reply("", "", usage, unclear(f"the server's answer has no choices: {body[:200]!r}"))
    failure = None
    if refusal:
        failure = final(f"the model refused: {str(refusal)[:200]}")
    elif reason == "content_filter":
        failure = final("the provider's content filter stopped the answer")
    elif not isinstance(text, str):
        failure = unclear(f"the server's answer has no text (finish_reason {reason!r})")
    said = text if isinstance(text, str) and text else str(refusal or "")
    whole = said.encode("utf-8", "replace").decode()
    if failure is None and whole != said:
        failure = final(
            "the model's answer is no text: it holds half of a character (a surrogate without its pair)"
        )
    return _Reply(whole, reason, usage, failure)


@cache
def _counted_here(model: str, base_url: str, counted_by: str) -> None:
    """Say once per process that a server reports no usage."""
    how = "by the model's vocabulary" if counted_by == "tokenizer" else "by a rule of thumb, an estimate"
    _log.warning("%s at %s reports no usage; tokens are counted %s", model, base_url, how)
