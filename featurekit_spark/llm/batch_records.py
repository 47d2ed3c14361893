"""What is known of batches that were handed in, in small files that outlive a run: `{folder}/{tag}.json` says how far
one is, beside the requests it was made of and, once there are any, their answers.

Each file is whole or not there, and is written before what it tells of goes on, so that a run that is killed leaves
no batch that nobody knows of. Knows files; what a provider is, it does not.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Final

from featurekit_spark.cache.staged import filesystem_of
from featurekit_spark.cache.whole import write_whole
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import file_lock, local_path

__all__ = ["BatchRecords", "Stage", "Submission"]

_log = logging.getLogger(__name__)
_LOCK_S: Final = 1800.0  # another run may be handing in hundreds of megabytes


class Stage(StrEnum):
    """How far a submission is, as far as this side knows."""

    INTENDED = "intended"  # the requests are written down; there is no batch
    CREATING = "creating"  # the file is at the provider; there may be a batch
    SUBMITTED = "submitted"  # there is one
    ANSWERED = "answered"  # it ended, and what came of it is written down here


@dataclass(frozen=True)
class Submission:
    """One file of requests. `tag`: its name here and at the provider; `identity`: of the model; `run_id`: the run that
    made it; `at`: when it came to its stage, in seconds since 1970."""

    tag: str
    identity: str
    run_id: str
    stage: Stage
    at: float
    file_id: str | None = None
    batch_id: str | None = None


class BatchRecords:
    """The submissions below a folder, those of all models and runs."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._held_by: int | None = None

    @property
    def can_lock(self) -> bool:
        """Whether processes can tell each other here that they work on it."""
        return local_path(self.folder) is not None

    @contextmanager
    def locked(self, run_id: str) -> Iterator[None]:
        """Keep other processes and threads from handing in, and from taking in. Whoever holds it may ask again."""
        path, me = local_path(self.folder), threading.get_ident()
        if path is None or self._held_by == me:
            yield
            return
        with file_lock(path / ".lock", timeout_s=_LOCK_S, owner=f"batches of run {run_id}"):
            self._held_by = me
            try:
                yield
            finally:
                self._held_by = None

    def all(self, identity: str) -> list[Submission]:
        """The submissions of one model, in order of their names. Leftovers of forgotten ones are removed."""
        from pyarrow import fs

        found = self._storage.get_file_info(fs.FileSelector("", allow_not_found=True))
        names = sorted(info.base_name for info in found if not info.base_name.startswith("."))
        tags = {name.removesuffix(".json") for name in names if name.endswith(".json")}
        for name in names:
            if name.endswith(".jsonl") and name.split(".")[0] not in tags:
                self._remove(name)
        known = [self._read(tag) for tag in sorted(tags)]
        return [item for item in known if item is not None and item.identity == identity]

    def tags(self) -> list[str]:
        """Names of all submissions, whosever model answers them."""
        from pyarrow import fs

        found = self._storage.get_file_info(fs.FileSelector("", allow_not_found=True))
        return sorted(info.base_name.removesuffix(".json") for info in found if info.extension == "json")

    def intend(self, submission: Submission, requests: bytes) -> None:
        """Write down what is going to be handed in: lines of custom_id, method, url and body."""
        self._write(f"{submission.tag}.requests.jsonl", requests)
        self.put(submission)

    def put(self, submission: Submission) -> None:
        """Write down how far a submission is."""
        told = {name: value for name, value in asdict(submission).items() if name != "tag"}
        self._write(f"{submission.tag}.json", json.dumps(told).encode())

    def requests(self, tag: str) -> dict[str, dict[str, Any]]:
        """The bodies of a submission's requests, by custom_id, in order."""
        lines = map(json.loads, self._lines(f"{tag}.requests.jsonl"))
        return {line["custom_id"]: line["body"] for line in lines}

    def answered(self, submission: Submission, lines: Sequence[str], at: float) -> Submission:
        """Write down what came of it."""
        self.put_answers(submission.tag, lines)
        done = replace(submission, stage=Stage.ANSWERED, at=at)
        self.put(done)
        return done

    def put_answers(self, tag: str, lines: Iterable[str]) -> None:
        self._write(f"{tag}.answers.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def answers(self, tag: str) -> list[str]:
        return self._lines(f"{tag}.answers.jsonl")

    def forget(self, tag: str) -> None:
        """Remove a submission: its name first, so that what is left of it means nothing."""
        for name in (f"{tag}.json", f"{tag}.requests.jsonl", f"{tag}.answers.jsonl"):
            self._remove(name)

    @cached_property
    def _storage(self) -> Any:
        return filesystem_of(self.folder)

    def _read(self, tag: str) -> Submission | None:
        try:
            told: Mapping[str, Any] = json.loads(b"".join(self._bytes(f"{tag}.json")))
            return Submission(tag, **{**told, "stage": Stage(told["stage"])})
        except FileNotFoundError:  # another run has just taken it in
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self.folder}/{tag}.json is damaged ({error}): it tells of a batch that was paid for. See what the "
                "provider has under this name (metadata: featurekit), and remove the file once you have its answers."
            ) from error

    def _lines(self, name: str) -> list[str]:
        return b"".join(self._bytes(name)).decode().split("\n")[:-1]

    def _bytes(self, name: str) -> Iterator[bytes]:
        with self._storage.open_input_file(name) as file:
            yield file.read()

    def _write(self, name: str, data: bytes) -> None:
        self._guarded(name, lambda: write_whole(self.folder, name, data))

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
