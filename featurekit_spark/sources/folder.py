"""Finds `{merchant}_{market}.csv` or `.parquet` in a folder, as one file or a folder of part files.

Owns names, the snapshot version and messages about missing files; never opens a file. Knows nothing of
what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeAlias

from featurekit_spark.errors import ConfigError, UsageError

__all__ = ["FileFormat", "PartFiles", "find_parts"]

FileFormat: TypeAlias = Literal["csv", "parquet"]
_FORMATS: tuple[FileFormat, ...] = ("csv", "parquet")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class PartFiles:
    """The files of one merchant and market, by name; `root` is the file or folder that was found."""

    root: Path
    format: FileFormat
    files: tuple[Path, ...]
    bytes: int
    version: str


def find_parts(folder: str, *, merchant: str, market: str, what: str) -> PartFiles:
    """The files of `merchant` and `market` in `folder`, a mounted path (a leading `file:` is dropped).

    `what` names the configuration section. ConfigError if there are none, or more than one format.
    """
    for field, name in (("merchant", merchant), ("market", market)):
        if not _NAME.fullmatch(name):
            raise UsageError(f"{field} {name!r}: 1 to 64 of A-Z a-z 0-9 _ . - and no dot at the start.")
    base = _local(folder, what)
    if not base.is_dir():
        raise ConfigError(f"{what}.path {folder!r}: there is no such folder.")
    stem = f"{merchant}_{market}"
    found = [
        (base / f"{stem}.{ending}", ending) for ending in _FORMATS if (base / f"{stem}.{ending}").exists()
    ]
    if not found:
        raise ConfigError(
            f"{what}: no {stem}.csv or {stem}.parquet in {base}. {_others(base, stem)} Check merchant and market, "
            f"or {what}.path."
        )
    if len(found) > 1:
        names = " and ".join(repr(path.name) for path, _ in found)
        raise ConfigError(f"{what}: both {names} are in {base}; keep the one to be read.")
    root, ending = found[0]
    files = tuple(sorted(_parts(root, ending))) if root.is_dir() else (root,)
    if not files:
        raise ConfigError(f"{what}: the folder {root} holds no *.{ending} files.")
    # ctime as well, because mtime can be set back by the tool that copies a changed file in place.
    stats = [(path, path.stat()) for path in files]
    manifest = [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return PartFiles(root, ending, files, sum(stat.st_size for _, stat in stats), f"files:{digest[:32]}")


def _local(folder: str, what: str) -> Path:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", folder)
    if scheme and scheme[1] != "file":
        raise ConfigError(
            f"{what}.path {folder!r}: a folder of files must be a mounted path; "
            f"for {scheme[1]}: use a mount, or a Delta table with {what}.kind=delta."
        )
    path = re.sub(r"^file:(//)?(?=/)", "", folder)
    return Path(path).expanduser().resolve()


def _parts(root: Path, ending: FileFormat) -> Iterator[Path]:
    for path in root.iterdir():
        # Spark and others leave _SUCCESS, .crc and half-written files under such names.
        if path.suffix == f".{ending}" and not path.name.startswith(("_", ".")) and path.is_file():
            yield path


def _others(base: Path, stem: str) -> str:
    names = sorted({path.stem for path in base.iterdir() if path.suffix[1:] in _FORMATS})
    if not names:
        return "There are no catalogs in that folder."
    near = get_close_matches(stem, names, n=5) or names[:5]
    if len(names) == len(near):
        return f"It has {', '.join(near)}."
    return f"It has {len(names)} others, such as: {', '.join(near)}."
