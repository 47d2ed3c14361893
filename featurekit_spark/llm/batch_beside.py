"""A model that is asked online while batches are on their way: prompts that one of them answers are waited for, or paid
for once more where that is wanted.

Knows requests by their names, and what is written down of batches; asks the provider for them only when a run begins.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from featurekit_spark.cache.folder import Folder
from featurekit_spark.deferred import Answers, Asker, Came, OnTheWay
from featurekit_spark.errors import AnswersPendingError
from featurekit_spark.llm.base import Completion, Message
from featurekit_spark.llm.batch_answers import collected
from featurekit_spark.llm.batch_desk import BatchDesk
from featurekit_spark.llm.batch_records import BatchRecords
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import BatchClient, request_id

__all__ = ["ChatBesideBatches", "on_the_way", "waiting_for"]

_counting = threading.Lock()


class ChatBesideBatches(OpenAIChat):
    """The model online, with the options of OpenAIChat. `folder`: where batches are written down, beside the cache.
    `pending`: whether prompts that they answer wait for them (AnswersPendingError), or are asked and paid for again."""

    def __init__(
        self, folder: str | Folder, *, pending: Literal["wait", "pay"] = "wait", **options: Any
    ) -> None:
        super().__init__(**options)
        self.folder, self.pending = folder, pending
        # What a run waits for, which travels to workers; as long as there is none there is nothing to look for.
        self._awaited: frozenset[str] = frozenset()
        self._to_come: frozenset[str] = frozenset()
        self._runs = 0
        self._said = ""

    @property
    def pays_again(self) -> bool:
        return self.pending == "pay"

    @contextmanager
    def collecting(self, run_id: str) -> Iterator[Iterator[Answers]]:
        """What came since. Afterwards it is known what is still to come."""
        records = BatchRecords(self.folder)
        if not records.tags():
            self._to_come = frozenset()
            yield iter(())
            return
        desk = BatchDesk(BatchClient(self), records)
        with records.locked(run_id):
            yield collected(desk, self, run_id)
            own = [item for item in records.on_the_way() if item.identity == self.identity]
            ids = [own_id for item in own for own_id in desk.ids(item.tag)]
            self._to_come = frozenset(ids if self.pending == "wait" else ())
            self._said = (
                f"{waiting_for(desk, self.identity)} What was asked online is kept as well. To pay for them once more "
                "instead, online and at once: --set llm.pending=pay."
            )

    @contextmanager
    def opened(self, run_id: str, askers: Sequence[Asker] = (), came: Came | None = None) -> Iterator[None]:
        """For the length of a run: prompts on their way are waited for."""
        with _counting:
            self._awaited = self._to_come | self._awaited
            self._runs += 1
        try:
            yield
        finally:
            with _counting:
                self._runs -= 1
                if not self._runs:  # else another run of this process waits still
                    self._awaited = frozenset()

    def on_the_way(self) -> list[OnTheWay]:
        """What is to come, by what is written down here."""
        return on_the_way(BatchRecords(self.folder), {})

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
        """One answer. Raises as the model does, and AnswersPendingError where a batch is to answer."""
        asked: dict[str, Any] = {
            "system": system,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "response_format": response_format,
            "earlier": earlier,
        }
        if self._awaited and self._is_awaited(self.request(prompt, **asked)):
            raise AnswersPendingError(self._said)
        return await super().complete(prompt, **asked)

    def _is_awaited(self, request: Mapping[str, Any]) -> bool:
        try:
            return request_id(self.identity, request) in self._awaited
        except (ValueError, TypeError):  # it cannot be sent, which is for the model to say
            return False


def on_the_way(records: BatchRecords, says: Mapping[str, str]) -> list[OnTheWay]:
    """What is to come of everything that is written down here."""
    found = []
    for item in records.on_the_way():
        try:
            prompts = [body["messages"][-1]["content"] for _, body in records.requests(item.tag)]
        except FileNotFoundError:  # another run has just taken it in
            continue
        since = f"{datetime.fromtimestamp(item.since, UTC):%Y-%m-%d %H:%M} UTC"
        said = says.get(item.tag, f"{item.batch_id or item.tag}, handed in {since}")
        found.append(OnTheWay(item.askers, prompts, said))
    return found


def waiting_for(desk: BatchDesk, identity: str) -> str:
    """What a model's answers are waited for, for people."""
    own = [item for item in desk.records.on_the_way() if item.identity == identity]
    says = sorted(desk.says.get(item.tag, item.batch_id or item.tag) for item in own)
    named = "; ".join(says[:3]) + (f"; and {len(says) - 3} more" if len(says) > 3 else "")
    many = sum(item.requests for item in own)
    if not own:
        return f"waiting for answers of {identity} that another run is taking in just now. Run again."
    return (
        f"waiting for batch{'es' * (len(says) > 1)} {named}: {many} answers of {identity} are still to come. "
        "What came is kept, nothing was published; run again to collect."
    )
