"""A chat model whose calls are handed in as batches: at a lower price, and answered within a day.

Owns when requests that are asked together are handed in, and how long a run waits for them. The desk knows what is to
come; how a request is worded and an answer is read, the online model says.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

from featurekit_spark.costs import Expected
from featurekit_spark.errors import (
    AnswersPendingError,
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
    LockedError,
    ServiceError,
)
from featurekit_spark.fingerprint import digest
from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.llm.batch_desk import BatchDesk, BatchLimits
from featurekit_spark.llm.batch_records import BatchRecords
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import BatchClient, Line
from featurekit_spark.paid.retry import CallFailure, FailureKind, Sign
from featurekit_spark.paid.usage import expected_cost

__all__ = ["OpenAIBatch"]

_LINGER_S: Final = 0.1  # requests of a stage come at once; those of a repair, after an answer
_MANY: Final = 1_000_000


class OpenAIBatch:
    """The model of `chat`, by batches. `folder`: where what was handed in is written down, beside the cache.

    A run hands its requests in and waits `wait_s` seconds for the answers; AnswersPendingError says that some are still
    to come. `share`: of the price, what a call by batch costs. Outside of a run (single requests) calls are made
    online, at the full price. Answers are the same model's: `identity` is that of `chat`. Only the driver calls it.
    """

    concurrency = _MANY
    _away = False

    def __init__(
        self,
        chat: OpenAIChat,
        folder: str,
        *,
        wait_s: float = 0.0,
        share: float = 0.5,
        limits: BatchLimits | None = None,
    ) -> None:
        self.chat, self.folder, self.wait_s = chat, folder, wait_s
        self.price = None if chat.price is None else chat.price.times(share)
        self.identity = chat.identity
        self.limits = limits or BatchLimits()
        self._begin()

    def _begin(self) -> None:
        self._run_id: str | None = None
        self._recalls = False
        self._until: float | None = None
        self._asked: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, list[asyncio.Future[Line | None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._turns: set[asyncio.Task[None]] = set()
        self._one_turn = asyncio.Lock()
        self._ended = threading.Event()
        self._given: set[str] = set()
        self._told: set[str] = set()
        # What a key's task was given: what it makes of one answer may need another, which is still to come.
        self._given_to: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"OpenAIBatch({self.chat!r}, {self.folder!r}, wait_s={self.wait_s!r})"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("chat", "folder", "wait_s", "price", "identity", "limits")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _away=True)
        self._begin()

    @cached_property
    def desk(self) -> BatchDesk:
        return BatchDesk(BatchClient(self.chat), BatchRecords(self.folder), self.identity, self.limits)

    @contextmanager
    def opened(self, run_id: str) -> Iterator[None]:
        """For the length of a run: calls are handed in meanwhile."""
        self._begin()
        self._run_id = run_id
        finished = False
        try:
            yield
            finished = True
        except BudgetError:  # what came before is in the cache
            finished = True
            raise
        finally:
            self._ended.set()
            # An error that was told is over; an answer is, once it is in the cache.
            over = self._told | (self._given if finished else set())
            if over:
                self.desk.done(over, run_id)
            self._begin()

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Meanwhile only answers that came are given."""
        self._recalls = True
        try:
            yield
        finally:
            self._recalls = False

    @contextmanager
    def taking_in(self, run_id: str) -> Iterator[dict[str, list[str]]]:
        """As `opened`, with what came of earlier runs: prompts with an answer, by the run that asked. Other runs wait
        meanwhile: an answer that two took in would be two entries."""
        with self.desk.records.locked(run_id), self.opened(run_id):
            self.desk.collect(run_id)
            yield self._answered_before()

    def _answered_before(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for custom_id, line in self.desk.answers.items():
            if line.body is not None:
                prompt = self.desk.bodies[custom_id]["messages"][-1]["content"]
                found.setdefault(self.desk.run_of(custom_id), []).append(prompt)
        return {run_id: list(dict.fromkeys(prompts)) for run_id, prompts in found.items()}

    def expected_cost(
        self, prompt: str, *, system: str | None = None, max_tokens: int | None = None
    ) -> Expected:
        """What a call will take by batch, told without making it."""
        answer = self.chat.answer_tokens or max_tokens
        return expected_cost(
            prompt, system=system, answer_tokens=answer, model=self.chat.model, price=self.price
        )

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
        """One answer, where it came. AnswersPendingError where it is still to come; ServiceError where a later batch
        may have it, BuildError where none will, BudgetError where the account has no quota left."""
        asked: dict[str, Any] = {
            "system": system,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "response_format": response_format,
            "earlier": earlier,
        }
        if self._away:
            raise ContextError("calls by batch (llm.mode: batch) are made by the driver, this is a worker")
        if self._run_id is None:
            return await self.chat.complete(prompt, **asked)
        request = self.chat.request(prompt, **asked)
        try:
            text = json.dumps(request, sort_keys=True)
            text.encode()
            json.dumps(request, ensure_ascii=False).encode()
        except (ValueError, TypeError) as error:  # half of a surrogate pair, say
            raise BuildError(f"the request cannot be sent: {type(error).__name__}: {error}") from error
        custom_id = digest("batch request", self.identity, text)
        line = self.desk.answers.get(custom_id)
        try:
            if self._recalls and (line is None or line.body is None):
                raise AnswersPendingError("there is no answer yet")
            line = line or await self._come(custom_id, request)
            if line is None:
                raise AnswersPendingError(self._pending())
        except AnswersPendingError:
            self._given.difference_update(self._given_to.get(asyncio.current_task(), ()))
            raise
        return self._read(line, request)

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        await self.chat.aclose()

    async def _come(self, custom_id: str, request: dict[str, Any]) -> Line | None:
        """The answer, or None where the run does not wait for it any longer."""
        loop = asyncio.get_running_loop()
        there: asyncio.Future[Line | None] = loop.create_future()
        self._asked[custom_id] = request  # equal requests are one
        self._waiting.setdefault(custom_id, []).append(there)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(_LINGER_S, self._turn)
        return await there

    def _turn(self) -> None:
        asked, self._asked = self._asked, {}
        waiting, self._waiting = self._waiting, {}
        task = asyncio.get_running_loop().create_task(self._answered(asked, waiting))
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)

    async def _answered(
        self, asked: dict[str, dict[str, Any]], waiting: dict[str, list[asyncio.Future[Line | None]]]
    ) -> None:
        found: dict[str, Line] = {}
        failure: FeaturekitError | None = None
        try:
            async with self._one_turn:
                found = await asyncio.to_thread(self._ask, asked, self._run_id or "")
        except Exception as error:  # whoever waits has to be told
            failure = error if isinstance(error, FeaturekitError) else ContextError(repr(error))
        for custom_id, futures in waiting.items():
            for future in futures:
                if future.done():  # its run was interrupted
                    continue
                if failure is None:
                    future.set_result(found.get(custom_id))
                else:
                    future.set_exception(_for_one(failure))

    def _ask(self, asked: dict[str, dict[str, Any]], run_id: str) -> dict[str, Line]:
        ended = self._ended  # this run's: the next one has another

        def sleep(seconds: float) -> None:
            if ended.wait(seconds):
                raise AnswersPendingError("the run has ended")

        try:
            self.desk.hand_in(asked, run_id)
            now = time.monotonic()
            self._until = now + self.wait_s if self._until is None else self._until
            self.desk.wait(asked, run_id, seconds=self._until - now, sleep=sleep)
        except (ServiceError, LockedError) as error:
            raise AnswersPendingError(
                f"{len(asked)} requests could not be handed in: {error}. Nothing was published; run again."
            ) from error
        return {own: line for own in asked if (line := self.desk.answers.get(own)) is not None}

    def _pending(self) -> str:
        says = sorted(self.desk.says.values())
        named = "; ".join(says[:3]) + (f"; and {len(says) - 3} more" if len(says) > 3 else "")
        many = len(self.desk.pending)
        return (
            f"waiting for batch{'es' * (len(says) > 1)} {named}: {many} answers of {self.identity} are still to come. "
            "What came is kept, nothing was published; run again to collect."
        )

    def _read(self, line: Line, request: Mapping[str, Any]) -> Completion:
        if line.body is None:
            self._told.add(line.custom_id)
            raise self._error(line)
        try:
            answer = self.chat.completion(line.body.encode(), request, price=self.price)
        except CallFailure as failure:
            self._told.add(line.custom_id)
            error = self._error(Line(line.custom_id, None, failure.kind, failure.message), failure)
            raise error.with_cost(failure.tokens, failure.usd) from failure
        self._given.add(line.custom_id)
        self._given_to.setdefault(asyncio.current_task(), []).append(line.custom_id)
        return answer

    def _error(self, line: Line, failure: CallFailure | None = None) -> FeaturekitError:
        told = f"{self.chat.model} at {self.chat.base_url}: {line.message}"
        kind = line.kind or FailureKind.RETRYABLE
        error: FeaturekitError
        match kind:
            case FailureKind.RETRYABLE:
                error = ServiceError(told)
            case FailureKind.TERMINAL:
                error = BuildError(told)
            case FailureKind.QUOTA:
                error = BudgetError(told)
        error.blames_request = line.blames_request
        sign = Sign.WORKS if line.blames_request else Sign.BROKEN
        error.__cause__ = failure or CallFailure(line.message, kind, sign)
        return error


def _for_one(failure: FeaturekitError) -> FeaturekitError:
    """What failed for all requests of a turn, for one of them: it was not asked."""
    error = type(failure)(str(failure))
    error.blames_request, error.__cause__ = failure.blames_request, failure.__cause__
    if not isinstance(failure, AnswersPendingError):
        error.attempts = 0
    return error
