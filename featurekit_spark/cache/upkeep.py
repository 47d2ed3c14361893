"""Upkeep of a cache's tables: merged files, deleted files, forgotten history. Takes no rows out."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.files import data_files
from featurekit_spark.cache.storage import resolved
from featurekit_spark.errors import CacheError
from featurekit_spark.locks import table_lock

__all__ = ["SAFE_HOURS", "compact", "forget_log", "unused_files", "vacuum"]

SAFE_HOURS = 168  # Delta's own: no reader holds a snapshot for a week
_STAGED_HOURS = 24  # no run takes longer than this from writing a file to committing it


def compact(cache: DeltaCache, name: str, *, z_order: bool = False) -> dict[str, Any]:
    """Merge a table's small files; with `z_order` sort by key. How many files there were and are, and their bytes."""
    from deltalake import WriterProperties
    from deltalake.exceptions import DeltaError

    table = cache.table(name)
    if table is None:
        return {"files_before": 0, "files": 0, "bytes_before": 0, "bytes": 0, "skipped": []}
    before = data_files(table)
    skipped = sorted({file.builder for file in before if not file.replaceable})
    only: list[tuple[str, str, Any]] | None = [("builder", "not in", skipped)] if skipped else None
    properties = WriterProperties(compression="ZSTD", compression_level=1)
    try:
        with table_lock(cache.table_path(name), owner="cache optimize"):
            table.update_incremental()
            if z_order and name != "runs":
                table.optimize.z_order(["key"], only, writer_properties=properties)
            else:
                table.optimize.compact(only, writer_properties=properties)
    except (DeltaError, OSError) as error:
        raise CacheError(
            f"{cache.table_path(name)} could not be compacted: {error}. The table is as it was; "
            "`featurekit cache verify` lists damaged files."
        ) from error
    table.update_incremental()
    after = data_files(table)
    return {
        "files_before": len(before),
        "files": len(after),
        "bytes_before": sum(file.size for file in before),
        "bytes": sum(file.size for file in after),
        "skipped": skipped,
    }


def unused_files(cache: DeltaCache, name: str, *, now: datetime, remove: bool) -> list[str]:
    """Files older than a day that no version of the table names (written by workers and never committed), and old
    marks of theirs; removed where `remove`."""
    table = cache.table(name)
    if table is None:
        return []
    from pyarrow import fs

    # What only the full listing has is in no commit at all; the other one has what commits took out.
    found = [
        set(table.vacuum(_STAGED_HOURS, dry_run=True, enforce_retention_duration=False, full=full))
        for full in (True, False)
    ]
    unused = sorted(found[0] - found[1])
    storage = cache.storage(name)
    for mark in storage.get_file_info(fs.FileSelector("_featurekit", allow_not_found=True)):
        if mark.mtime is not None and (now - mark.mtime).total_seconds() > _STAGED_HOURS * 3600:
            unused.append(mark.path)
    if remove:
        for path in unused:
            storage.delete_file(path)
    return unused


def vacuum(cache: DeltaCache, name: str, *, hours: int = SAFE_HOURS, unreferenced: bool = True) -> int:
    """Delete files that left the table more than `hours` ago, and with `unreferenced` those of that age that were never
    in it; how many. Readers and writers that go on need a day or more."""
    table = cache.table(name)
    if table is None:
        return 0
    from deltalake.exceptions import DeltaError

    try:
        with table_lock(cache.table_path(name), owner="vacuum"):
            table.update_incremental()
            return len(
                table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=unreferenced)
            )
    except (DeltaError, OSError) as error:
        raise CacheError(f"{cache.table_path(name)} could not be vacuumed: {error}") from error


def forget_log(cache_path: str, storage_options: dict[str, str] | None = None) -> None:
    """Drop a table's history: its log has bounds of keys of files that are gone. Nobody may be reading it."""
    from deltalake import DeltaTable

    key, none = "delta.logRetentionDuration", "interval 0 days"
    storage_options = resolved(storage_options or {})
    with table_lock(cache_path, owner="cache purge"):
        table = DeltaTable(cache_path, storage_options=storage_options or None)
        before = table.metadata().configuration.get(key, "interval 30 days")
        table.alter.set_table_properties({key: none})
        table = DeltaTable(cache_path, storage_options=storage_options or None)
        table.create_checkpoint()
        table.cleanup_metadata()
        table.alter.set_table_properties({key: before})
