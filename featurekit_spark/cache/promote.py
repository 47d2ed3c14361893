"""Taking what one cache has over into the cache below it, so that this one alone answers what an overlay of both did.

Adds rows and changes none, in one append; done again it finds nothing to do. Knows layers, not where they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.base import ENTRY_SCHEMA, TRACE_SCHEMA
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.overlay import Layer, pointing
from featurekit_spark.errors import UsageError, known_names

__all__ = ["Promoted", "promote"]

_PLACE = ["config_hash", "key"]
_SHORT = [*_PLACE, "entry_id", "status", "ts", "run_id", "value_hash", "recorded"]
_SAID = ["ts", "run_id", "value_hash"]
_POINTS = [*_PLACE, "entry_id", "reads", "recorded", *_SAID]


@dataclass(frozen=True)
class Promoted:
    """How many rows of one builder went (or would go) down."""

    entries: int = 0
    pointers: int = 0
    traces: int = 0


def promote(
    own: Layer,
    base: Layer,
    *,
    builders: Sequence[str] = (),
    run_id: str | None = None,
    traces: bool = False,
    dry_run: bool = False,
) -> dict[str, Promoted]:
    """What `own` has and `base` lacks, by builder; appended to `base` unless it is a `dry_run`.

    `builders`: only these; `run_id`: only rows of this run; `traces`: also what targets were found valid with. Errors
    stay where they are. Raises UsageError for a builder of which `own` has nothing.
    """
    known = own.builders()
    for name in builders:
        if name not in known:
            raise UsageError(f"builder {name!r} has nothing to promote. {known_names(name, known)}")
    told: dict[str, Promoted] = {}
    all_entries, all_traces = [ENTRY_SCHEMA.empty_table()], [TRACE_SCHEMA.empty_table()]
    for name in builders or known:
        entries, targets, pointers = _lacking(name, own, base, run_id, traces)
        told[name] = Promoted(len(entries), len(pointers), len(targets))
        all_entries.append(entries)
        # Behind the targets: of rows of one append the last is the newest.
        all_traces += [targets, pointers]
    if not dry_run and any(found != Promoted() for found in told.values()):
        if isinstance(own, DeltaCache) and isinstance(base, DeltaCache):
            base.mark_hashed(own.hashed_builders() & told.keys())
        base.append(pa.concat_tables(all_entries), pa.concat_tables(all_traces))
        base.drop_marks()
    return told


def _lacking(
    builder: str, own: Layer, base: Layer, run_id: str | None, with_traces: bool
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(entries, targets, pointers) of `own` that `base` lacks, oldest first."""
    # Not the values of `base`, which may be many.
    mine, below = _ok(own.history(builder)), _ok(base.history(builder, _SHORT))
    marks, known = own.trace_rows(builder), base.trace_rows(builder)
    if run_id is not None:
        mine, marks = (rows.filter(pc.equal(rows["run_id"], run_id)) for rows in (mine, marks))
    entries = _unknown(newest_rows(mine, "entry_id"), below)
    targets = _newer(marks, known) if with_traces else TRACE_SCHEMA.empty_table()

    # What `base` would call current after these, and what an overlay does: where they differ, a pointer.
    there = pa.chunked_array([*below["entry_id"].chunks, *entries["entry_id"].chunks], pa.string())
    was = [_points(below), _points(pointing(known))]
    after = newest_rows(_in_order([*was, _points(entries), _points(pointing(targets))]), _PLACE)
    shown = newest_rows(pa.concat_tables([*was, _points(mine), _points(pointing(marks))]), _PLACE)
    same = [*_PLACE, "entry_id", "reads"]
    held = {tuple(row.values()) for row in after.select(same).to_pylist()}
    differ = [tuple(row.values()) not in held for row in shown.select(same).to_pylist()]
    shown = shown.filter(pa.array(differ, pa.bool_()))
    shown = shown.filter(pc.or_(pc.is_null(shown["entry_id"]), pc.is_in(shown["entry_id"], there)))
    return entries, targets, _pointer_rows(builder, shown, pa.concat_tables([below, mine.select(_SHORT)]))


def _ok(entries: pa.Table) -> pa.Table:
    return entries.filter(pc.equal(entries["status"], "ok"))


def _unknown(entries: pa.Table, below: pa.Table) -> pa.Table:
    """Entries whose identity `below` lacks, or has from an earlier time: what was computed again after its ttl."""
    latest = below.group_by("entry_id").aggregate([("ts", "max")]).rename_columns(["entry_id", "known"])
    found = pc.index_in(entries["entry_id"], latest["entry_id"].combine_chunks())
    known = latest["known"].take(found)
    new = pc.fill_null(pc.greater(entries["ts"], known), True)
    return entries.filter(new).sort_by("recorded")


def _newer(marks: pa.Table, known: pa.Table) -> pa.Table:
    """Target and group rows newer than those of `base` for the same key."""
    place = ["kind", "group", "key"]
    rows = [table.filter(pc.not_equal(table["kind"], "pointer")) for table in (known, marks)]
    whose = [
        pa.array([side] * len(table), pa.bool_()) for side, table in zip((False, True), rows, strict=True)
    ]
    both = pa.concat_tables([t.append_column("own", own) for t, own in zip(rows, whose, strict=True)])
    newest = newest_rows(both, place)
    return newest.filter(newest["own"]).drop_columns("own").sort_by("recorded")


def _points(rows: pa.Table) -> pa.Table:
    """What makes an entry current, of entries or of trace rows."""
    if "reads" not in rows.column_names:
        rows = rows.append_column("reads", pa.nulls(len(rows), pa.string()))
    return rows.select(_POINTS)


def _in_order(parts: Sequence[pa.Table]) -> pa.Table:
    """The last two parts are newer than all before them, and the last is the newest."""
    place = _POINTS.index("recorded")
    stamps = [None] * (len(parts) - 2) + [2**63 - 2, 2**63 - 1]
    moved = [
        part
        if stamp is None
        else part.set_column(place, "recorded", pa.array([stamp] * len(part), pa.int64()))
        for part, stamp in zip(parts, stamps, strict=True)
    ]
    return pa.concat_tables(moved)


def _pointer_rows(builder: str, points: pa.Table, entries: pa.Table) -> pa.Table:
    """Pointers to entries, with run and time of the entry; those to nothing (null) keep what they said themselves."""
    made = entries.take(pc.index_in(points["entry_id"], entries["entry_id"].combine_chunks()))
    size = len(points)
    columns = {
        **{field.name: pa.nulls(size, field.type) for field in TRACE_SCHEMA},
        **{name: points[name] for name in ("config_hash", "key", "entry_id", "reads")},
        **{name: pc.coalesce(made[name], points[name]) for name in _SAID},
        "builder": pa.array([builder] * size, pa.string()),
        "kind": pa.array(["pointer"] * size, pa.string()),
        "group": pa.array([""] * size, pa.string()),
        "epoch": pa.array([0] * size, pa.int64()),
        "status": pa.array(["ok"] * size, pa.string()),
        "recorded": pa.array([0] * size, pa.int64()),
    }
    return pa.table(columns, schema=TRACE_SCHEMA)
