"""Paid answers made durable while their stage runs: one immutable file per micro-batch, beside the cache.

A task that is tried again finds them before it asks anybody; the next run takes in what a run left that died. Knows
rows and files; what an answer is, and how it was got, it does not.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, FeatureCache, fitted
from featurekit_spark.cache.current import newest_rows, to_entries
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.liveness import SILENCE_S, alive, claimed, runs_among
from featurekit_spark.errors import CacheError, ConfigError, LockedError
from featurekit_spark.fingerprint import digest

__all__ = ["Journal", "JournalingCache", "MicroBatch", "MicroBatches", "Observer", "take_in"]

_log = logging.getLogger(__name__)
_BEGUN: Final = "begun"
_OBSERVED: Final = "observed"  # no extension, so that nobody reads it for answers
_SCHEMA: Final = pa.schema([field for field in ENTRY_SCHEMA if field.name != "recorded"])


@dataclass(frozen=True)
class MicroBatch:
    """Answers that became durable together, or calls of a run that failed: rows of ENTRY_SCHEMA. `written`: when."""

    run_id: str
    written: datetime
    rows: pa.Table


@dataclass(frozen=True)
class MicroBatches:
    """A run's micro-batches; each file is read when it is its turn. `failed`: calls without an answer, which are in no
    file. They come first: whoever has no time for all of it has seen them."""

    folder: Folder
    run_id: str
    files: tuple[tuple[str, datetime], ...]
    failed: tuple[MicroBatch, ...] = ()

    def __len__(self) -> int:
        return len(self.files) + len(self.failed)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.failed
        for path, written in self.files:
            with suppress(OSError, pa.ArrowException):  # damaged, or gone meanwhile
                rows = pa.ipc.open_file(self.folder.read(path)).read_all()
                yield MicroBatch(self.run_id, written, rows)


Observer: TypeAlias = Callable[[MicroBatches, Mapping[str, str]], None]
"""Told of a run's micro-batches, and of the models by config_hash, once the run is over: in the driver's process. It
must raise nothing."""


@runtime_checkable
class JournalingCache(Protocol):
    """A cache that keeps a journal beside it."""

    def journal(self, run_id: str, *, size: int | None) -> Journal | None:
        """A run's journal with micro-batches of `size` answers, None for what its client has in flight. There is
        none where workers could not reach it."""

    @property
    def journals(self) -> Folder | None:
        """The folder of all runs' journals."""


@dataclass
class Journal:
    """One run's answers so far. Travels to workers, which add to it; each reads it once, when it is first asked.

    `folder`: of all journals; `size`: answers per file, as many as calls may be in flight, so that together at most
    twice as many are lost with a process.
    """

    folder: Folder
    run_id: str
    size: int | None = None
    _found: dict[tuple[str, str], Entry] | None = field(default=None, repr=False)
    _begun: bool = field(default=False, repr=False)
    _seen: bool = field(default=False, repr=False)
    _travelled: bool = field(default=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def opened(self) -> Iterator[Journal]:
        """For the length of a run. What an error or a crash leaves stays for the next run; otherwise the files go, as
        the cache has what is in them."""
        with alive(self.folder, self.run_id):
            yield self
            self.forget()

    @property
    def place(self) -> str:
        """What runs have in common whose journals are in one folder."""
        local = self.folder.local
        return digest("journals", self.folder.uri if local is None else str(local.resolve()))

    def begin(self) -> None:
        """Before the first call: a CacheError where the folder cannot be written to. Its file tells workers that they
        see the driver's storage; one that does not keeps no journal."""
        if not self._begun:
            self._write(_BEGUN, _SCHEMA.empty_table())
            self._begun = True

    def seen(self) -> bool:
        """Whether what the driver began was ever to be seen from this process."""
        if not self._seen:
            try:
                self._seen = self._is_open()
            except (OSError, pa.ArrowException, ConfigError) as error:
                _log.warning(
                    "the journal %s cannot be reached from this worker, whose answers are durable when the stage ends: "
                    "%s",
                    self.folder,
                    self.folder.told(error),
                )
        return self._seen

    def close(self) -> bool:
        """Nothing can be added any more: by workers that outlive their driver, say, once another run takes it in. False
        where it stays open, as nothing may be removed there."""
        try:
            self.folder.remove(f"{self.run_id}/{_BEGUN}.arrow")
        except OSError as error:
            _log.warning("the journal of run %s stays open: %s", self.run_id, self.folder.told(error))
            return False
        return True

    def _is_open(self) -> bool:
        return bool(self.folder.info(f"{self.run_id}/{_BEGUN}.arrow").is_file)

    def find(self, builder: str, wanted: Mapping[str, str]) -> dict[str, Entry]:
        """Answers by key, for key -> entry_id."""
        with self._lock:
            if self._found is None:
                rows, _, unread = _rows_of(self.folder, self.run_id)
                if unread:
                    raise CacheError(
                        f"answers in the journal {self.folder}/{self.run_id} cannot be read: {unread[0]}. Nobody is "
                        "asked again for what may be in it; see that the storage can be read, and run again."
                    )
                self._found = {(entry.builder, entry.entry_id): entry for entry in to_entries(rows)}
        found = ((key, self._found.get((builder, identity))) for key, identity in wanted.items())
        return {key: entry for key, entry in found if entry is not None}

    def add(self, entries: pa.Table) -> None:
        """Make new entries (ENTRY_SCHEMA less `recorded`) durable: they are when this returns. CacheError where they
        are not, and where the journal is closed."""
        if not self._travelled:
            self.begin()
        self._check_open(len(entries))
        self._write(uuid.uuid4().hex, fitted(entries, _SCHEMA))
        # Whoever takes the journal in closes it before it looks what is there: open still, it will be seen.
        self._check_open(len(entries))

    def _check_open(self, answers: int) -> None:
        if self.folder.local is not None and not self._travelled:
            return  # this process holds the run's lock
        try:
            if self._is_open():
                return
        except (OSError, pa.ArrowException) as error:
            raise self._unkept(self.run_id, answers, error) from error
        raise CacheError(
            f"the journal {self.folder}/{self.run_id} is closed: another run has taken in what was in it, or its "
            "folder is gone. No further calls are made for this run."
        )

    def micro_batches(self, failed: tuple[MicroBatch, ...] = ()) -> MicroBatches:
        """What the run has made durable so far."""
        files = [
            (info.path, info.mtime or datetime.now(UTC))
            for info in self.folder.infos(self.run_id)
            if info.extension == "arrow" and info.base_name != f"{_BEGUN}.arrow" and info.base_name[0] != "."
        ]
        files.sort(key=lambda file: (file[1], file[0]))
        return MicroBatches(self.folder, self.run_id, tuple(files), failed)

    def show(
        self, observer: Observer, models: Mapping[str, str], failed: tuple[MicroBatch, ...] = ()
    ) -> None:
        """Tell the observer, once for a journal: where the run failed, the next one finds it as it is."""
        if self.folder.info(f"{self.run_id}/{_OBSERVED}").is_file:
            return
        batches = self.micro_batches(failed)
        if len(batches):
            observer(batches, models)
            with suppress(OSError):  # then it is told twice
                self.folder.write(f"{self.run_id}/{_OBSERVED}", b"told")

    def forget(self, read: Sequence[str] | None = None) -> None:
        """Remove the run's files: the cache has what is in them. Where that fails, later runs pass over them.

        `read`: what another run has read. Where nothing can be locked the run may have begun since, after a sleep: what
        it has added stays, as it was told that it is durable.
        """
        own = {*(read or ()), f"{self.run_id}/{_OBSERVED}"}
        try:
            if read is not None and self.folder.local is None:
                there = {info.path for info in self.folder.infos(self.run_id)}
                if there - own:
                    for path in sorted(there & own):
                        self.folder.remove(path)
                    return
            self.folder.remove_all(self.run_id)
        except OSError as error:
            _log.warning("the journal of run %s is not removed: %s", self.run_id, self.folder.told(error))

    def _write(self, name: str, rows: pa.Table) -> None:
        path = f"{self.run_id}/{name}.arrow"
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
        try:
            self.folder.write(path, sink.getvalue())
        except (OSError, pa.ArrowException) as error:
            raise self._unkept(path, len(rows), error) from error

    def _unkept(self, path: str, answers: int, error: Exception) -> CacheError:
        return CacheError(
            f"{answers} paid answers could not be kept in the journal {self.folder}/{path}: {self.folder.told(error)}. "
            "No further calls are made; make room or make the folder writable, and run again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "run_id": self.run_id, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, _travelled=True)  # type: ignore[misc]


def take_in(
    cache: FeatureCache,
    *,
    nobody_runs: bool = False,
    observer: Observer | None = None,
    models: Mapping[str, str] | None = None,
    left: Callable[[pa.Table, Mapping[str, Entry]], None] | None = None,
) -> int:
    """Append what journals have and the cache lacks, and remove those of dead runs; how many rows.

    Answers of a run that goes on elsewhere are taken in as well, and stay where they are. `nobody_runs`: the caller is
    going to take entries away, so that LockedError says which run would bring them back. `observer`: is told of runs
    that died before they could tell it; `left`: of the answers of each of them, a builder at a time, and of what the
    cache knew, by entry_id.
    """
    folder = cache.journals if isinstance(cache, JournalingCache) else None
    if folder is None:
        return 0
    taken = 0
    for run_id in _runs_in(folder):
        with _reached(folder), claimed(folder, run_id) as is_dead:
            journal = Journal(folder, run_id)
            ended = is_dead and journal.close()
            if nobody_runs and not is_dead:
                raise LockedError(
                    f"run {run_id} goes on, or was killed a short while ago: {folder} has its journal. Try again when "
                    f"it is done; a run that was killed is over after {SILENCE_S:g} s."
                )
            rows, read, unread = _rows_of(folder, run_id)
            for problem in unread:
                _log.warning("the journal of run %s stays for a later one: %s", run_id, problem)
            for name in rows["builder"].unique().to_pylist():
                own = newest_rows(rows.filter(pc.equal(rows["builder"], name)), "entry_id")
                known = cache.by_id(name, own["entry_id"].to_pylist())
                if left is not None and is_dead:
                    left(own, known)
                # The same request asked again after its ttl is a newer answer under the same id.
                new = [
                    entry_id not in known or known[entry_id].ts < ts.replace(tzinfo=UTC)
                    for entry_id, ts in zip(own["entry_id"].to_pylist(), own["ts"].to_pylist(), strict=True)
                ]
                if any(new):
                    cache.append(own.filter(pa.array(new)).drop(["recorded"]))
                    taken += sum(new)
            if ended and not unread:
                if observer is not None:
                    journal.show(observer, models or {})
                journal.forget(read)
    return taken


def _runs_in(folder: Folder) -> list[str]:
    """Runs that left a journal, or what said that they go on and no journal."""
    from pyarrow import fs

    with _reached(folder):
        found = folder.infos()
    runs = {info.base_name for info in found if info.type is fs.FileType.Directory}
    return sorted(runs | runs_among(found))


@contextmanager
def _reached(folder: Folder) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            f"{folder} cannot be looked through: {folder.told(error)}. It may hold answers that are paid for, so that "
            "nobody is asked; see that the storage can be reached, and run again."
        ) from error


def _rows_of(folder: Folder, run_id: str) -> tuple[pa.Table, list[str], list[str]]:
    """Everything in a run's journal (ENTRY_SCHEMA), the files of answers that it is from, and what could not be read. A
    damaged file is passed over and put aside, with a warning."""
    names = [
        info.path
        for info in folder.infos(run_id)
        if info.extension == "arrow" and not info.base_name.startswith(".")
    ]
    tables, unread = [ENTRY_SCHEMA.empty_table()], []
    for path, data in folder.read_all(names):
        if isinstance(data, FileNotFoundError):  # its run has ended meanwhile
            continue
        if isinstance(data, OSError):
            unread.append(f"{folder}/{path}: {folder.told(data)}")
            continue
        try:
            rows = fitted(pa.ipc.open_file(data).read_all(), _SCHEMA)
        except (OSError, pa.ArrowException) as error:
            aside = f"damaged.{run_id}.{path.rpartition('/')[2]}"
            _log.warning("journal file %s/%s is damaged (%s); put aside as %s", folder, path, error, aside)
            with suppress(OSError):
                folder.storage.move(path, aside)
            continue
        tables.append(rows.append_column("recorded", pa.array([0] * len(rows), pa.int64())))
    answers = [name for name in names if not name.endswith(f"/{_BEGUN}.arrow")]
    return pa.concat_tables(tables), answers, unread
