"""What a run reads of sources that offer a scan: each once, with a hash that tells whether it is what it was.

Knows neither versions nor keys. Rows are given away to whom they are for, and not held here any longer.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pyarrow as pa

from featurekit_spark.job import Job

__all__ = ["Readings", "content_hash", "scan_of"]

Key = tuple[Any, ...]


class Readings:
    """The scans of one group's sources. `read` makes a table of a scan; `hashes` has those of all that was read."""

    def __init__(
        self, job: Job, fields: tuple[str, ...], group: Key, read: Callable[[Any], pa.Table]
    ) -> None:
        self._job, self._fields, self._group, self._read = job, fields, group, read
        self._tables: dict[str, pa.Table] = {}
        self.hashes: dict[str, str] = {}

    def hash_of(self, source: Any) -> str | None:
        """`content_hash` of what a source has now; None where it offers no scan."""
        if source.name not in self.hashes:
            table = self.take(source)
            if table is not None:
                self._tables[source.name] = table
        return self.hashes.get(source.name)

    def take(self, source: Any) -> pa.Table | None:
        """A source's rows, read unless they are here already; None where it offers no scan."""
        if source.name in self._tables:
            return self._tables.pop(source.name)
        scan = scan_of(source, self._job, self._fields, self._group)
        if scan is None:
            return None
        table = self._read(scan)
        self.hashes[source.name] = content_hash(table)
        return table


def scan_of(source: Any, job: Job, fields: tuple[str, ...], group: Key) -> Any:
    """A source's scan of the group, or None where it offers none."""
    if source.scan is None:
        return None
    bound = job.bindings[source]
    named = dict(zip(fields, group, strict=True))
    return bound.builder.scan(named, bound.config, bound.view(job.context))  # type: ignore[attr-defined]


def content_hash(table: pa.Table) -> str:
    """Hash of a table's schema and rows, in their order. Equal rows may have two hashes (Arrow may hold them in two
    ways); different rows never share one."""
    sink = _Hashing()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return sink.hash.hexdigest()[:32]


class _Hashing:
    """A file that keeps only the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.hash = sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True
