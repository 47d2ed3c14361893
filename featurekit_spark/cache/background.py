"""Appends in the background: a run goes on while its last stage's rows are written.

Order is kept, one append at a time. A read of a builder waits for the appends that hold it; `wait` for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import ENTRY_SCHEMA, Entry, FeatureCache, Found, RunRecord, TraceRow
from featurekit_spark.cache.staged import StagedFile, Staging, StagingCache

__all__ = ["BackgroundAppends"]


class BackgroundAppends:
    """A FeatureCache over another one, for the length of one run. An append that failed is raised by the next call
    that waits for it; nothing after it is written."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="featurekit-append")
        self._pending: list[tuple[frozenset[str], Future[None]]] = []
        self._failed: BaseException | None = None

    def append(self, entries: pa.Table | None = None, traces: Sequence[TraceRow] | pa.Table = ()) -> None:
        self._raise()
        tables = [table for table in (entries, traces) if isinstance(table, pa.Table)]
        names = {name for table in tables for name in table["builder"].unique().to_pylist()}
        if not isinstance(traces, pa.Table):
            names |= {row.builder for row in traces}
        self._pending.append(
            (frozenset(names), self._writer.submit(self._guarded, self.cache.append, entries, traces))
        )

    def staging(self, run_id: str) -> Staging | None:
        """The cache's, where its workers can write."""
        self._raise()
        return self.cache.staging(run_id) if isinstance(self.cache, StagingCache) else None

    def append_staged(self, files: Sequence[StagedFile]) -> None:
        self._raise()
        assert isinstance(self.cache, StagingCache)  # `staging` gave something
        names = frozenset(file.builder for file in files)
        self._pending.append((names, self._writer.submit(self._guarded, self.cache.append_staged, files)))

    def wait(self, builder: str | None = None) -> None:
        """Return once the appends that hold `builder` (None: any) are durable."""
        while any(builder is None or builder in names for names, _ in self._pending):
            _, done = self._pending.pop(0)
            done.result()
        self._raise()

    def close(self) -> None:
        """Wait for everything, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def find(self, builder: str, config_hash: str, wanted: Mapping[str, str]) -> dict[str, Found]:
        self.wait(builder)
        return self.cache.find(builder, config_hash, wanted)

    def current(self, builder: str, config_hash: str, keys: Sequence[str]) -> dict[str, Found]:
        self.wait(builder)
        return self.cache.current(builder, config_hash, keys)

    def candidates(self, builder: str, config_hash: str, keys: Sequence[str]) -> list[Found]:
        self.wait(builder)
        return self.cache.candidates(builder, config_hash, keys)

    def has(self, builder: str) -> bool:
        self.wait(builder)
        return self.cache.has(builder)

    def by_id(self, builder: str, entry_ids: Iterable[str]) -> dict[str, Entry]:
        self.wait(builder)
        return self.cache.by_id(builder, entry_ids)

    def ids(self, builder: str) -> pa.Array:
        self.wait(builder)
        return self.cache.ids(builder)

    def traces(self, builder: str, group: str) -> pa.Table:
        self.wait(builder)
        return self.cache.traces(builder, group)

    def history(self, builder: str, columns: Sequence[str] = ENTRY_SCHEMA.names) -> pa.Table:
        self.wait(builder)
        return self.cache.history(builder, columns)

    def newest(self, builder: str) -> pa.Table:
        self.wait(builder)
        return self.cache.newest(builder)

    def read(self, builder: type[FeatureBuilder[Any]]) -> pa.Table:
        self.wait(builder.name)
        return self.cache.read(builder)

    def mark(self, name: str) -> Mapping[str, Any] | None:
        return self.cache.mark(name)

    def drop_marks(self) -> None:
        self.wait()
        self.cache.drop_marks()

    def put_mark(self, name: str, mark: Mapping[str, Any] | None) -> None:
        self.wait()
        self.cache.put_mark(name, mark)

    def record_run(self, record: RunRecord) -> None:
        self.wait()
        self.cache.record_run(record)

    def last_run(self, group: str) -> RunRecord | None:
        self.wait()
        return self.cache.last_run(group)

    def runs(self, group: str) -> list[RunRecord]:
        self.wait()
        return self.cache.runs(group)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker reads the cache itself; what it makes comes back to the driver and is appended here.
        self.wait()
        return _itself, (self.cache,)

    def _guarded(self, append: Callable[..., None], *rows: Any) -> None:
        if self._failed is not None:
            return
        try:
            append(*rows)
        except BaseException as error:
            self._failed = error
            raise

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed


def _itself(cache: FeatureCache) -> FeatureCache:
    return cache
