"""Matrices that hold somebody: found by their ids, and removed from the store, its history and this host's copies."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from featurekit_spark.cache.upkeep import forget_log
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import table_lock
from featurekit_spark.search.copies import Copies

__all__ = ["matrices_with", "remove_matrices"]


def matrices_with(path: str, ids: Collection[str]) -> set[str]:
    """Hashes of the matrices in the store at `path` that have one of `ids`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from deltalake import DeltaTable, QueryBuilder

    if not ids or not DeltaTable.is_deltatable(path):
        return set()
    query = QueryBuilder().register("matrices", DeltaTable(path))
    answer: Any = query.execute("SELECT hash, ids FROM matrices")
    batches = pa.RecordBatchReader.from_stream(answer) if hasattr(answer, "__arrow_c_stream__") else answer
    wanted, found = pa.array(sorted(ids), pa.large_string()), set()
    for batch in batches:  # some blocks at a time, and no text object for each id
        names, members = batch.column(0).cast(pa.large_string()), batch.column(1)
        here = pc.is_in(members.flatten().cast(pa.large_string()), value_set=wanted)
        found.update(names.take(pc.list_parent_indices(members).filter(here)).to_pylist())
    return found


def remove_matrices(path: str, hashes: Collection[str], *, copies: Copies | None = None) -> int:
    """Take matrices out of the store for good, and this host's copies of them; how many. Nobody may be reading it."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    if not hashes:
        return 0
    copies = copies or Copies()
    try:
        # First, so that a purge that fails here finds them again: what is not in the table is looked for nowhere.
        for name in hashes:
            copies.remove(name)
        with table_lock(path, owner="cache purge"):
            table = DeltaTable(path)
            for name in sorted(hashes):
                table.delete(f"hash = '{name}'")
            table.vacuum(0, dry_run=False, enforce_retention_duration=False)
        forget_log(path)
        for name in hashes:  # that somebody made meanwhile
            copies.remove(name)
    except (DeltaError, OSError) as error:
        raise CacheError(
            f"matrices could not be removed from {path}: {error}; run the purge again"
        ) from error
    return len(hashes)
