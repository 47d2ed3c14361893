"""Which row is the newest, as vectorised Arrow steps shared by the caches. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import Entry, Found
from featurekit_spark.values import NULL_HASH

__all__ = [
    "candidates_in",
    "current_ids",
    "current_in",
    "found_in",
    "listed",
    "moved_since",
    "newest_in",
    "newest_rows",
    "superseded",
    "to_entries",
]


def newest_rows(rows: pa.Table, by: str | list[str] = "key") -> pa.Table:
    """The row with the highest `recorded` of each group of `by`; of equals, the last."""
    columns = [by] if isinstance(by, str) else by
    if len(rows) < 2 or (
        len(columns) == 1 and pc.count_distinct(rows[columns[0]], "all").as_py() == len(rows)
    ):
        return rows
    # Values are long: only what decides is sorted.
    narrow = rows.select(list(dict.fromkeys([*columns, "recorded"])))
    order = narrow.append_column("__row", pa.array(np.arange(len(rows)))).sort_by(
        [("recorded", "ascending"), ("__row", "ascending")]
    )
    picked = order.group_by(columns, use_threads=False).aggregate([("__row", "last")])["__row_last"]
    return rows.take(picked)


def current_ids(entries: pa.Table, pointers: pa.Table) -> dict[str, tuple[str | None, str | None]]:
    """key -> (entry_id, reads) of the newest among ok entries and pointer rows of one builder and config.

    entry_id is None where the key's value became null without a build.
    """
    newest: dict[str, tuple[int, str | None, str | None]] = {}
    columns = entries.select(["key", "entry_id", "recorded", "status"])
    ok = _ok(columns)
    for key, entry, recorded in zip(
        ok["key"].to_pylist(), ok["entry_id"].to_pylist(), ok["recorded"].to_pylist(), strict=True
    ):
        if key not in newest or newest[key][0] <= recorded:
            newest[key] = (recorded, entry, None)
    for row in pointers.select(["key", "entry_id", "recorded", "reads"]).to_pylist():
        key = row["key"]
        if key not in newest or newest[key][0] <= row["recorded"]:
            newest[key] = (row["recorded"], row["entry_id"], row["reads"])
    return {key: (entry, reads) for key, (_, entry, reads) in newest.items()}


def moved_since(
    rows: pa.Table, recorded: int, by: Sequence[str] = ("key",), *, emptied: bool = False
) -> pa.Table:
    """Rows that were the newest of their group of `by` when this was recorded, where a newer one names another entry or
    proves something else. `emptied`: also rows without an entry, where there was none at all then and is one now."""
    columns = list(by)
    is_later = pc.greater(rows["recorded"], recorded)
    later, before = newest_rows(rows.filter(is_later), columns), rows.filter(pc.invert(is_later))
    before = newest_rows(before.filter(pc.is_in(before["key"], later["key"].combine_chunks())), columns)
    what = [
        name for name in rows.column_names if name in ("entry_id", "keyed_trace", "group_trace", "plan_hash")
    ]
    now = dict(zip(_tuples(later, columns), _tuples(later, what), strict=True))
    then = list(_tuples(before, columns))
    differs = [
        place in now and now[place] != known for place, known in zip(then, _tuples(before, what), strict=True)
    ]
    moved = before.filter(pa.array(differs, pa.bool_()))
    if not emptied:
        return moved
    known = set(then)
    new = pa.array([place not in known for place in _tuples(later, columns)], pa.bool_())
    gone = later.filter(pc.and_(new, pc.is_valid(later["entry_id"])))
    for name, nothing in (("entry_id", None), ("value_hash", NULL_HASH)):
        if name in gone.column_names:
            place = gone.column_names.index(name)
            gone = gone.set_column(place, name, pa.array([nothing] * len(gone), pa.string()))
    return pa.concat_tables([moved, gone])


def superseded(traces: pa.Table, newer: pa.Table) -> pa.Table:
    """Trace rows, with the status `superseded` where `newer` made another entry the current one of a target's key.

    `newer`: ok entries and pointers of the same builder; those older than a row do not count.
    """
    columns = ["key", "config_hash", "entry_id", "recorded"]
    near = np.flatnonzero(pc.is_in(traces["key"], newer["key"].combine_chunks()).to_numpy())
    if not len(near):
        return traces
    latest = {(row[0], row[1]): row[2:] for row in _tuples(newest_rows(newer, columns[:2]), columns)}
    status = traces["status"].to_pylist()
    for at, kind, (key, config, entry, recorded) in zip(
        near, traces["kind"].take(near).to_pylist(), _tuples(traces.take(near), columns), strict=True
    ):
        now, stamp = latest.get((key, config), (entry, 0))
        if kind == "target" and status[at] == "ok" and stamp > recorded and now != entry:
            status[at] = "superseded"
    place = traces.column_names.index("status")
    return traces.set_column(place, traces.schema.field(place), pa.array(status, pa.string()))


def _tuples(rows: pa.Table, columns: list[str]) -> Iterable[tuple[Any, ...]]:
    return zip(*(rows[name].to_pylist() for name in columns), strict=True)


def to_entries(rows: pa.Table) -> list[Entry]:
    """ENTRY_SCHEMA rows as objects."""
    columns = [listed(rows[name]) for name in Entry.__slots__]
    return [Entry(*values) for values in zip(*columns, strict=True)] if len(rows) else []


def listed(column: pa.ChunkedArray) -> Iterable[Any]:
    """A column's values; what repeats (no value at all, a run's one clock) is made once. Instants are in UTC."""
    if column.null_count == len(column):
        return itertools.repeat(None, len(column))
    if not pa.types.is_timestamp(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    coded = column.combine_chunks().dictionary_encode()
    # pyarrow's own zone object prints otherwise
    known = [None if ts is None else ts.astimezone(UTC) for ts in coded.dictionary.to_pylist()]
    return [None if i is None else known[i] for i in coded.indices.to_pylist()]


def _ok(rows: pa.Table) -> pa.Table:
    """The rows that are no errors; the same table where all are, as values are long."""
    mask = pc.equal(rows["status"], "ok")
    return rows if pc.all(mask).as_py() is not False else rows.filter(mask)


def found_in(entries: pa.Table, pointers: pa.Table, wanted: Mapping[str, str]) -> dict[str, Found]:
    """Look-up among one builder's and config's rows: the ok entry of each key -> entry_id, its newest row."""
    if not len(entries):
        return {}
    current, ids = current_ids(entries, pointers), set(wanted.values())
    ok = entries.filter(
        pc.and_(
            pc.equal(entries["status"], "ok"),
            pc.is_in(entries["entry_id"], pa.array(sorted(ids), pa.string())),
        )
    )
    found: dict[str, Found] = {}
    for entry in to_entries(newest_rows(ok, "entry_id")):
        now, reads = current.get(entry.key, (None, None))
        if entry.entry_id == wanted.get(entry.key):
            found[entry.key] = Found(entry, entry.entry_id == now, reads if entry.entry_id == now else None)
    return found


def current_in(entries: pa.Table, pointers: pa.Table, keys: Sequence[str]) -> dict[str, Found]:
    """The current entry of each of `keys`, among one builder's and config's rows."""
    asked = set(keys)
    current = current_ids(entries, pointers).items()
    now = {key: entry for key, (entry, _) in current if key in asked and entry is not None}
    return found_in(entries, pointers, now)


def candidates_in(entries: pa.Table, pointers: pa.Table, keys: Sequence[str]) -> list[Found]:
    """All ok entries of `keys` among one builder's and config's rows, one per entry_id."""
    if not len(entries):
        return []
    current = current_ids(entries, pointers)
    mask = pc.is_in(entries["key"], pa.array(keys, pa.string()))
    asked = entries if pc.all(mask).as_py() else entries.filter(mask)
    found = []
    for entry in to_entries(newest_rows(_ok(asked), "entry_id")):
        now, reads = current[entry.key]
        found.append(Found(entry, entry.entry_id == now, reads if entry.entry_id == now else None))
    return found


def newest_in(entries: pa.Table, pointers: pa.Table) -> pa.Table:
    """The current entry of every key among one builder's rows; of several configs the newest (ENTRY_SCHEMA)."""
    ok = entries.filter(pc.equal(entries["status"], "ok"))
    marks = [rows.select(["key", "entry_id", "recorded"]) for rows in (ok, pointers)]
    newest = newest_rows(pa.concat_tables(marks))
    kept = ok.filter(pc.is_in(ok["entry_id"], newest["entry_id"].combine_chunks()))
    return newest_rows(kept, ["key", "entry_id"])
