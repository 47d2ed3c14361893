"""Paid answers made durable while their stage runs: one immutable file per micro-batch, beside the cache.

A task that is tried again finds them before it asks anybody; the next run takes in what a run left that died. Knows
rows and files; what an answer is, and how it was got, it does not.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, FeatureCache, fitted
from featurekit_spark.cache.current import newest_rows, to_entries
from featurekit_spark.cache.staged import filesystem_of
from featurekit_spark.cache.whole import write_whole
from featurekit_spark.errors import CacheError, LockedError
from featurekit_spark.fingerprint import digest
from featurekit_spark.locks import file_lock, local_path

__all__ = ["Journal", "JournalingCache", "MicroBatch", "MicroBatches", "Observer", "take_in"]

_log = logging.getLogger(__name__)
_ABANDONED: Final = 24 * 3600.0  # seconds after which a run whose lock cannot be asked for is taken for dead
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

    folder: str
    run_id: str
    files: tuple[tuple[str, datetime], ...]
    failed: tuple[MicroBatch, ...] = ()

    def __len__(self) -> int:
        return len(self.files) + len(self.failed)

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.failed
        storage = filesystem_of(self.folder)
        for path, written in self.files:
            with suppress(OSError, pa.ArrowException):  # damaged, or gone meanwhile
                with storage.open_input_file(path) as file:
                    rows = pa.ipc.open_file(file).read_all()
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
    def journals(self) -> str | None:
        """The folder of all runs' journals."""


@dataclass
class Journal:
    """One run's answers so far. Travels to workers, which add to it; each reads it once, when it is first asked.

    `folder`: of all journals; `size`: answers per file, as many as calls may be in flight, so that together at most
    twice as many are lost with a process.
    """

    folder: str
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
        with _alive(self.folder, self.run_id):
            yield self
            self.forget()

    @property
    def place(self) -> str:
        """What runs have in common whose journals are in one folder."""
        local = local_path(self.folder)
        return digest("journals", self.folder if local is None else str(local.resolve()))

    def begin(self) -> None:
        """Before the first call: a CacheError where the folder cannot be written to. Its file tells workers that they
        see the driver's storage; one that does not keeps no journal."""
        if not self._begun:
            self._write(_BEGUN, _SCHEMA.empty_table())
            self._begun = True

    def seen(self) -> bool:
        """Whether what the driver began was ever to be seen from this process."""
        self._seen = self._seen or self._is_open()
        return self._seen

    def close(self) -> None:
        """Nothing can be added any more: by workers that outlive their driver, say, once another run takes it in."""
        with suppress(OSError):
            filesystem_of(self.folder).delete_file(f"{self.run_id}/{_BEGUN}.arrow")

    def _is_open(self) -> bool:
        try:
            found = filesystem_of(self.folder).get_file_info(f"{self.run_id}/{_BEGUN}.arrow")
        except (OSError, pa.ArrowException):
            return False
        return bool(found.is_file)

    def find(self, builder: str, wanted: Mapping[str, str]) -> dict[str, Entry]:
        """Answers by key, for key -> entry_id."""
        with self._lock:
            if self._found is None:
                rows = _rows_of(self.folder, self.run_id)
                self._found = {(entry.builder, entry.entry_id): entry for entry in to_entries(rows)}
        found = ((key, self._found.get((builder, identity))) for key, identity in wanted.items())
        return {key: entry for key, entry in found if entry is not None}

    def add(self, entries: pa.Table) -> None:
        """Make new entries (ENTRY_SCHEMA less `recorded`) durable: they are when this returns. CacheError where they
        are not, and where the journal is closed."""
        if not self._travelled:
            self.begin()
        elif not self._is_open():
            raise CacheError(
                f"the journal {self.folder}/{self.run_id} is closed: another run has taken in what was in it, or its "
                "folder is gone. No further calls are made for this run."
            )
        self._write(uuid.uuid4().hex, entries.select(_SCHEMA.names).cast(_SCHEMA))

    def micro_batches(self, failed: tuple[MicroBatch, ...] = ()) -> MicroBatches:
        """What the run has made durable so far."""
        from pyarrow import fs

        found = filesystem_of(self.folder).get_file_info(fs.FileSelector(self.run_id, allow_not_found=True))
        files = [
            (info.path, info.mtime or datetime.now(UTC))
            for info in found
            if info.extension == "arrow" and info.base_name != f"{_BEGUN}.arrow" and info.base_name[0] != "."
        ]
        files.sort(key=lambda file: (file[1], file[0]))
        return MicroBatches(self.folder, self.run_id, tuple(files), failed)

    def show(
        self, observer: Observer, models: Mapping[str, str], failed: tuple[MicroBatch, ...] = ()
    ) -> None:
        """Tell the observer, once for a journal: where the run failed, the next one finds it as it is."""
        storage = filesystem_of(self.folder)
        if storage.get_file_info(f"{self.run_id}/{_OBSERVED}").is_file:
            return
        batches = self.micro_batches(failed)
        if len(batches):
            observer(batches, models)
            with suppress(OSError):  # then it is told twice
                storage.open_output_stream(f"{self.run_id}/{_OBSERVED}").close()

    def forget(self) -> None:
        """Remove the run's files: the cache has what is in them."""
        with suppress(FileNotFoundError):
            filesystem_of(self.folder).delete_dir(self.run_id)

    def _write(self, name: str, rows: pa.Table) -> None:
        path = f"{self.run_id}/{name}.arrow"
        try:
            _write_whole(self.folder, path, rows)
        except (OSError, pa.ArrowException) as error:
            raise CacheError(
                f"{len(rows)} paid answers could not be kept in the journal {self.folder}/{path}: {error}. No further "
                "calls are made; make room or make the folder writable, and run again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "run_id": self.run_id, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, _travelled=True)  # type: ignore[misc]


def take_in(
    cache: FeatureCache,
    *,
    now: datetime,
    nobody_runs: bool = False,
    observer: Observer | None = None,
    models: Mapping[str, str] | None = None,
    left: Callable[[pa.Table, Mapping[str, Entry]], None] | None = None,
) -> int:
    """Append what journals have and the cache lacks, and remove those of dead runs; how many rows.

    Answers of a run that goes on elsewhere are taken in as well, and stay where they are. `nobody_runs`: the caller
    keeps all runs away, so that every journal is a dead run's. `observer`: is told of runs that died before they
    could tell it; `left`: of the answers of each of them, a builder at a time, and of what the cache knew, by entry_id.
    """
    folder = cache.journals if isinstance(cache, JournalingCache) else None
    if folder is None:
        return 0
    taken = 0
    for run_id in _runs_in(folder):
        with _claimed(folder, run_id, now) as is_dead:
            ended = is_dead or nobody_runs
            journal = Journal(folder, run_id)
            if ended:
                journal.close()
            rows = _rows_of(folder, run_id)
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
            if ended:
                if observer is not None:
                    journal.show(observer, models or {})
                journal.forget()
    return taken


def _runs_in(folder: str) -> list[str]:
    """Runs that left a journal, or a lock and no journal."""
    from pyarrow import fs

    found = filesystem_of(folder).get_file_info(fs.FileSelector("", allow_not_found=True))
    runs = {info.base_name for info in found if info.type is fs.FileType.Directory}
    runs |= {info.base_name[1:-5] for info in found if re.fullmatch(r"\..+\.lock", info.base_name)}
    return sorted(runs)


def _write_whole(folder: str, name: str, rows: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    write_whole(folder, name, sink.getvalue())


def _rows_of(folder: str, run_id: str) -> pa.Table:
    """Everything in a run's journal (ENTRY_SCHEMA). A damaged file is passed over and put aside, with a warning."""
    from pyarrow import fs

    storage = filesystem_of(folder)
    tables = [ENTRY_SCHEMA.empty_table()]
    for info in storage.get_file_info(fs.FileSelector(run_id, allow_not_found=True)):
        if info.extension == "arrow" and not info.base_name.startswith("."):
            try:
                with storage.open_input_file(info.path) as file:
                    rows = fitted(pa.ipc.open_file(file).read_all(), _SCHEMA)
            except FileNotFoundError:  # its run has ended meanwhile
                continue
            except (OSError, pa.ArrowException) as error:
                aside = f"damaged.{run_id}.{info.base_name}"
                _log.warning(
                    "journal file %s/%s is damaged (%s); put aside as %s", folder, info.path, error, aside
                )
                with suppress(OSError):
                    storage.move(info.path, aside)
                continue
            tables.append(rows.append_column("recorded", pa.array([0] * len(rows), pa.int64())))
    return pa.concat_tables(tables)


def _lock_of(folder: str, run_id: str) -> Path | None:
    path = local_path(folder)
    return None if path is None else path / f".{run_id}.lock"


@contextmanager
def _alive(folder: str, run_id: str) -> Iterator[None]:
    """Hold what says that the run goes on, where processes can tell each other so."""
    path = _lock_of(folder, run_id)
    if path is None:
        yield
        return
    with file_lock(path, timeout_s=0.0, owner=f"run {run_id}"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _claimed(folder: str, run_id: str, now: datetime) -> Iterator[bool]:
    """Whether nobody writes the run's journal any more, and keep it so: its lock is free, or its newest file is old."""
    path = _lock_of(folder, run_id)
    if path is None:
        yield _is_abandoned(folder, run_id, now)
        return
    try:
        with _alive(folder, run_id):
            yield True
    except LockedError:
        yield False


def _is_abandoned(folder: str, run_id: str, now: datetime) -> bool:
    from pyarrow import fs

    files = filesystem_of(folder).get_file_info(fs.FileSelector(run_id, allow_not_found=True))
    newest = max((info.mtime for info in files if info.mtime is not None), default=None)
    return newest is None or (now - newest.astimezone(UTC)).total_seconds() > _ABANDONED
