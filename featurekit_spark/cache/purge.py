"""Taking what a cache has of a product or a person out of it for good: rows, earlier versions, log.

Whose data a row is, is told by the fields of its key and the texts of its value. Knows the cache's tables only; what
else holds the data is in `pipelines.purge`. The caller keeps runs away.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import TraceRow
from featurekit_spark.cache.care import record_care
from featurekit_spark.cache.current import newest_rows
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import hashed_key
from featurekit_spark.cache.rows import (
    ENTRY_COLUMNS,
    PLACE,
    TRACE_COLUMNS,
    Doomed,
    cost_of,
    current_marks,
    gone_of,
    take_out,
    traces_of,
    tuples,
)
from featurekit_spark.cache.upkeep import forget_log, vacuum
from featurekit_spark.fingerprint import key_json
from featurekit_spark.locks import local_path

__all__ = ["PURGED", "PurgePlan", "Subject", "apply_purge", "mentioned", "plan_purge", "scrubbed"]

PURGED: Final = "[purged]"
"""Stands in run records where the data was."""

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
Subject = tuple[str | int, ...]
"""The fields that name a product or a person: a key, or one field of keys."""


@dataclass(frozen=True)
class PurgePlan:
    """What would go. `matrices`: hashes of matrices that nobody else's rows name; `report`: figures for people."""

    subjects: tuple[Subject, ...]
    entries: pa.Table
    traces: pa.Table
    doomed: Doomed
    matrices: tuple[str, ...]
    report: dict[str, Any]


@dataclass
class _Seen:
    """What the pass over all values found, row by row."""

    by_key: list[bool]
    by_value: list[bool]
    texts: set[str]  # what the subjects' own values say
    named: list[tuple[int, str]]  # (row, matrix) of every matrix that a value names


def mentioned(subjects: Iterable[Subject], words: Collection[Any]) -> bool:
    """Whether all fields of one of the subjects are among `words`."""
    return any(all(field in words for field in subject) for subject in subjects)


def plan_purge(
    cache: DeltaCache, subjects: Sequence[Subject], *, texts: bool = False, matrices: Collection[str] = ()
) -> PurgePlan:
    """Look at every entry's key and value. `texts`: also entries keyed by a text that the subjects' own entries have as
    value (titles, prompts), which others may share. `matrices`: hashes of matrices that hold a subject."""
    entries = files.rows_of(cache, "entries", ENTRY_COLUMNS)
    traces = files.rows_of(cache, "traces", TRACE_COLUMNS)
    seen = _look(cache, subjects, set(matrices))
    own = np.array(seen.by_key, bool) | np.array(seen.by_value, bool)
    shared = _keyed_by(entries, seen, own)
    mask = own | shared if texts else own
    gone = gone_of(entries, mask)
    also = np.fromiter((_trace_of(subjects, row) for row in traces.to_pylist()), bool, len(traces))
    trace_mask = traces_of(traces, gone, also=also)
    kept = {name for row, name in seen.named if not mask[row]}
    lost = entries.filter(pa.array(mask))
    answers = newest_rows(lost.filter(pc.equal(lost["status"], "ok")), "entry_id")
    report = {
        "entries": _per_builder(entries, mask),
        "traces": int(trace_mask.sum()),
        "keyed_by_their_texts": {} if texts else _per_builder(entries, shared),
        "recompute": cost_of(answers),
    }
    return PurgePlan(
        tuple(subjects),
        entries,
        traces,
        Doomed(mask, trace_mask, gone),
        tuple(sorted(set(matrices) - kept)),
        report,
    )


def apply_purge(cache: DeltaCache, plan: PurgePlan, *, reason: str, now: datetime) -> dict[str, Any]:
    """Take the rows out, traces first, then what was left of them: earlier versions, the tables' logs, run records.

    The record of it says how many and why, and not whose.
    """
    cache.append(None, _covered(plan, now))
    take_out(cache, plan.entries, plan.traces, plan.doomed)
    records = files.remove_rows(
        cache,
        "runs",
        lambda rows: [scrubbed(plan.subjects, text) is not None for text in rows["record"].to_pylist()],
        columns=("record",),
        edit=lambda rows: _scrubbed_rows(plan.subjects, rows),
    ).rows
    record_care(cache, "purge", now, {**plan.report, "run_records": records, "reason": reason})
    for name in files.TABLES:
        if cache.table(name) is not None:
            # Nobody reads or writes now; where no lock can say so, what may be somebody's unfinished file stays.
            vacuum(cache, name, hours=0, unreferenced=local_path(cache.path) is not None)
            forget_log(cache.table_path(name), cache.storage_options)
    cache.clear_marks()
    return {**plan.report, "run_records": records}


def scrubbed(subjects: Sequence[Subject], document: str) -> str | None:
    """A JSON document with `[purged]` in place of every text that names a subject, None where nothing does."""
    found = json.loads(document)
    clean = _without(subjects, found)
    return None if clean == found else json.dumps(clean, sort_keys=True)


def _look(cache: DeltaCache, subjects: Sequence[Subject], matrices: set[str]) -> _Seen:
    seen = _Seen([], [], set(), [])
    table = cache.table("entries")
    for file in files.data_files(table) if table is not None else ():
        for rows in files.file_rows(cache, "entries", file, ("key", "value")):
            for key, value in zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True):
                fields, words = json.loads(key), set(_words(value))
                by_key = mentioned(subjects, fields)
                if by_key:
                    seen.texts |= words
                held = words & matrices
                seen.named += [(len(seen.by_key), name) for name in held]
                # A matrix is named by its content: whose it is, the key says.
                inside = {subject[-1] for subject in subjects} if held else set()
                seen.by_value.append(mentioned(subjects, {*fields, *words, *inside}))
                seen.by_key.append(by_key)
    return seen


def _words(value: bytes | None) -> Iterator[str]:
    """The value as a text, and the texts in it where it is JSON."""
    if value is None:
        return
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return
    if text[:1] in ("[", "{"):
        for found in _STRINGS.findall(value):
            try:
                yield json.loads(found)
            except ValueError:
                continue
    else:
        yield text


def _keyed_by(entries: pa.Table, seen: _Seen, own: Any) -> Any:
    """Rows keyed by a text of the subjects' own values that is no key of the same builders (another product's id)."""
    builders, keys = entries["builder"].to_pylist(), entries["key"].to_pylist()
    same = {name for name, by_key in zip(builders, seen.by_key, strict=True) if by_key}
    ids = {
        field for name, key in zip(builders, keys, strict=True) if name in same for field in json.loads(key)
    }
    texts = {text for text in seen.texts if text} - ids
    texts |= {json.loads(hashed_key(key_json((text,))))[0] for text in texts}
    return np.fromiter(
        (not mine and not texts.isdisjoint(json.loads(key)) for mine, key in zip(own, keys, strict=True)),
        bool,
        len(entries),
    )


def _trace_of(subjects: Sequence[Subject], row: dict[str, Any]) -> bool:
    """Whether a trace is of a subject, or keeps that it was read."""
    try:
        if mentioned(subjects, json.loads(row["key"])):
            return True
        reads = json.loads(row["reads"] or "[]")
        return any(mentioned(subjects, json.loads(read[1])) for read in reads)
    except (ValueError, TypeError, IndexError):
        return False


def _covered(plan: PurgePlan, now: datetime) -> list[TraceRow]:
    """Pointers to nothing for keys whose current entry goes and an older one stays: it must not be current again."""
    kept = plan.entries.filter(pa.array(~plan.doomed.entries))
    left = set(tuples(kept.filter(pc.equal(kept["status"], "ok")), PLACE))
    gone = set(plan.doomed.gone.to_pylist())
    marks = current_marks(plan.entries, plan.traces)
    return [
        TraceRow(*(place[0], "pointer", place[2], place[1]), now, "purge")
        for place, entry in zip(tuples(marks, PLACE), marks["entry_id"].to_pylist(), strict=True)
        if entry in gone and place in left
    ]


def _per_builder(entries: pa.Table, mask: Any) -> dict[str, int]:
    return dict(sorted(Counter(entries["builder"].filter(pa.array(mask)).to_pylist()).items()))


def _scrubbed_rows(subjects: Sequence[Subject], rows: pa.Table) -> pa.Table:
    texts = rows["record"].to_pylist()
    clean = pa.array([scrubbed(subjects, text) or text for text in texts], pa.string())
    place = rows.column_names.index("record")
    return rows.set_column(place, rows.schema.field(place), clean)


@dataclass(frozen=True)
class _Anywhere:
    """A text as a collection of the words that occur anywhere in it."""

    text: str

    def __contains__(self, word: object) -> bool:
        plain = str(word)
        # As it is, or as a key's JSON has it; `p1` is not in `p10`.
        forms = {plain, *(json.dumps(plain, ensure_ascii=pure)[1:-1] for pure in (True, False))}
        return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", self.text) for form in forms)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return len(self.text)


def _without(subjects: Sequence[Subject], found: Any) -> Any:
    match found:
        case dict():
            return {
                PURGED if mentioned(subjects, _Anywhere(str(name))) else name: _without(subjects, item)
                for name, item in found.items()
            }
        case list():
            if mentioned(subjects, [item for item in found if isinstance(item, str | int)]):
                return [PURGED]
            return [_without(subjects, item) for item in found]
        case str() if mentioned(subjects, _Anywhere(found)):
            return PURGED
        case _:
            return found
