"""Answers of runs that go on elsewhere, as they become durable: in their journals, then in the cache.

Reads only. Each file of a journal is looked into once; what is wanted is read again when it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, FeatureCache, fitted
from featurekit_spark.cache.current import to_entries
from featurekit_spark.cache.folder import Folder

__all__ = ["Elsewhere"]


@dataclass
class Elsewhere:
    """`folder`: of all runs' journals; `cache`: where they end up. Travels to workers."""

    folder: Folder
    cache: FeatureCache
    _seen: set[str] = field(default_factory=set, repr=False)
    _files: dict[str, str] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def find(
        self, builder: str, journaled: Collection[str], stored: Collection[str] = ()
    ) -> dict[str, Entry]:
        """Answers by entry_id: those `journaled` are looked for in journals, those `stored` in the cache as well."""
        with self._lock:
            self._look()
            files = {self._files[entry_id] for entry_id in (*journaled, *stored) if entry_id in self._files}
        found: dict[str, Entry] = {}
        wanted = {*journaled, *stored}
        for _, data in self.folder.read_all(sorted(files)):
            rows = _rows(data)
            own = rows.filter(pc.is_in(rows["entry_id"], pa.array(sorted(wanted), pa.string())))
            found |= {entry.entry_id: entry for entry in to_entries(own) if entry.builder == builder}
        left = [entry_id for entry_id in stored if entry_id not in found]
        return {**found, **(self.cache.by_id(builder, left) if left else {})}

    def goes_on(self, run_id: str) -> bool:
        """Whether a run has a journal still: what it found out may not be in the cache yet."""
        try:
            return bool(self.folder.infos(run_id))
        except OSError:
            return False

    def _look(self) -> None:
        new = [
            info.path
            for info in self.folder.infos(recursive=True)
            if info.path not in self._seen
            and info.extension == "arrow"
            and not info.base_name.startswith(".")
        ]
        for path, data in self.folder.read_all(new):
            if isinstance(data, OSError) and not isinstance(data, FileNotFoundError):
                continue  # the next look may reach it
            self._seen.add(path)
            for entry_id in _rows(data)["entry_id"].to_pylist():
                self._files[entry_id] = path

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _rows(data: Any) -> pa.Table:
    """A file's answers; none where it is damaged, or its run has ended meanwhile."""
    if isinstance(data, OSError):
        return ENTRY_SCHEMA.empty_table()
    try:
        rows = pa.ipc.open_file(data).read_all()
    except (OSError, pa.ArrowException):
        return ENTRY_SCHEMA.empty_table()
    rows = rows.append_column("recorded", pa.array([0] * len(rows), pa.int64()))
    return fitted(rows, ENTRY_SCHEMA)
