"""What a cache holds, per builder, what it cost to build, and whether a look-up is quicker than a build.

Reads only; the one clock it takes is for timing look-ups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.rows import (
    ENTRY_COLUMNS,
    TRACE_COLUMNS,
    as_mask,
    cost_of,
    current_marks,
)

__all__ = ["cache_stats"]

_SAMPLE = 1000


def cache_stats(
    cache: DeltaCache, *, timed: bool = True, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Per builder: entries, keys, current, errors, configs, bytes, oldest and newest ts, `cost` (of all ok entries) and
    `saves` (what a run saves that hits every current entry); with `timed` the seconds per key of a look-up, of a
    batch and alone, beside those of a build. And bytes and files of each table.
    """
    entries = files.rows_of(cache, "entries", ENTRY_COLUMNS)
    traces = files.rows_of(cache, "traces", TRACE_COLUMNS)
    marks = current_marks(entries, traces)
    current = pc.is_in(entries["entry_id"], marks["entry_id"].combine_chunks())
    builders = {}
    for name in sorted(entries["builder"].unique().to_pylist()):
        own = pc.equal(entries["builder"], name)
        builders[name] = _builder(entries.filter(own), entries.filter(pc.and_(own, current)))
        if timed:
            builders[name]["time"] = _timed(cache, name, entries.filter(own), clock)
    tables = {name: _table(cache, name) for name in files.TABLES}
    return {"path": cache.path, "builders": builders, "tables": tables}


def _builder(rows: pa.Table, current: pa.Table) -> dict[str, Any]:
    ok = rows.filter(pc.equal(rows["status"], "ok"))
    answers = newest_rows(ok, "entry_id")
    hits = newest_rows(current.filter(pc.equal(current["status"], "ok")), "entry_id")
    return {
        "entries": len(answers),
        "rows": len(rows),
        "keys": pc.count_distinct(rows["key"]).as_py(),
        "current": len(hits),
        "errors": pc.sum(pc.equal(rows["status"], "error")).as_py() or 0,
        "configs": pc.count_distinct(rows["config_hash"]).as_py(),
        "bytes": int(pc.sum(rows["bytes"]).as_py() or 0),
        "oldest": pc.min(rows["ts"]).as_py(),
        "newest": pc.max(rows["ts"]).as_py(),
        "cost": cost_of(answers),
        "saves": cost_of(hits),
    }


def _timed(
    cache: DeltaCache, name: str, rows: pa.Table, clock: Callable[[], float]
) -> Mapping[str, Any] | None:
    """Seconds per key of a look-up and of a build; None where nothing was built."""
    ok = newest_rows(rows.filter(pc.equal(rows["status"], "ok")), ["key", "config_hash"])
    if not len(ok):
        return None
    counted = ok["config_hash"].value_counts().to_pylist()
    config = max(counted, key=lambda found: (found["counts"], found["values"]))["values"]
    sample = ok.filter(pc.equal(ok["config_hash"], config)).slice(0, _SAMPLE)
    wanted = dict(zip(sample["key"].to_pylist(), sample["entry_id"].to_pylist(), strict=True))
    one = dict([next(iter(wanted.items()))])
    seconds = []
    for asked in (wanted, one):
        start = clock()
        cache.find(name, config, asked)
        seconds.append((clock() - start) / len(asked))
    known = as_mask(pc.is_valid(ok["seconds"]))
    build = pc.mean(ok["seconds"].filter(pa.array(known))).as_py() if known.any() else None
    paid = bool(pc.sum(ok["tokens"]).as_py() or pc.sum(ok["usd"]).as_py())
    return {
        "lookup": seconds[0],
        "lookup_alone": seconds[1],
        "lookup_keys": len(wanted),
        "build": build,
        # A batch's look-up against a build's share of its batch: what a run would pay either way. A scanned source
        # has no time of its own.
        "better_inline": not paid and build is not None and 0 < build < seconds[0],
    }


def _table(cache: DeltaCache, name: str) -> dict[str, int]:
    table = cache.table(name)
    found = files.data_files(table) if table is not None else []
    return {
        "files": len(found),
        "rows": sum(file.rows for file in found),
        "bytes": sum(file.size for file in found),
        "version": table.version() if table is not None else 0,
    }
