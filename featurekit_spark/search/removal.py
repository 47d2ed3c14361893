"""Matrices that hold somebody: found by their ids, and removed from the store, its history and this host's copies."""

from __future__ import annotations

from collections.abc import Collection

from featurekit_spark.cache.upkeep import forget_log
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import table_lock
from featurekit_spark.search.copies import Copies

__all__ = ["matrices_with", "remove_matrices"]


def matrices_with(path: str, ids: Collection[str]) -> set[str]:
    """Hashes of the matrices in the store at `path` that have one of `ids`."""
    from deltalake import DeltaTable, QueryBuilder

    if not ids or not DeltaTable.is_deltatable(path):
        return set()
    found = QueryBuilder().register("matrices", DeltaTable(path)).execute("SELECT hash, ids FROM matrices")
    wanted = set(ids)
    rows = found.read_all()
    pairs = zip(rows.column("hash").to_pylist(), rows.column("ids").to_pylist(), strict=True)
    return {name for name, members in pairs if not wanted.isdisjoint(members)}


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
