"""A host's copies of matrices: a file each, mapped into memory by all processes of the host.

Owns the file's format, who makes a copy and when it goes. A copy is named by its matrix's content, made under another
name, brought to the disk and then renamed: there is a whole one or none. It must not know where matrices come from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from featurekit_spark.errors import CacheError, ConfigError, ContextError, LockedError
from featurekit_spark.locks import file_lock
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.ids import Ids
from featurekit_spark.search.rounded import Block, RoundedRows, as_rows, value_type

__all__ = ["Content", "Copies", "Copy", "host_folder"]

_END: Final = ".matrix"
_FORMER: Final = (".json", ".f4")  # ids and vectors, before there was one file
_NAME: Final = "[0-9a-f]" * 32
_FORMAT: Final = "featurekit matrix 1"
_PAGE: Final = 4096
_MOST = 32  # copies in a folder
_IDLE_S = 30 * 86_400.0  # a copy that nobody opened for so long goes
_PATIENCE_S = 600.0  # how long one process waits for another that makes the same copy
_DEAD_S = 3600.0  # a file in the making that nobody wrote to for so long has lost its process
_NORMED = 4096  # rows at a time
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, eq=False)
class Copy:
    """A mapped matrix. `norms` float64 [rows]; `ranks` int64 [rows], None where rows are in order of ids."""

    storage: str
    ids: Ids
    values: npt.NDArray[Any]
    factors: Floats | None
    norms: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int64] | None

    @property
    def vectors(self) -> Floats | RoundedRows:
        """What can be searched."""
        return as_rows(self.values, self.factors)


@dataclass(frozen=True)
class Content:
    """What a copy is made of: the blocks of its rows, in order."""

    storage: str
    ids: Ids
    blocks: Iterable[Block]


class Copies:
    """Copies in `folder`, which several hosts may share; None is this user's folder among the host's temporary files.

    When one is made, those go that nobody has open and that are too many: by their last use beyond 32, beyond `max_mb`
    (10^6 bytes) in all, and after 30 days.
    """

    def __init__(self, folder: str | Path | None = None, *, max_mb: int = 20_000) -> None:
        self._folder, self.max_mb = None if folder is None else str(Path(folder).absolute()), max_mb

    @property
    def folder(self) -> Path:
        """Where they lie; made where it is missing. Raises ContextError where that cannot be."""
        if self._folder is None:
            return host_folder()
        folder = Path(self._folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_place(folder, error) from error
        return folder

    def open(self, name: str, rows: int, dim: int) -> Copy | None:
        """The copy of a matrix; None where there is none, or a damaged one."""
        path = self.folder / f"{name}{_END}"
        for _ in range(100):
            try:
                with path.open("rb") as file:
                    if _in_use(file):
                        with suppress(OSError):  # who may not write here does not remove anything either
                            os.utime(path)
                        return _mapped(file, name, rows, dim)
            except FileNotFoundError:
                return None
            except PermissionError as error:
                raise _no_place(path.parent, error) from error
            time.sleep(0.01)  # it is being removed
        return None

    def make(
        self, name: str, rows: int, dim: int, read: Callable[[], Content], check: Callable[[Copy], None]
    ) -> Copy:
        """Write a copy of what `read` returns, unless another process does meanwhile. `check` raises for content that
        is not the matrix's. Raises ContextError where there is no room for it."""
        folder = self.folder
        part = folder / f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part"
        with ExitStack() as held:
            with suppress(
                LockedError, ConfigError
            ):  # without a lock two may write it, and the second replaces it
                held.enter_context(file_lock(folder / f".{name}.lock", timeout_s=_PATIENCE_S))
            found = self.open(name, rows, dim)
            if found is not None:
                return found
            content = read()
            ranks = content.ids.ranks()
            layout = _Layout.of(name, content.storage, dim, content.ids, ranked=ranks is not None)
            try:
                with part.open("wb") as file:
                    _write(file, layout, content.ids, ranks, content.blocks)
                    _sync(file)
                with part.open("rb") as file:
                    _in_use(file)
                    made = _mapped(file, name, rows, dim)
                if made is None:
                    raise CacheError(f"{part} is not what was written to it: is the disk of {folder} sound?")
                check(made)
                part.replace(folder / f"{name}{_END}")
            except OSError as error:
                if error.errno in _NO_PLACE:
                    raise _no_place(folder, error, layout.size) from error
                raise
            finally:
                part.unlink(missing_ok=True)
        self.tidy()
        return made

    def remove(self, name: str) -> None:
        """Remove a matrix's copies, those of earlier versions and half made ones too. A process that has one open keeps
        it until it ends."""
        folder, former = self.folder, _host_path()
        whole = [folder / f"{name}{_END}", *(former / f"{name}{end}" for end in _FORMER)]
        for path in [*whole, *folder.glob(f".{name}.*"), *former.glob(f".{name}.*")]:
            path.unlink(missing_ok=True)

    def tidy(self) -> list[str]:
        """Remove what is too much and not in use; the names of the matrices whose copies went."""
        folder, now, total, gone = self.folder, time.time(), 0, []
        copies = []
        for path in [*folder.glob(f"*{_END}"), *folder.glob(".*.part")]:
            with suppress(OSError):  # somebody else removed it
                told = path.stat()
                if path.suffix != ".part":
                    copies.append((told.st_mtime, told.st_size, path))
                elif now - told.st_mtime > _DEAD_S:
                    path.unlink()
        for path in _of_former_format():
            with suppress(OSError):
                path.unlink()
        for place, (used, size, path) in enumerate(sorted(copies, reverse=True)):
            old = now - used > _IDLE_S
            total += size
            if place and (old or place >= _MOST or total > self.max_mb * 1e6) and _removed(path, old=old):
                total -= size
                gone.append(path.stem)
        return gone


@dataclass(frozen=True)
class _Layout:
    """What a copy's first page tells: whose it is, and where its arrays are (offset, type, shape)."""

    name: str
    storage: str
    size: int
    arrays: dict[str, tuple[int, str, tuple[int, ...]]]

    @classmethod
    def of(cls, name: str, storage: str, dim: int, ids: Ids, *, ranked: bool) -> _Layout:
        rows = len(ids)
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {"values": (value_type(storage), (rows, dim))}
        if storage == "int8":
            wanted["factors"] = ("<f4", (rows,))
        wanted["norms"] = ("<f8", (rows,))
        if ranked:
            wanted["ranks"] = ("<i8", (rows,))
        wanted |= {"ends": ("<i8", (rows + 1,)), "text": ("|u1", (len(ids.text),))}
        arrays, at = {}, _PAGE
        for array, (kind, shape) in wanted.items():
            arrays[array] = at, kind, shape
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
            at += -(-size // _PAGE) * _PAGE
        return cls(name, storage, at, arrays)

    @classmethod
    def read(cls, page: bytes) -> _Layout | None:
        try:
            told = json.loads(page.rstrip(b"\0"))
            if told.pop("format") != _FORMAT:
                return None
            arrays = {
                name: (at, kind, tuple(shape)) for name, (at, kind, shape) in told.pop("arrays").items()
            }
            return cls(arrays=arrays, **told)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def page(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}).encode().ljust(_PAGE, b"\0")


def _write(
    file: BinaryIO, layout: _Layout, ids: Ids, ranks: npt.NDArray[np.int64] | None, blocks: Iterable[Block]
) -> None:
    """From begin to end: shared folders often allow nothing else."""
    file.write(layout.page())
    factors, norms = [np.empty(0, "<f4")], [np.empty(0, "<f8")]
    for values, own in blocks:
        file.write(values.reshape(-1).view(np.uint8).data)
        rows = as_rows(values, own)
        norms += [_norms(rows[start : start + _NORMED]) for start in range(0, len(values), _NORMED)]
        if own is not None:
            factors.append(own)
    found = {
        "factors": np.concatenate(factors),
        "norms": np.concatenate(norms),
        "ranks": ranks,
        "ends": ids.ends,
        "text": ids.text,
    }
    for name, (at, kind, _) in layout.arrays.items():
        if name != "values":
            file.write(b"\0" * (at - file.tell()))
            file.write(np.ascontiguousarray(found[name], dtype=kind).view(np.uint8).data)
    file.write(b"\0" * (layout.size - file.tell()))


def _norms(rows: Floats) -> npt.NDArray[np.float64]:
    lengths: npt.NDArray[np.float64] = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    return lengths


def _mapped(file: BinaryIO, name: str, rows: int, dim: int) -> Copy | None:
    """None where the file is not a whole copy of that matrix. It may be closed: a mapping has a handle of its own,
    and with it the lock, until the last array over it is gone."""
    size = os.fstat(file.fileno()).st_size
    layout = _Layout.read(file.read(_PAGE)) if size >= _PAGE else None
    if layout is None or (layout.size, layout.name, layout.arrays["values"][2]) != (size, name, (rows, dim)):
        return None
    data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    found: dict[str, npt.NDArray[Any]] = {
        array: np.ndarray(shape, kind, buffer=data, offset=at)
        for array, (at, kind, shape) in layout.arrays.items()
    }
    return Copy(
        layout.storage,
        Ids(found["ends"], found["text"]),
        found["values"],
        found.get("factors"),
        found["norms"],
        found.get("ranks"),
    )


def _in_use(file: BinaryIO) -> bool:
    """Lock a copy as one that is in use; whether it is still there. Where there are no locks, age alone decides."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(file.fileno()).st_nlink > 0


def _removed(path: Path, *, old: bool) -> bool:
    """Remove a copy that no process has open; whether it went."""
    try:
        with path.open("r+b") as file:  # network file systems lock nothing that is only read
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                if not old:
                    return False
            path.unlink()
        path.with_name(f".{path.stem}.lock").unlink(missing_ok=True)
    except OSError:  # somebody else removed it, or it is not ours
        return False
    return True


def _sync(file: BinaryIO) -> None:
    """Onto the disk before it gets its name: a power cut leaves no torn copy behind."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # not every file system can
            raise


def _of_former_format() -> list[Path]:
    """Copies that earlier versions made, two files each, and made in no other folder; nobody opens them any more."""
    folder = _host_path()
    return [
        path for end in _FORMER for path in (*folder.glob(f"{_NAME}{end}"), *folder.glob(f".{_NAME}{end}.*"))
    ]


def _host_path() -> Path:
    return Path(tempfile.gettempdir()) / f"featurekit-{os.getuid()}"


def host_folder() -> Path:
    """This user's folder for copies; nobody else may write there, as what is in it is trusted by name."""
    folder = _host_path()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _no_place(folder, error) from error
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise CacheError(
            f"{folder} belongs to somebody else or others may write to it; remove it or set TMPDIR"
        )
    return folder


def _no_place(folder: Path, error: OSError, needed: int = 0) -> ContextError:
    size = f" of {needed / 1e6:,.0f} MB" if needed else ""
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(folder).free / 1e6:,.0f} MB free"
    return ContextError(
        f"a copy{size} of a matrix has no place in {str(folder)!r} ({error.strerror}{free}). Make room or let it be "
        "written to, or name another folder in search.copies (TMPDIR moves the default one)."
    )
