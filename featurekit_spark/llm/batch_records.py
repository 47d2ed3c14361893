"""What is known of batches that were handed in, in small files that outlive a run: `{folder}/{tag}.json` says how far
one is, and all that a later process needs to take it in, beside the requests it was made of and, once there are any,
their answers.

Each file is whole or not there, and is written before what it tells of goes on, so that a run that is killed leaves
no batch that nobody knows of. Knows files; what a provider is, it does not. Keys of providers are not in them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from featurekit_spark.cache.folder import Folder
from featurekit_spark.deferred import Asker
from featurekit_spark.errors import CacheError, LockedError
from featurekit_spark.locks import file_lock

__all__ = ["BatchRecords", "Stage", "Submission"]

_log = logging.getLogger(__name__)
_LOCK_S: Final = 1800.0  # another run may be handing in hundreds of megabytes
_BLOCK: Final = 1 << 22


class Stage(StrEnum):
    """How far a submission is, as far as this side knows."""

    INTENDED = "intended"  # the requests are written down; there is no batch
    CREATING = "creating"  # the file is at the provider; there may be a batch
    SUBMITTED = "submitted"  # there is one
    ANSWERED = "answered"  # it ended, and what came of it is written down here
    DONE = "done"  # the cache has what came of it, or there was no batch; files are left at the provider


@dataclass(frozen=True)
class Submission:
    """One file of requests. `tag`: its name here and at the provider; `identity`: of the model, and `model`, `base_url`
    and the name of the key's variable apart; `run_id`: the run that made it; `at`: when it came to its stage, `since`:
    when it was made, in seconds since 1970; `requests`: how many; `price`: of a million tokens (prompt, answer, cached)
    when it was handed in; `askers`: the builders that may have asked. `files`: what the provider keeps of it and need
    not any more; `sought`: it may have a file of this name that is not among them."""

    tag: str
    identity: str
    run_id: str
    stage: Stage
    at: float
    file_id: str | None = None
    batch_id: str | None = None
    model: str = ""
    base_url: str = ""
    key: str = ""
    since: float = 0.0
    requests: int = 0
    price: tuple[str | None, ...] | None = None
    askers: tuple[Asker, ...] = ()
    files: tuple[str, ...] = ()
    sought: bool = False

    @property
    def file_name(self) -> str:
        """Of its requests, at the provider."""
        return f"featurekit-{self.tag}.jsonl"

    @property
    def on_the_way(self) -> bool:
        """Whether answers may still come of it."""
        return self.stage in (Stage.INTENDED, Stage.CREATING, Stage.SUBMITTED)

    @classmethod
    def of(cls, tag: str, told: Mapping[str, Any]) -> Submission:
        """From what its record tells."""
        price = told.get("price")
        return cls(
            tag,
            **{
                **told,
                "stage": Stage(told["stage"]),
                "price": None if price is None else tuple(price),
                "askers": tuple(Asker(**asker) for asker in told.get("askers", ())),
                "files": tuple(told.get("files", ())),
            },
        )


class BatchRecords:
    """The submissions below a folder, those of all models and runs."""

    def __init__(self, folder: str | Folder) -> None:
        self.folder = Folder.of(folder)
        self._held_by: int | None = None

    @property
    def can_lock(self) -> bool:
        """Whether processes can tell each other here that they work on it."""
        return self.folder.local is not None

    @contextmanager
    def locked(self, run_id: str) -> Iterator[None]:
        """Keep other processes and threads from handing in, and from taking in. Whoever holds it may ask again."""
        path, me = self.folder.local, threading.get_ident()
        if path is None or self._held_by == me:
            yield
            return
        with file_lock(path / ".lock", timeout_s=_LOCK_S, owner=f"batches of run {run_id}"):
            self._held_by = me
            try:
                yield
            finally:
                self._held_by = None

    def claim(self, tag: str, held: ExitStack, run_id: str) -> bool:
        """Keep what came of one submission from all others until `held` is closed, or this process ends; False where
        another run has it."""
        path = self.folder.local
        if path is not None:
            try:
                held.enter_context(file_lock(path / f".{tag}.lock", timeout_s=0.0, owner=f"run {run_id}"))
            except LockedError:
                return False
        return True

    def all(self) -> list[Submission]:
        """All submissions, whosever model answers them, in order of their names."""
        known = [self.read(tag) for tag in self.tags()]
        return [item for item in known if item is not None]

    def on_the_way(self) -> list[Submission]:
        """Those of which answers may still come. Where runs lock each other out, what is only intended was left by one
        that was killed."""
        alive = {Stage.CREATING, Stage.SUBMITTED} if self.can_lock else set(Stage)
        return [item for item in self.all() if item.on_the_way and item.stage in alive]

    def sweep(self) -> None:
        """Remove what forgotten ones left. Under `locked` only: what has no name yet may be about to get one."""
        tags = set(self.tags())
        for name in self._names():
            if name.endswith(".jsonl") and name.split(".")[0] not in tags:
                self._remove(name)

    def tags(self) -> list[str]:
        """Names of all submissions, whosever model answers them."""
        return sorted(name.removesuffix(".json") for name in self._names() if name.endswith(".json"))

    def intend(self, submission: Submission, requests: bytes) -> None:
        """Write down what is going to be handed in: lines of custom_id, method, url and body."""
        self._write(f"{submission.tag}.requests.jsonl", requests)
        self.put(submission)

    def put(self, submission: Submission) -> None:
        """Write down how far a submission is."""
        told = {name: value for name, value in asdict(submission).items() if name != "tag"}
        self._write(f"{submission.tag}.json", json.dumps(told).encode())

    def requests(self, tag: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """custom_id and body of a submission's requests, in order; one at a time."""
        for text in self._lines(f"{tag}.requests.jsonl"):
            line = json.loads(text)
            yield line["custom_id"], line["body"]

    def answered(self, submission: Submission, lines: Iterable[str], at: float) -> Submission:
        """Write down what came of it."""
        self.put_answers(submission.tag, lines)
        done = replace(submission, stage=Stage.ANSWERED, at=at)
        self.put(done)
        return done

    def put_answers(self, tag: str, lines: Iterable[str]) -> None:
        self._write(f"{tag}.answers.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def answers(self, tag: str) -> list[str]:
        """Lines of what came of it; none where nothing did, or another run has taken it in."""
        try:
            return list(self._lines(f"{tag}.answers.jsonl"))
        except FileNotFoundError:
            return []

    def strip(self, tag: str) -> None:
        """Remove a submission's texts: the cache has what came of them."""
        for name in (f"{tag}.requests.jsonl", f"{tag}.answers.jsonl"):
            self._remove(name)

    def forget(self, tag: str) -> None:
        """Remove a submission: its name first, so that what is left of it means nothing."""
        self._remove(f"{tag}.json")
        self.strip(tag)
        self._remove(f".{tag}.lock")

    def read(self, tag: str) -> Submission | None:
        """One submission; None where there is none (any more). CacheError for a damaged record."""
        try:
            return Submission.of(tag, json.loads(b"".join(self._blocks(f"{tag}.json"))))
        except FileNotFoundError:  # another run has just taken it in
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{self.folder}/{tag}.json is damaged ({error}): it tells of a batch that was paid for. See what the "
                "provider has under this name (metadata: featurekit), and remove the file once you have its answers."
            ) from error

    @cached_property
    def _storage(self) -> Any:
        return self.folder.storage

    def _names(self) -> list[str]:
        from pyarrow import fs

        found = self._storage.get_file_info(fs.FileSelector("", allow_not_found=True))
        return sorted(info.base_name for info in found if not info.base_name.startswith("."))

    def _lines(self, name: str) -> Iterator[str]:
        # Not by the file's own idea of lines: a text may hold separators that end none.
        rest = b""
        for block in self._blocks(name):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                yield line.decode()

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._storage.open_input_stream(name) as file:
            while block := file.read(_BLOCK):
                yield block

    def _write(self, name: str, data: bytes) -> None:
        self._guarded(name, lambda: self.folder.write(name, data))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise CacheError(
                f"{self.folder}/{name} could not be written: {error}. Nothing is handed in that is not written down "
                "first; make room or make the folder writable, and run again."
            ) from error

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.delete_file(name)
