"""The desk of one model's batches: hands requests in once, asks how far they are, and keeps what came until it is in
the cache.

Works with threads and locks, not with coroutines: what it does takes minutes or a day. Knows requests and lines, no
builders; when a run waits, and for what, is the model's affair.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from featurekit_spark import aio
from featurekit_spark.errors import BudgetError, ContextError, ServiceError
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.llm.openai_batch import BatchClient, BatchState, Line
from featurekit_spark.paid.retry import Clock

__all__ = ["BatchDesk", "BatchLimits", "parts_of"]

_log = logging.getLogger(__name__)
_URL: Final = "/v1/chat/completions"
_DAY: Final = 86_400.0


@dataclass(frozen=True)
class BatchLimits:
    """Of one file: `requests` and `bytes` (the provider's are 50,000 and 200 MB). Seconds: `unsure_s` after which a
    batch that a killed run may have asked for was not made, if the provider does not list it; `keep_s` after which
    answers that no run asks for are dropped; `poll_s` to `longest_poll_s` between two questions."""

    requests: int = 50_000
    bytes: int = 190_000_000
    unsure_s: float = 120.0
    keep_s: float = 30 * _DAY
    poll_s: float = 2.0
    longest_poll_s: float = 60.0


@dataclass
class BatchDesk:
    """`answers`: what came and is not in the cache yet, by custom_id; `bodies`: the requests that they answer.
    `pending`: what is to come, and the submission that it belongs to. `says`: how far each of those is, by tag."""

    client: BatchClient
    records: BatchRecords
    identity: str
    limits: BatchLimits = field(default_factory=BatchLimits)
    clock: Clock = field(default_factory=Clock)
    answers: dict[str, Line] = field(default_factory=dict)
    pending: dict[str, Submission] = field(default_factory=dict)
    bodies: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    says: dict[str, str] = field(default_factory=dict)
    _of: dict[str, Submission] = field(default_factory=dict)
    _requests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def collect(self, run_id: str) -> None:
        """Look what became of everything that was handed in. A provider that does not answer is asked later."""
        with self.records.locked(run_id):
            self._look()

    def hand_in(self, requests: Mapping[str, Mapping[str, Any]], run_id: str) -> None:
        """Hand in those that are neither answered nor to come. Raises ServiceError where the provider cannot take
        them, BudgetError without a quota."""
        with self.records.locked(run_id):
            self._look()  # what other runs have handed in meanwhile
            known = self.answers.keys() | self.pending.keys()
            new = {custom_id: body for custom_id, body in requests.items() if custom_id not in known}
            for part in parts_of(new, self.limits):
                self._submit(part, run_id)

    def wait(
        self, wanted: Collection[str], run_id: str, *, seconds: float, sleep: Callable[[float], None]
    ) -> None:
        """Return when nothing of these is to come any more, or so many seconds have passed."""
        until, pause = self.clock.now() + seconds, self.limits.poll_s
        while any(custom_id in self.pending for custom_id in wanted):
            left = until - self.clock.now()
            if left <= 0:
                return
            sleep(min(pause, left))
            pause = min(pause * 1.5, self.limits.longest_poll_s)
            self.collect(run_id)

    def run_of(self, custom_id: str) -> str:
        """The run that handed in what was answered."""
        return self._of[custom_id].run_id

    def done(self, custom_ids: Collection[str], run_id: str) -> None:
        """Answers that are in the cache, or were told as errors: they answer nothing any more."""
        with self.records.locked(run_id):
            tags = {self._of.pop(own).tag for own in custom_ids if self.answers.pop(own, None) is not None}
            for tag in tags:
                try:
                    texts = self.records.answers(tag)
                except FileNotFoundError:  # without locks (object stores) another run may have been here
                    texts = []
                left = [text for text in texts if Line.from_json(text).custom_id not in custom_ids]
                if left:
                    self.records.put_answers(tag, left)
                else:
                    self._forget(tag)

    def _look(self) -> None:
        """Read the records anew, and bring each up to date."""
        self.answers, self.pending, self._of = {}, {}, {}
        self.bodies, self.says = {}, {}
        submissions = self.records.all(self.identity)
        lost = self._found(submissions)
        for submission in submissions:
            submission = lost.get(submission.tag, submission)
            match submission.stage:
                case Stage.INTENDED:  # its run ended before there could be a batch
                    self._forget(submission.tag)
                case Stage.CREATING if self._was_not_made(submission, asked=submission.tag in lost):
                    _log.warning(
                        "batch %s was never made; its requests may be handed in again", submission.tag
                    )
                    self._forget(submission.tag)
                case Stage.CREATING:
                    self._take_pending(submission, f"{submission.tag} (not known to the provider yet)")
                case Stage.SUBMITTED:
                    self._ask(submission)
                case Stage.ANSWERED:
                    self._take_answers(submission)

    def _found(self, submissions: Iterable[Submission]) -> dict[str, Submission]:
        """Those that were being made when a run ended, with their batches where the provider has one; none of them
        where it does not answer."""
        unsure = [item for item in submissions if item.stage is Stage.CREATING]
        if not unsure:
            return {}
        try:
            since = min(item.at for item in unsure)
            states = aio.run(self.client.find({item.tag for item in unsure}, since))
        except ServiceError as error:
            _log.warning("batches of earlier runs cannot be asked for: %s", error)
            return {}
        return {item.tag: self._made(item, states.get(item.tag)) for item in unsure}

    def _made(self, submission: Submission, state: BatchState | None) -> Submission:
        if state is None:
            return submission
        made = replace(submission, stage=Stage.SUBMITTED, batch_id=state.batch_id, at=self.clock.wall())
        self.records.put(made)
        return made

    def _was_not_made(self, submission: Submission, *, asked: bool) -> bool:
        # Without a lock another run may be about to make it.
        unsure = self.limits.unsure_s if self.records.can_lock else max(self.limits.unsure_s, 3600.0)
        return asked and self.clock.wall() - submission.at > unsure

    def _ask(self, submission: Submission) -> None:
        assert submission.batch_id is not None  # its stage says so
        try:
            state = aio.run(self.client.state(submission.batch_id))
            if not state.progress.ended:
                self._take_pending(submission, str(state))
                return
            lines = aio.run(self.client.lines(state, list(self._requests_of(submission.tag))))
        except ContextError as error:
            raise ContextError(
                f"{error} Where the batch is gone for good, remove {self.records.folder}/{submission.tag}.json: its "
                "requests are then made anew, and paid for."
            ) from error
        except ServiceError as error:
            _log.warning("batch %s cannot be asked for: %s", submission.batch_id, error)
            self._take_pending(submission, f"{submission.batch_id} (the provider does not answer)")
            return
        texts = [line.to_json() for line in lines]
        self._take_answers(self.records.answered(submission, texts, self.clock.wall()))

    def _take_pending(self, submission: Submission, said: str) -> None:
        self.pending.update(dict.fromkeys(self._requests_of(submission.tag), submission))
        self.says[submission.tag] = said

    def _take_answers(self, submission: Submission) -> None:
        lines = [Line.from_json(text) for text in self.records.answers(submission.tag)]
        if self.clock.wall() - submission.at > self.limits.keep_s:
            _log.warning(
                "%d answers of batch %s were asked for by no run in %.0f days and are dropped",
                *(len(lines), submission.batch_id, self.limits.keep_s / _DAY),
            )
            self._forget(submission.tag)
            return
        requests = self._requests_of(submission.tag)
        for line in lines:
            self.answers[line.custom_id] = line
            self.bodies[line.custom_id] = requests[line.custom_id]
            self._of[line.custom_id] = submission

    def _submit(self, requests: Mapping[str, Mapping[str, Any]], run_id: str) -> None:
        """Hand in one file. Before each step is written down what a later run needs where this one is killed in it."""
        data = b"".join(_line(custom_id, body) for custom_id, body in requests.items())
        own = Submission(uuid.uuid4().hex, self.identity, run_id, Stage.INTENDED, self.clock.wall())
        self.records.intend(own, data)
        try:
            file_id = aio.run(self.client.upload(f"featurekit-{own.tag}.jsonl", data))
        except Exception:
            self._forget(own.tag)  # there is no batch
            raise
        own = replace(own, stage=Stage.CREATING, file_id=file_id, at=self.clock.wall())
        self.records.put(own)
        try:
            state = aio.run(self.client.create(file_id, own.tag, own.at))
        except (BudgetError, ContextError):
            self._forget(own.tag)  # refused: there is no batch
            raise
        own = replace(own, stage=Stage.SUBMITTED, batch_id=state.batch_id, at=self.clock.wall())
        self.records.put(own)
        self.pending.update(dict.fromkeys(requests, own))
        self.says[own.tag] = str(state)

    def _requests_of(self, tag: str) -> dict[str, Any]:
        if tag not in self._requests:
            self._requests[tag] = self.records.requests(tag)
        return self._requests[tag]

    def _forget(self, tag: str) -> None:
        self.records.forget(tag)
        self._requests.pop(tag, None)


def parts_of(
    requests: Mapping[str, Mapping[str, Any]], limits: BatchLimits
) -> Iterator[dict[str, Mapping[str, Any]]]:
    """As few files as the limits allow, in order."""
    part: dict[str, Mapping[str, Any]] = {}
    size = 0
    for custom_id, body in requests.items():
        own = len(_line(custom_id, body))
        if part and (len(part) >= limits.requests or size + own > limits.bytes):
            yield part
            part, size = {}, 0
        part[custom_id] = body
        size += own
    if part:
        yield part


def _line(custom_id: str, body: Mapping[str, Any]) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
