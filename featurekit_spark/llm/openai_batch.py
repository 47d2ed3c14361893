"""The OpenAI batch protocol: files of requests that are answered within a day, at a lower price.

Owns how a file is handed in so that it is not handed in twice, how its state is asked for, and that each line has one
outcome. It must not know who asks, nor what is kept of it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from featurekit_spark.errors import BudgetError, BuildError, ContextError, ServiceError
from featurekit_spark.fingerprint import digest
from featurekit_spark.llm.batch_lines import Line, lines_of
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.paid.limits import LocalLimiter
from featurekit_spark.paid.openai_protocol import blames_request, judged, no_quota
from featurekit_spark.paid.retry import Breaker, Clock, FailureKind, RetryPolicy, failure_of, with_retries

if TYPE_CHECKING:
    import openai

__all__ = ["BatchClient", "BatchState", "Progress", "UnknownBatchError", "request_id"]

T = TypeVar("T")
_TAG: Final = "featurekit"
_ENDPOINT: Final = "/v1/chat/completions"
_NO_BATCHES: Final = frozenset({404, 405, 501})
_AHEAD_S: Final = 3600.0  # by how much the provider's clock may be behind ours


class UnknownBatchError(ContextError):
    """The provider has batches, and none of this id."""


class Progress(Enum):
    """How far a batch is, in the provider's words. After the last four nothing more comes."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Progress.COMPLETED, Progress.FAILED, Progress.EXPIRED, Progress.CANCELLED)


@dataclass(frozen=True)
class BatchState:
    """What the provider says of a batch. `files`: with answers and with errors; `asked`: with its requests. `faults`:
    (line number or None, code, message) of a batch that was refused as a whole."""

    batch_id: str
    progress: Progress
    done: int = 0
    failed: int = 0
    total: int = 0
    expires: datetime | None = None
    files: tuple[str, ...] = ()
    asked: str | None = None
    faults: tuple[tuple[int | None, str, str], ...] = ()

    @property
    def how_far(self) -> str:
        """For people."""
        until = "" if self.expires is None else f", until {self.expires:%Y-%m-%d %H:%M} UTC at the latest"
        return f"{self.progress.value}, {self.done + self.failed} of {self.total} done{until}"

    def __str__(self) -> str:
        return f"{self.batch_id} ({self.how_far})"


def request_id(identity: str, request: Mapping[str, Any]) -> str:
    """The name of a request's line: of all that is asked, and of whom. ValueError or TypeError for one that cannot be
    sent, half of a surrogate pair say."""
    text = json.dumps(request, sort_keys=True)
    json.dumps(request, ensure_ascii=False).encode()
    return digest("batch request", identity, text)


class BatchClient:
    """Batches of chat completions at the server of `chat`, with its key. `policy`: of files, 200 MB maybe; what is
    only asked is given up sooner, since a run begins with it."""

    def __init__(
        self, chat: OpenAIChat, policy: RetryPolicy | None = None, clock: Clock | None = None
    ) -> None:
        self.chat = chat
        self.policy = policy or RetryPolicy(timeout_s=600.0, deadline_s=1200.0)
        self.clock = clock or Clock()
        self._breaker = Breaker()

    async def ready(self) -> None:
        """Raises ContextError where nothing can be asked: without an API key, or without the packages."""
        self.chat.client()

    async def upload(self, name: str, requests: bytes) -> str:
        """Hand over a file of requests, which costs nothing; its id. Where an attempt's answer was lost, another looks
        first whether the file is there."""
        attempts = 0

        async def attempt() -> str:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and (found := await self._named(name)):
                return found[0]
            answer = await self._client.files.create(file=(name, requests), purpose="batch")
            return answer.id

        return await self._called("POST /files", attempt, self.policy)

    async def create(self, file_id: str, tag: str, since: float) -> BatchState:
        """Have a file answered. `tag` names the batch for good: where an attempt's answer was lost, another looks first
        whether it was made. `since`: when the first attempt is made, in seconds since 1970. ServiceError wherever
        there may be a batch."""
        attempts, unheard = 0, False

        async def attempt() -> BatchState:
            nonlocal attempts, unheard
            attempts += 1
            if attempts > 1 and (found := (await self._listed({tag}, since)).get(tag)) is not None:
                return found
            try:
                answer = await self._client.batches.create(
                    input_file_id=file_id, endpoint=_ENDPOINT, completion_window="24h", metadata={_TAG: tag}
                )
                return _state(answer)
            except BaseException as error:  # one that came too late is cancelled
                unheard = unheard or not _refuses(error)
                raise

        try:
            return await self._called("POST /batches", attempt)
        except (BudgetError, ContextError) as error:
            if not unheard:
                raise
            raise ServiceError(
                f"{error} An earlier attempt was not answered, and may have made the batch: a later run looks for it."
            ) from error

    async def find(self, tags: Iterable[str], since: float, *, once: bool = False) -> dict[str, BatchState]:
        """The batches of these tags that were made at `since` or later. `once`: in one attempt."""
        wanted = set(tags)
        return await self._called("GET /batches", lambda: self._listed(wanted, since), self._asking(once))

    async def state(self, batch_id: str, *, once: bool = False) -> BatchState:
        """How far a batch is. `once`: in one attempt. UnknownBatchError where the provider has none of this id."""

        async def attempt() -> BatchState:
            return _state(await self._client.batches.retrieve(batch_id))

        try:
            return await self._called(f"GET /batches/{batch_id}", attempt, self._asking(once))
        except ContextError as error:
            if _status(error.__cause__) != 404:
                raise
            try:  # an address that serves nothing knows no batch either
                await self.find((), self.clock.wall(), once=once)
            except ContextError as none:
                if _status(none.__cause__) in _NO_BATCHES:
                    raise
            raise UnknownBatchError(str(error)) from error

    async def files_named(self, name: str) -> list[str]:
        """The files of requests that were handed over under this name."""
        return await self._called("GET /files", lambda: self._named(name))

    async def cancel(self, batch_id: str) -> BatchState:
        """Ask for the end of a batch; what is answered by then is answered, and paid for."""

        async def attempt() -> BatchState:
            return _state(await self._client.batches.cancel(batch_id))

        return await self._called(f"POST /batches/{batch_id}/cancel", attempt)

    async def delete(self, file_id: str) -> None:
        """Remove a file. One that is gone is removed; a provider that removes none keeps it by rules of its own."""

        async def attempt() -> None:
            import openai

            try:
                await self._client.files.delete(file_id)
            except openai.APIStatusError as error:
                if error.status_code not in _NO_BATCHES:
                    raise

        await self._called(f"DELETE /files/{file_id}", attempt, self._of_trifles)

    async def lines(self, state: BatchState, custom_ids: Sequence[str], *, once: bool = False) -> list[Line]:
        """One line for each request of a batch that ended, in the order in which they were handed in. `once`: in one
        attempt for each file."""
        found: dict[str, Line] = {}
        for file_id in state.files:
            for line in lines_of(await self._content(file_id, once)):
                # An answer is worth more than an error, wherever both are told; of two the first counts.
                known = found.get(line.custom_id)
                if known is None or (known.body is None and line.body is not None):
                    found[line.custom_id] = line
        return [found.get(own) or _unanswered(own, at, state) for at, own in enumerate(custom_ids, start=1)]

    async def _content(self, file_id: str, once: bool) -> bytes:
        async def attempt() -> bytes:
            answer = await self._client.files.content(file_id)
            return bytes(answer.content)

        policy = replace(self.policy, attempts=1) if once else self.policy
        return await self._called(f"GET /files/{file_id}/content", attempt, policy)

    async def _listed(self, tags: set[str], since: float) -> dict[str, BatchState]:
        found: dict[str, BatchState] = {}
        async for batch in self._client.batches.list(limit=100):  # the newest first
            if batch.created_at < since - _AHEAD_S or len(found) == len(tags):
                break
            tag = (batch.metadata or {}).get(_TAG)
            if tag in tags:
                found[tag] = _state(batch)
        return found

    async def _named(self, name: str) -> list[str]:
        return [file.id async for file in self._client.files.list(purpose="batch") if file.filename == name]

    @property
    def _of_trifles(self) -> RetryPolicy:
        """A later run does what fails."""
        return replace(self._of_questions, attempts=min(self.policy.attempts, 2))

    def _asking(self, once: bool) -> RetryPolicy:
        return replace(self._of_questions, attempts=1) if once else self._of_questions

    @property
    def _of_questions(self) -> RetryPolicy:
        timeout_s, deadline_s = min(self.policy.timeout_s, 30.0), min(self.policy.deadline_s, 120.0)
        return replace(self.policy, timeout_s=timeout_s, deadline_s=deadline_s)

    @property
    def _client(self) -> openai.AsyncOpenAI:
        return self.chat.client()

    async def _called(
        self, what: str, attempt: Callable[[], Awaitable[T]], policy: RetryPolicy | None = None
    ) -> T:
        """Raises ServiceError (worth another try), BudgetError (no quota), and ContextError where nothing helps: no
        request is to blame for it."""
        await self.ready()
        try:
            called = await with_retries(
                attempt,
                lambda error: judged(error, self.clock, blames=lambda status, code: True),
                what=f"{what} at {self.chat.base_url}",
                limiter=LocalLimiter(),
                breaker=self._breaker,
                policy=policy or self._of_questions,
                clock=self.clock,
            )
        except BuildError as refused:
            status = _status(refused)
            if status in _NO_BATCHES and what in ("POST /files", "POST /batches", "GET /batches"):
                raise ContextError(
                    f"llm.mode is batch, but {self.chat.base_url} has no batch API ({what} answered {status}). Use "
                    "llm.mode: online there."
                ) from refused
            raise ContextError(
                f"the batch API refused: {refused}. See whether the key in {self.chat.key} is the one that the "
                "batch was handed in with."
            ) from refused
        return called.value


def _status(refused: BaseException | None) -> int | None:
    """With which the provider refused."""
    failure = None if refused is None else failure_of(refused)
    return getattr(None if failure is None else failure.__cause__, "status_code", None)


def _refuses(error: BaseException) -> bool:
    """Whether the provider has said that it did nothing."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return False
    return 400 <= error.status_code < 500 and error.status_code not in (408, 409)


def _state(batch: Any) -> BatchState:
    counts = batch.request_counts
    errors = (batch.errors and batch.errors.data) or []
    return BatchState(
        batch.id,
        _progress(batch.status),
        done=counts.completed if counts else 0,
        failed=counts.failed if counts else 0,
        total=counts.total if counts else 0,
        expires=datetime.fromtimestamp(batch.expires_at, UTC) if batch.expires_at else None,
        files=tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),
        asked=batch.input_file_id or None,
        faults=tuple((error.line, error.code or "", error.message or "") for error in errors),
    )


def _progress(status: str) -> Progress:
    try:
        return Progress(status)
    except ValueError:  # a word of this provider's own: it has not said that the batch ended
        return Progress.IN_PROGRESS


def _unanswered(custom_id: str, number: int, state: BatchState) -> Line:
    """A request of which no file tells: the batch ended before it, or was refused."""
    own = [fault for fault in state.faults if fault[0] == number]
    _, code, message = (own or [fault for fault in state.faults if fault[0] is None] or [(None, "", "")])[0]
    said = f"batch {state.batch_id} {state.progress.value}" + (
        f", {code}: {message[:300]}" if message else ""
    )
    if no_quota(None, code):
        return Line(custom_id, None, FailureKind.QUOTA, said)
    kind = FailureKind.TERMINAL if own else FailureKind.RETRYABLE
    return Line(custom_id, None, kind, said, blames_request(None, code))
