"""The desk where batches are handed in and asked for: each request goes in once, and what came is kept until it is in
the cache. Of all models that were ever asked here, at one provider.

Works with threads and locks, not with coroutines: what it does takes minutes or a day. Knows requests and lines, no
builders; when a run waits, and for what, is the model's affair.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

from featurekit_spark import aio
from featurekit_spark.errors import BudgetError, ContextError, FeaturekitError, ServiceError
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.llm.openai_batch import BatchClient, BatchState, UnknownBatchError
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
    """At the provider of `client`. `says`: how far each submission is that is still on its way, by tag."""

    client: BatchClient
    records: BatchRecords
    limits: BatchLimits = field(default_factory=BatchLimits)
    clock: Clock = field(default_factory=Clock)
    says: dict[str, str] = field(default_factory=dict)
    _ids: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _up: bool = True  # whether the provider is asked for more: each question that fails takes its time
    _trifles: bool = True  # whether it is asked for what may wait

    def look(self, run_id: str, *, identity: str | None = None) -> list[Submission]:
        """Ask what became of everything that was handed in, and bring the records up to date; what they say then. A
        provider that does not answer is asked later. ContextError or BudgetError where it refuses to tell of a batch
        of `identity`; of others that is a warning, and they are asked for in one attempt."""
        with self.records.locked(run_id):
            self._up = self._trifles = True
            self.says = {}
            if self.records.can_lock:
                self.records.sweep()
            # By chance, since one that always fails must not always come before the same others.
            by_chance = self.clock.uniform
            there = sorted(
                self.records.all(), key=lambda item: (item.identity != identity, by_chance(0.0, 1.0))
            )
            if not self._can_ask(there):
                return there
            unsure = [item for item in there if item.stage is Stage.CREATING and self.asks(item)]
            states = self._found(unsure, identity)
            return [now for item in there if (now := self._looked_at(item, states, identity)) is not None]

    def asks(self, submission: Submission) -> bool:
        """Whether it was handed in where this desk asks: a key goes to no other address."""
        return submission.base_url in ("", self.client.chat.base_url)

    def hand_in(
        self, requests: Mapping[str, Mapping[str, Any]], template: Submission, known: Collection[str] = ()
    ) -> set[str]:
        """Hand in those that nobody has handed in yet, and that are not `known`; the submissions that they all are in.
        `template` says of whom, and for whom. Raises ServiceError where the provider cannot take them, BudgetError
        without a quota."""
        with self.records.locked(template.run_id):
            there, tags = {*known}, set()
            for item in self.records.all():
                if item.identity == template.identity and item.stage is not Stage.DONE:
                    own = self._to_have(item)
                    there.update(own)
                    if not requests.keys().isdisjoint(own):
                        tags.add(item.tag)
            new = {custom_id: body for custom_id, body in requests.items() if custom_id not in there}
            return tags | {self._submit(part, template) for part in parts_of(new, self.limits)}

    def _to_have(self, item: Submission) -> Collection[str]:
        """The requests whose answers are to come, or are there: others were told as errors, and may be asked again."""
        if item.stage is not Stage.ANSWERED:
            return self.ids(item.tag)
        return [json.loads(text)["custom_id"] for text in self.records.answers(item.tag)]

    def ids(self, tag: str) -> tuple[str, ...]:
        """The names of a submission's requests."""
        if tag not in self._ids:
            try:
                self._ids[tag] = tuple(custom_id for custom_id, _ in self.records.requests(tag))
            except FileNotFoundError:  # another run has just taken it in
                return ()
        return self._ids[tag]

    def ended(self, tag: str) -> bool:
        """Whether nothing more is to come of a submission: it is answered, here or at the provider, or gone."""
        submission = self.records.read(tag)
        if submission is None or not submission.on_the_way:
            self.says.pop(tag, None)
            with ExitStack() as held:  # else another run is about to take it in
                return submission is None or self.records.claim(tag, held, "that waits")
        if submission.batch_id is None:
            return False
        try:
            state = aio.run(self.client.state(submission.batch_id))
        except (ServiceError, ContextError) as error:  # the next run says more
            _log.warning("batch %s cannot be asked for: %s", submission.batch_id, error)
            return False
        self.says[tag] = str(state)
        return state.progress.ended

    def state_of(self, submission: Submission) -> str:
        """How far the provider says that a submission is. Raises ServiceError, ContextError."""
        if submission.batch_id is None or not self.asks(submission):
            return submission.stage.value
        return aio.run(self.client.state(submission.batch_id)).how_far

    def cancel(self, submission: Submission) -> BatchState | None:
        """Ask the provider to end a batch; what came by then is collected as always. What it says of it, which may have
        ended before; None where there is none yet. UnknownBatchError where the provider has none of its id."""
        if submission.batch_id is None:
            return None
        try:
            return aio.run(self.client.cancel(submission.batch_id))
        except ContextError:
            state = aio.run(self.client.state(submission.batch_id))
            if not state.progress.ended:
                raise
            return state

    def done(self, submission: Submission, custom_ids: Collection[str], run_id: str) -> None:
        """What came of these is in the cache, or was told as an error: it answers nothing any more."""
        with self.records.locked(run_id):
            texts = self.records.answers(submission.tag)
            left = [text for text in texts if json.loads(text)["custom_id"] not in custom_ids]
            now = self.records.read(submission.tag)
            if now is None:
                return
            if not left:
                self.drop(now)
            elif len(left) < len(texts):
                self.records.put_answers(submission.tag, left)

    def drop(self, submission: Submission) -> None:
        """Forget a submission, once the provider keeps no file of it either."""
        self._ids.pop(submission.tag, None)
        done = replace(submission, stage=Stage.DONE, at=self.clock.wall())
        if done.files or done.sought:
            self.records.put(done)
            self.records.strip(done.tag)
            done = self._cleared(done)
        if not (done.files or done.sought):
            self.records.forget(done.tag)

    def _can_ask(self, there: Sequence[Submission]) -> bool:
        """Without a key a run may still need no call; what is on its way stays so."""
        if not any(self.asks(item) for item in there):
            return True
        try:
            aio.run(self.client.ready())
        except ContextError as error:
            _log.warning("batches of earlier runs cannot be asked for: %s", error)
            self.says = {
                item.tag: f"{item.batch_id or item.tag} (not asked)" for item in there if item.on_the_way
            }
            return False
        return True

    def _looked_at(
        self, item: Submission, states: Mapping[str, BatchState] | None, identity: str | None
    ) -> Submission | None:
        """One that no code was made for must not keep the others from the cache: it stays."""
        try:
            return self._brought(item, states, identity)
        except FeaturekitError:
            raise
        except Exception as error:
            name = item.batch_id or item.tag
            _log.warning("batch %s cannot be taken in, and stays: %s: %s", name, type(error).__name__, error)
            self.says[item.tag] = f"{name} (cannot be taken in: {type(error).__name__})"
            return None

    def _brought(
        self, item: Submission, states: Mapping[str, BatchState] | None, identity: str | None
    ) -> Submission | None:
        """One record, brought up to date; None where it is over."""
        if not self.asks(item):
            if item.on_the_way:
                self.says[item.tag] = f"{item.batch_id or item.tag} (at {item.base_url})"
            return item
        match item.stage:
            case Stage.INTENDED:
                return self._broken_off(item)
            case Stage.CREATING:
                return self._made(item, states, identity)
            case Stage.SUBMITTED:
                return self._asked(item, identity)
            case Stage.ANSWERED:
                return self._cleared(item)
            case Stage.DONE:
                self.drop(item)
                return None

    def _broken_off(self, item: Submission) -> Submission | None:
        """One whose run ended before there could be a batch. Without a lock it may be about to hand in."""
        if not self.records.can_lock and self.clock.wall() - item.at <= self._unsure_s:
            self.says[item.tag] = f"{item.tag} (being handed in)"
            return item
        return self._over(item, replace(item, sought=True))

    def _over(self, item: Submission, gone: Submission) -> Submission | None:
        """Drop one that has no batch; what it is now where another run goes on with it."""
        now = self.records.read(item.tag)
        if now != item:
            return now
        self.drop(gone)
        return None

    @property
    def _unsure_s(self) -> float:
        """After which a hand-in is not going on any more. Without a lock another run may still be at it."""
        return self.limits.unsure_s if self.records.can_lock else max(self.limits.unsure_s, 3600.0)

    def _found(self, unsure: Sequence[Submission], identity: str | None) -> dict[str, BatchState] | None:
        """The batches of those that were being made when a run ended; None where the provider does not tell."""
        if not unsure:
            return {}
        own = [item.tag for item in unsure if item.identity == identity]
        try:
            since = min(item.at for item in unsure)
            return aio.run(self.client.find({item.tag for item in unsure}, since, once=not own))
        except (
            ServiceError
        ) as error:  # a list that always fails keeps no batch that is known from being asked for
            _log.warning("batches of earlier runs cannot be asked for: %s", error)
        except (BudgetError, ContextError) as error:
            hint = f"{error} Whether {', '.join(own or [item.tag for item in unsure])} was made, only its list tells."
            if own:
                raise type(error)(hint) from error
            _log.warning("batches of earlier runs cannot be asked for: %s", hint)
        return None

    def _made(
        self, item: Submission, states: Mapping[str, BatchState] | None, identity: str | None
    ) -> Submission | None:
        state = None if states is None else states.get(item.tag)
        if state is not None:
            made = replace(item, stage=Stage.SUBMITTED, batch_id=state.batch_id, at=self.clock.wall())
            self.records.put(made)
            return self._asked(made, identity)
        if states is not None and self.clock.wall() - item.at > self._unsure_s:
            _log.warning("batch %s was never made; its requests may be handed in again", item.tag)
            return self._over(item, replace(item, files=_file_ids(item.file_id)))
        why = "not known to the provider yet" if states is not None else "the provider does not tell of it"
        self.says[item.tag] = f"{item.tag} ({why})"
        return item

    def _asked(self, item: Submission, identity: str | None) -> Submission:
        assert item.batch_id is not None  # its stage says so
        own = item.identity == identity
        if not self._up:
            self.says[item.tag] = f"{item.batch_id} (the provider does not answer)"
            return item
        try:
            state = aio.run(self.client.state(item.batch_id, once=not own))
            if not state.progress.ended:
                self.says[item.tag] = str(state)
                return item
            lines = aio.run(self.client.lines(state, self.ids(item.tag), once=not own))
        except (BudgetError, ContextError) as error:
            hint = str(error)
            if isinstance(error, UnknownBatchError):
                hint += (
                    f" Where it is gone for good, `featurekit batches cancel {item.batch_id} --forget` removes what is "
                    "kept of it: its requests are then made anew, and paid for."
                )
            if own:
                raise type(error)(hint) from error
            _log.warning("batch %s of %s cannot be asked for: %s", item.batch_id, item.identity, hint)
            self.says[item.tag] = f"{item.batch_id} (the provider refuses to tell)"
            return item
        except ServiceError as error:
            self._up = self._trifles = False
            _log.warning("batch %s cannot be asked for: %s", item.batch_id, error)
            self.says[item.tag] = f"{item.batch_id} (the provider does not answer)"
            return item
        answered = replace(item, files=_file_ids(state.asked or item.file_id, *state.files))
        texts = (line.to_json() for line in lines)
        return self._cleared(self.records.answered(answered, texts, self.clock.wall()))

    def _cleared(self, item: Submission) -> Submission:
        """Without the files that the provider keeps of it; what fails is told, and tried again by a later run."""
        if not (item.files or item.sought) or not self._trifles:
            return item
        files, sought = list(item.files), item.sought
        try:
            if sought:
                named = aio.run(self.client.files_named(item.file_name))
                files, sought = [*files, *(file for file in named if file not in files)], False
            while files:
                aio.run(self.client.delete(files[0]))
                files.pop(0)
        except (ServiceError, BudgetError, ContextError) as error:
            self._trifles = False
            _log.warning(
                "files of batch %s may still be at the provider, and a later run removes them: %s",
                *(item.batch_id or item.tag, error),
            )
        cleared = replace(item, files=tuple(files), sought=sought)
        if cleared != item:
            self.records.put(cleared)
        return cleared

    def _submit(self, requests: Mapping[str, Mapping[str, Any]], template: Submission) -> str:
        """Hand in one file. Before each step is written down what a later run needs where this one is killed in it."""
        data = b"".join(_line(custom_id, body) for custom_id, body in requests.items())
        now = self.clock.wall()
        own = replace(
            template, tag=uuid.uuid4().hex, stage=Stage.INTENDED, at=now, since=now, requests=len(requests)
        )
        self.records.intend(own, data)
        try:
            file_id = aio.run(self.client.upload(own.file_name, data))
        except ServiceError:
            self.drop(replace(own, sought=True))  # there is no batch; the file may have come
            raise
        except Exception:
            self.drop(own)
            raise
        own = replace(own, stage=Stage.CREATING, file_id=file_id, at=self.clock.wall())
        self.records.put(own)
        try:
            state = aio.run(self.client.create(file_id, own.tag, own.at))
        except (BudgetError, ContextError):
            self.drop(replace(own, files=_file_ids(file_id)))  # refused: there is no batch
            raise
        self.records.put(replace(own, stage=Stage.SUBMITTED, batch_id=state.batch_id, at=self.clock.wall()))
        self.says[own.tag] = str(state)
        return own.tag


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


def _file_ids(*file_ids: str | None) -> tuple[str, ...]:
    return tuple(file_id for file_id in file_ids if file_id is not None)
