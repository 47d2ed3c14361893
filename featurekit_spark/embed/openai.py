"""Embeddings from any OpenAI-compatible server, through the `openai` package's async client.

Owns how texts become requests and an answer becomes vectors: which texts go together, which of them a server refuses,
who pays which share. Attempts are the retry layer's affair (the SDK's own is off). The API key is read when a client
is made, from where `paid.secrets` says.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from featurekit_spark import aio
from featurekit_spark.costs import Expected
from featurekit_spark.embed.base import Embedded, Vectors, refuse_blank, unit_rows
from featurekit_spark.embed.coalesce import Coalescer, shares
from featurekit_spark.embed.openai_answers import Answer, answer_of
from featurekit_spark.embed.requests import Before, each_failed
from featurekit_spark.errors import BuildError, ContextError, FeaturekitError, UsageError
from featurekit_spark.paid.limits import LocalLimiter, RateLimiter
from featurekit_spark.paid.openai_protocol import Line, blames_request, copied, judged, received, server_url
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.retry import CallFailure, RetryPolicy, Sign, failure_of, with_retries
from featurekit_spark.paid.secrets import api_key
from featurekit_spark.paid.tokens import count_tokens

if TYPE_CHECKING:
    pass

__all__ = ["OpenAIEmbedder"]

_WAIT_S = 0.005  # a text waits so long for others to go with it
_OF_ONE_TEXT = frozenset({400, 413, 422})  # may be the fault of one text, and not of key or model
_LONGEST = 200_000  # characters in one request: OpenAI refuses more than 300,000 tokens
# A request that is refused is halved to find the texts at fault; after this many refusals in a row with no answer
# between, the fault is the request's and not a text's, and the rest fails with it.
_SYSTEMIC = 16


class OpenAIEmbedder:
    """`model` at `base_url` (vLLM, Ollama, text-embeddings-inference, Azure, Databricks serving speak the protocol).

    Single texts are collected for a few milliseconds and asked for in requests of up to `batch_size`, at most
    `requests` of them in flight. `prefix` goes before every text (`"query: "` for E5 models). `dim` is
    asked for unless `send_dim` is off, for servers that refuse the parameter; either way vectors have to have it.
    `price`: of the model; without it vectors carry no usd. The API key is in the environment variable `api_key_env`, or
    in the Databricks secret `api_key_secret`, `scope/key`. Needs the extra `featurekit-spark[llm]`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        dim: int,
        prefix: str = "",
        send_dim: bool = True,
        encoding: Literal["base64", "float"] = "base64",
        api_key_env: str = "OPENAI_API_KEY",
        api_key_secret: str | None = None,
        batch_size: int = 128,
        requests: int = 4,
        policy: RetryPolicy | None = None,
        limiter: RateLimiter | None = None,
        price: Price | None = None,
    ) -> None:
        if min(dim, batch_size, requests) < 1:
            raise UsageError(
                f"dim, batch_size and requests must be positive, found {dim!r}, {batch_size!r}, {requests!r}"
            )
        self.base_url = server_url(base_url)
        self.model, self.dim, self.prefix = model, dim, prefix
        self.send_dim, self.encoding = send_dim, encoding
        self.key, self.price = api_key(api_key_env, api_key_secret), price
        self.batch_size, self.requests = batch_size, requests
        self.policy, self.limiter = policy or RetryPolicy(), limiter or LocalLimiter()
        self.identity = f"openai:{model}@{self.base_url}:prefix={prefix!r}:dim={dim}"
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self.base_url!r}, {self.model!r}, dim={self.dim}, prefix={self.prefix!r})"

    @property
    def concurrency(self) -> int:
        """How many texts are in flight at once: each is a call to who counts them and keeps their answers."""
        return self.requests * self.batch_size

    def __reduce__(self) -> tuple[Any, ...]:
        return received, (type(self), self._state())

    def divided(self, n: int, *, one_host: bool = False) -> OpenAIEmbedder:
        """The embedder as each of `n` tasks that run at once is given it: with its share of the requests in flight
        (at least one) and of the rate limit. `one_host`: all tasks run on this machine."""
        share: OpenAIEmbedder = copied(type(self), self._state())
        share.requests = max(1, self.requests // n)
        share.limiter = self.limiter.divided(n, one_host=one_host)
        return share

    def ready(self) -> None:
        """Before the embedder travels to those who ask it: get hold of a key that they cannot read. Raises as calls do
        without one."""
        self.key.ready(what=f"{self.model} at {self.base_url}")

    def warm_up(self) -> None:
        """Load the client library."""
        with suppress(ImportError):
            import openai  # noqa: F401

    async def embed_one(self, text: str) -> Embedded:
        """One text's vector, with its share of the request that it went with. ServiceError after the last attempt,
        BuildError where no attempt can help, BudgetError where the account has no quota left, ContextError without an
        API key or where the server's vectors have another dimension."""
        refuse_blank([text])
        return await self._line().texts.ask(self.prefix + text)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dim], rows of unit length. Asks the server by hand: no entry, no budget."""
        refuse_blank(texts)
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        made = aio.run(self._embed_all(texts))
        return np.stack([one.vector for one in made])

    async def aclose(self) -> None:
        """Close the running loop's connections; another call opens new ones."""
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.aclose()
        await self.limiter.aclose()

    async def _embed_all(self, texts: Sequence[str]) -> list[Embedded]:
        answers = await asyncio.gather(*map(self.embed_one, texts), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]

    def expected_cost(self, text: str) -> Expected:
        """What asking for a text will take, told without asking."""
        tokens = count_tokens(self.prefix + text, self.model).count
        return Expected(tokens, self._usd(tokens), priced=self.price is not None)

    async def _vectors(self, texts: list[str]) -> list[Embedded | Exception]:
        """Answers to the texts of one request; a refused one is asked again in halves, so that a text that the server
        cannot take costs no other its vector."""
        in_a_row = 0

        async def attempt(some: list[str], before: Before) -> list[Embedded | Exception]:
            nonlocal in_a_row
            try:
                made = await self._asked(some, before)
            except ContextError:
                raise
            except FeaturekitError as error:
                failure = failure_of(error)
                refused = isinstance(error, BuildError) and failure is not None and failure.sign is Sign.WORKS
                so_far = before.and_failed(error)
                in_a_row += refused and len(some) == 1
                if len(some) > 1 and refused and in_a_row < _SYSTEMIC:
                    middle = len(some) // 2
                    first, rest = so_far.parted(some[:middle], some[middle:])
                    return await attempt(some[:middle], first) + await attempt(some[middle:], rest)
                blamed = len(some) == 1 or not refused
                return [*each_failed(error, some, so_far, self._usd, to_blame=blamed)]
            in_a_row = 0
            return made

        return await attempt(texts, Before())

    async def _asked(self, texts: list[str], before: Before) -> list[Embedded | Exception]:
        request: dict[str, Any] = {"model": self.model, "input": texts, "encoding_format": self.encoding}
        if self.send_dim:
            request["dimensions"] = self.dim
        line = self._line()

        async def once() -> Answer:
            try:
                return answer_of(await line.ask(request), len(texts))
            except CallFailure as failure:
                failure.usd = None if failure.tokens is None else self._usd(failure.tokens)
                raise

        async with line.free:
            called = await with_retries(
                once,
                lambda error: judged(error, line.clock, blames=_blames_a_text),
                what=f"{self.model} at {self.base_url}",
                limiter=self.limiter,
                breaker=line.breaker,
                policy=self.policy,
                clock=line.clock,
                tokens=sum(map(len, texts)) // 4,
                used=lambda answer: answer.tokens or 0,
            )
        return self._embedded(called.value, texts, before.and_lost(called.attempts, called.lost.tokens))

    def _embedded(self, answer: Answer, texts: list[str], asked: Before) -> list[Embedded | Exception]:
        for vector in answer.vectors:
            if len(vector) != self.dim:
                raise ContextError(
                    f"{self.model} at {self.base_url} gives vectors of {len(vector)} dimensions, embedder.dim "
                    f"is {self.dim}: set it to {len(vector)}, or choose a model that can be asked for {self.dim}."
                )
        # Each text's share of what the provider counted; counted here where it says nothing.
        here = [0] * len(texts) if answer.tokens else [count_tokens(text, self.model).count for text in texts]
        counts = shares(answer.tokens, [len(text) for text in texts]) if answer.tokens else here
        made: list[Embedded | Exception] = []
        for vector, own, lost, estimated in zip(
            answer.vectors, counts, asked.shares(texts), here, strict=True
        ):
            tokens = own + lost
            usd = self._usd(tokens)
            try:
                made.append(Embedded(unit_rows([vector])[0], tokens, usd, estimated, asked.attempts))
            except BuildError as error:
                error.attempts = asked.attempts
                made.append(error.with_cost(tokens, usd, estimated))
        return made

    def _usd(self, tokens: int) -> float | None:
        return None if self.price is None else float(self.price.usd(tokens, 0))

    def _line(self) -> _Line:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            self._lines[loop] = _Line(self)
        return self._lines[loop]

    def _state(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, value) for name, value in self.__dict__.items() if name != "_lines")


def _blames_a_text(status: int, code: object) -> bool:
    return status in _OF_ONE_TEXT and blames_request(status, code)


class _Line(Line):
    """What texts of one event loop share: requests in flight, and texts that are collected for the next."""

    def __init__(self, embedder: OpenAIEmbedder) -> None:
        super().__init__(
            embedder.base_url,
            "/embeddings",
            model=embedder.model,
            key=embedder.key,
            at_once=embedder.requests,
        )
        self.texts: Coalescer[Embedded] = Coalescer(
            embedder._vectors, most=embedder.batch_size, longest=_LONGEST, wait_s=_WAIT_S
        )
