"""What came of a batch, as answers to the calls that were handed in: read by the model that was asked, at the price of
that day.

Owns what a line means, and which lines were used up. Knows no files and no provider's state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from featurekit_spark.asking import Asking, asking_now
from featurekit_spark.deferred import Answers, Rows
from featurekit_spark.errors import (
    AnswersPendingError,
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
    ServiceError,
)
from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.llm.batch_desk import BatchDesk
from featurekit_spark.llm.batch_lines import Line
from featurekit_spark.llm.batch_records import Stage, Submission
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import request_id
from featurekit_spark.paid.cost import cost_of
from featurekit_spark.paid.openai_protocol import copied
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.retry import CallFailure, FailureKind, Sign

__all__ = ["AnswerSheet", "answers_of", "collected", "told_price"]

_log = logging.getLogger(__name__)
_MANY = 1_000_000


@dataclass
class AnswerSheet:
    """Lines become answers. `told`: those that were told as errors."""

    chat: OpenAIChat
    price: Price | None
    told: set[str] = field(default_factory=set)
    _given: dict[Asking | None, list[str]] = field(default_factory=dict)

    def used_up(self, rows: Rows | None = None) -> set[str]:
        """Lines that answer nothing any more, once the cache has what they were given for: all of it, or `rows`. What
        somebody makes of one line may need another, which is still to come."""
        over, needed = {*self.told}, set[str]()
        for asker, ids in self._given.items():
            kept = asker is None or rows is None or (asker.builder, asker.key) in rows
            (over if kept and (asker is None or _is_over(asker.error)) else needed).update(ids)
        return over - needed

    def read(self, line: Line, request: Mapping[str, Any]) -> Completion:
        """The answer, or the error that stands in its place."""
        if line.body is None:
            self.told.add(line.custom_id)
            raise self._error(line)
        try:
            answer = self.chat.completion(line.body.encode(), request, price=self.price)
        except CallFailure as failure:
            self.told.add(line.custom_id)
            error = self._error(Line(line.custom_id, None, failure.kind, failure.message), failure)
            raise error.with_cost(failure.tokens, failure.usd) from failure
        self._given.setdefault(asking_now(), []).append(line.custom_id)
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


def _is_over(error: BaseException | None) -> bool:
    """Whether somebody who ended so needs no answer any more that was given: an entry tells of it."""
    match error:
        case None:
            return True
        case AnswersPendingError() | ContextError():
            return False
        case ServiceError() | BudgetError():  # asked again; what tells of the cost has used it up
            return cost_of(error) is not None
        case _:
            return isinstance(error, Exception)


class Recalled:
    """A model that knows only what came of one submission. `errors`: lines that failed are told; without, they are
    left for a run that asks."""

    concurrency = _MANY

    def __init__(self, sheet: AnswerSheet, lines: Mapping[str, Line], *, errors: bool) -> None:
        self.identity = sheet.chat.identity
        self._sheet, self._lines, self._errors = sheet, lines, errors

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
        """What came. AnswersPendingError where nothing did."""
        request = self._sheet.chat.request(
            prompt,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
            response_format=response_format,
            earlier=earlier,
        )
        line = self._lines.get(request_id(self.identity, request))
        if line is None or (line.body is None and not self._errors):
            raise AnswersPendingError("there is no answer yet")
        return self._sheet.read(line, request)


def collected(
    desk: BatchDesk, chat: OpenAIChat, run_id: str, *, identity: str | None = None
) -> Iterator[Answers]:
    """What came of everything that was handed in, a submission at a time. Lines of `identity` that failed are left for
    the run that begins, which tells them; those of others are told here, and so is what nobody has asked for in a long
    time."""
    with desk.records.locked(run_id):
        for submission in desk.look(run_id, identity=identity):
            if submission.stage is Stage.ANSWERED and desk.asks(submission):
                late = desk.clock.wall() - submission.at > desk.limits.keep_s
                try:
                    yield from answers_of(
                        desk, chat, submission, run_id, submission.identity != identity or late
                    )
                except (ValueError, KeyError, TypeError) as error:  # the others are to be had all the same
                    _log.warning("what came of batch %s cannot be read: %s", submission.batch_id, error)
                    continue
                if late:
                    _give_up(desk, submission)


def answers_of(
    desk: BatchDesk, chat: OpenAIChat, submission: Submission, run_id: str, errors: bool
) -> Iterator[Answers]:
    """What came of one submission, where no other run is at it."""
    from contextlib import ExitStack

    with ExitStack() as held:
        if not desk.records.claim(submission.tag, held, run_id):
            desk.says[submission.tag] = f"{submission.batch_id} (another run is taking in what came)"
            return
        lines = {line.custom_id: line for line in map(Line.from_json, desk.records.answers(submission.tag))}
        prompts = [
            body["messages"][-1]["content"]
            for custom_id, body in desk.records.requests(submission.tag)
            if custom_id in lines and (errors or lines[custom_id].body is not None)
        ]
        sheet = AnswerSheet(_asked(chat, submission), told_price(submission))
        yield Answers(
            submission.run_id,
            datetime.fromtimestamp(submission.at, UTC),
            submission.askers,
            list(dict.fromkeys(prompts)),
            Recalled(sheet, lines, errors=errors),
            _done(desk, submission, sheet, run_id),
        )


def told_price(submission: Submission) -> Price | None:
    """What a million tokens cost when it was handed in."""
    if submission.price is None:
        return None
    asked, answered, cached = (None if part is None else Decimal(part) for part in submission.price)
    return Price(asked or Decimal(0), answered or Decimal(0), cached)


def _done(desk: BatchDesk, submission: Submission, sheet: AnswerSheet, run_id: str) -> Callable[[Rows], None]:
    return lambda rows: desk.done(submission, sheet.used_up(rows), run_id)


def _asked(chat: OpenAIChat, submission: Submission) -> OpenAIChat:
    """The model that was asked, at the same provider."""
    if submission.identity == chat.identity or not submission.model:
        return chat
    state = tuple((name, value) for name, value in chat.__dict__.items() if name != "_lines")
    other: OpenAIChat = copied(OpenAIChat, state)
    other.model, other.identity = submission.model, submission.identity
    return other


def _give_up(desk: BatchDesk, submission: Submission) -> None:
    left = len(desk.records.answers(submission.tag))
    now = desk.records.read(submission.tag)
    if now is None or not left:
        return
    _log.warning(
        "%d answers of batch %s were asked for by no run in %.0f days and are dropped",
        *(left, submission.batch_id, desk.limits.keep_s / 86_400.0),
    )
    desk.drop(now)
