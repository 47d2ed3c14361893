"""A chat model whose calls are handed in as batches: at a lower price, and answered within a day.

Owns when requests are handed in, and how long a run waits for them. The desk knows what is to come, the sheet what an
answer means; how a request is worded, the online model says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Final

from featurekit_spark.cache.folder import Folder
from featurekit_spark.costs import Expected
from featurekit_spark.deferred import Answers, Asker, Came, OnTheWay
from featurekit_spark.errors import (
    AnswersPendingError,
    BudgetError,
    BuildError,
    ContextError,
    LockedError,
    ServiceError,
)
from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.llm.batch_answers import AnswerSheet, collected
from featurekit_spark.llm.batch_beside import on_the_way, waiting_for
from featurekit_spark.llm.batch_desk import BatchDesk, BatchLimits
from featurekit_spark.llm.batch_lines import Line
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import BatchClient, request_id
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.usage import expected_cost

__all__ = ["OpenAIBatch"]

_MANY: Final = 1_000_000


class OpenAIBatch:
    """The model of `chat`, by batches. `folder`: where what was handed in is written down, beside the cache.

    A run hands its requests in and waits `wait_s` seconds for the answers; AnswersPendingError says that some are still
    to come. `share`: of the price, what a call by batch costs. Outside of a run (single requests) calls are made
    online, at the full price. Answers are the same model's: `identity` is that of `chat`. Only the driver calls it.
    """

    concurrency = _MANY
    pays_again = False
    _away = False

    def __init__(
        self,
        chat: OpenAIChat,
        folder: str | Folder,
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
        self._until: tuple[str, float] | None = None
        self._asked: dict[str, dict[str, Any]] = {}
        self._tags: set[str] = set()
        self._came: set[str] = set()
        self._left: dict[str, tuple[Submission, Line]] = {}
        self._claims: dict[str, bool] = {}
        self._held = ExitStack()
        self._sheet = AnswerSheet(self.chat, self.price)

    def __repr__(self) -> str:
        return f"OpenAIBatch({self.chat!r}, {self.folder!r}, wait_s={self.wait_s!r})"

    def ready(self) -> None:
        """As the model: told before anything is computed, where its key cannot be read."""
        self.chat.ready()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("chat", "folder", "wait_s", "price", "identity", "limits")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _away=True)
        self._begin()

    @cached_property
    def desk(self) -> BatchDesk:
        return BatchDesk(BatchClient(self.chat), BatchRecords(self.folder), self.limits)

    @contextmanager
    def collecting(self, run_id: str) -> Iterator[Iterator[Answers]]:
        """What came of earlier runs, a submission at a time."""
        with self.desk.records.locked(run_id):
            yield collected(self.desk, self.chat, run_id, identity=self.identity)

    def on_the_way(self) -> list[OnTheWay]:
        """What is to come, by what is written down here."""
        return on_the_way(self.desk.records, self.desk.says)

    @contextmanager
    def opened(self, run_id: str, askers: Sequence[Asker] = (), came: Came | None = None) -> Iterator[None]:
        """For the length of a run, or of a part of it."""
        self._begin_part(run_id)
        pending: AnswersPendingError | None = None
        finished = False
        try:
            try:
                yield
                finished = True
            except AnswersPendingError as error:
                pending, finished = error, True
            except BudgetError:  # what came before is in the cache
                finished = True
                raise
        finally:
            # An error that was told is over; an answer is, once it is in the cache.
            self._use_up(self._sheet.used_up() if finished else self._sheet.told, run_id)
            self._held.close()
            self._run_id = None
        self._hand_in(run_id, askers, came)
        if pending is not None:
            raise AnswersPendingError(waiting_for(self.desk, self.identity)) from pending

    def awaited(self, run_id: str) -> bool:
        """Wait for what the run asked; whether anything came."""
        if self._came:
            return True
        if self._until is None or self._until[0] != run_id:
            self._until = (run_id, time.monotonic() + self.wait_s)
        pause, to_come = self.limits.poll_s, set(self._tags)
        while to_come and (left := self._until[1] - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, self.limits.longest_poll_s)
            to_come = {tag for tag in to_come if not self.desk.ended(tag)}
        return len(to_come) < len(self._tags)

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
            custom_id = request_id(self.identity, request)
        except (ValueError, TypeError) as error:
            raise BuildError(f"the request cannot be sent: {type(error).__name__}: {error}") from error
        line = self._line(custom_id)
        if line is None:
            self._asked[custom_id] = request  # equal requests are one
            raise AnswersPendingError("its answer is still to come")
        return self._sheet.read(line, request)

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        await self.chat.aclose()

    def _begin_part(self, run_id: str) -> None:
        until = self._until
        self._begin()
        self._run_id, self._until = run_id, until
        for item in self.desk.records.all():
            if item.identity == self.identity and item.stage is Stage.ANSWERED:
                for line in map(Line.from_json, self.desk.records.answers(item.tag)):
                    self._left[line.custom_id] = (item, line)

    def _line(self, custom_id: str) -> Line | None:
        """What came and is not in the cache yet; of one submission only one run uses it."""
        submission, line = self._left.get(custom_id, (None, None))
        if submission is None or line is None:
            return None
        tag = submission.tag
        if tag not in self._claims:
            self._claims[tag] = self.desk.records.claim(tag, self._held, self._run_id or "")
            there = {Line.from_json(text).custom_id for text in self.desk.records.answers(tag)}
            gone = {own for own, (item, _) in self._left.items() if item.tag == tag and own not in there}
            self._came |= gone
        return line if self._claims[tag] and custom_id not in self._came else None

    def _use_up(self, custom_ids: set[str], run_id: str) -> None:
        used = {self._left[own][0].tag: self._left[own][0] for own in custom_ids}
        for submission in used.values():
            self.desk.done(submission, custom_ids, run_id)

    def _hand_in(self, run_id: str, askers: Sequence[Asker], came: Came | None) -> None:
        """What was asked and neither came nor is on its way."""
        if not self._asked:
            return
        template = Submission(
            "",
            self.identity,
            run_id,
            Stage.INTENDED,
            0.0,
            model=self.chat.model,
            base_url=self.chat.base_url,
            key=str(self.chat.key),
            price=_told(self.price),
            askers=tuple(askers),
        )
        try:
            with self.desk.records.locked(run_id):  # nobody takes anything in meanwhile
                if came is not None:
                    prompts = {own: body["messages"][-1]["content"] for own, body in self._asked.items()}
                    self._came |= came(prompts)
                self._tags = self.desk.hand_in(self._asked, template, self._came)
        except (ServiceError, LockedError) as error:
            many, self._asked, self._came = len(self._asked), {}, set()
            raise AnswersPendingError(
                f"{many} requests could not be handed in: {error}. Nothing was published; run again."
            ) from error


def _told(price: Price | None) -> tuple[str | None, ...] | None:
    if price is None:
        return None
    return tuple(None if part is None else str(part) for part in (price.input, price.output, price.cached))
