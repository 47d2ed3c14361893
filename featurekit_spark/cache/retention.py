"""How long the texts of paid calls are kept: after that, prompts are hashes, and answers are gone.

Rows stay, with what they cost and what they hash to, so that sums, proofs and look-ups by prompt still hold. Knows
the cache's tables only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.care import alone, record_care
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import hashed_key, is_hashed
from featurekit_spark.cache.journal import take_in
from featurekit_spark.cache.rows import as_mask, run_records
from featurekit_spark.cache.upkeep import forget_log, vacuum
from featurekit_spark.failures import failure_in
from featurekit_spark.fingerprint import key_json
from featurekit_spark.locks import local_path

__all__ = ["EXPIRED", "Retention", "retain"]

EXPIRED: Final = "expired"
"""The status of an entry whose value was taken away: it answers nothing, and is no error."""
_TEXT_TYPES: Final = ("string", "large_string")
_FORGOTTEN: Final = "its text is no longer kept"
_COLUMNS: Final = ("builder", "key", "value", "status", "error", "recorded")


@dataclass(frozen=True)
class Retention:
    """What is taken from texts that were stored longer ago than `after`: prompts become hashes, answers go."""

    after: timedelta
    prompts: bool = True
    answers: bool = False


@dataclass(frozen=True)
class _Chosen:
    """`old`: keys by builder, hashed or not, of which nothing was stored since `before` (ns); `prompts`: the hashes of
    all prompts that are hashed now; `ledgers`: builders that are paid for and keyed by one text."""

    rule: Retention
    before: int
    ledgers: frozenset[str]
    texts: frozenset[str]
    old: Mapping[str, frozenset[str]]
    prompts: frozenset[str]

    def calls(self, rows: pa.Table) -> Any:
        """Rows of the ledgers that still have a text."""
        (name,) = rows["builder"].unique().to_pylist() or [""]
        old = as_mask(pc.is_in(rows["key"], pa.array(sorted(self.old.get(name, ())), pa.string())))
        plain = np.array([not is_hashed(key) for key in rows["key"].to_pylist()], bool)
        valued = as_mask(pc.is_valid(rows["value"])) if "value" in rows.column_names else False
        return old & ((plain & self.rule.prompts) | (valued & self.rule.answers))

    def derived(self, rows: pa.Table) -> Any:
        """Other rows that repeat a prompt: as their value, or in an error that they pass on."""
        older = as_mask(rows["recorded"]) < self.before
        values = zip(rows["value"].to_pylist(), rows["status"].to_pylist(), strict=True)
        same = [status == "ok" and self._is_prompt(value) for value, status in values]
        passed = [self._names_prompt(error) for error in rows["error"].to_pylist()]
        return older & (np.array(same, bool) | np.array(passed, bool))

    def _is_prompt(self, value: bytes | None) -> bool:
        try:
            return value is not None and hashed_key(key_json((value.decode(),))) in self.prompts
        except UnicodeDecodeError:
            return False

    def _names_prompt(self, error: str | None) -> bool:
        return error is not None and forgotten(error, self.ledgers) != error


def retain(
    cache: DeltaCache,
    rule: Retention,
    *,
    now: datetime,
    dry_run: bool = False,
    warehouse: str | None = None,
) -> dict[str, Any]:
    """Take old texts out of paid calls' entries, of rows that repeat them, and of the tables' earlier versions; counts
    of what was taken. A prompt is as old as its newest entry.

    Raises LockedError while a run reads the cache, CacheError.
    """
    if dry_run:
        chosen = _choose(cache, rule, now)
        return {**_counts(cache, chosen), "dry_run": True}
    with alone(cache, owner="cache retain", warehouse=warehouse):
        take_in(cache, nobody_runs=True)
        chosen = _choose(cache, rule, now)
        report = _counts(cache, chosen)
        if rule.prompts and report["prompts"]:
            cache.mark_hashed(
                report["prompts"]
            )  # first: a look-up that knows and finds none is slower, not wrong
        if any(report.values()):
            _take_texts(cache, chosen)
            record_care(cache, "retain", now, {**report, "after_s": rule.after.total_seconds()})
        for name in ("entries", "traces"):
            # Also what an earlier attempt left; the log has the first and last key of each file.
            if any(report.values()) and cache.table(name) is not None:
                vacuum(cache, name, hours=0, unreferenced=local_path(cache.path) is not None)
                forget_log(cache.table_path(name), cache.storage_options)
        return {**report, "dry_run": False}


def forgotten(error: str, ledgers: Collection[str]) -> str:
    """An error that begins with a key of a ledger, with the key's hash and without its message, which may quote it."""
    name, bracket, rest = error.partition("[")
    if not bracket or name not in ledgers:
        return error
    try:
        fields, _ = json.JSONDecoder().raw_decode(bracket + rest)
        key = key_json(tuple(fields))
    except (ValueError, TypeError):
        return f"{name}: {_FORGOTTEN}"
    if is_hashed(key):
        return error
    told = failure_in(error)
    attempts = "" if told is None else f"{told.attempts} attempt{'' if told.attempts == 1 else 's'}"
    return (
        f"{name}{hashed_key(key)}: "
        + ("" if told is None else f"[{told.kind.value}, {attempts}] ")
        + _FORGOTTEN
    )


def _choose(cache: DeltaCache, rule: Retention, now: datetime) -> _Chosen:
    before = int((now - rule.after).timestamp() * 1e9)
    rows = files.rows_of(cache, "entries", ("builder", "key", "tokens", "usd", "recorded"))
    ledgers, texts = _ledgers(rows, run_records(cache))
    old, prompts = {}, set()
    for name in ledgers:
        own = rows.filter(pc.equal(rows["builder"], name))
        newest = own.group_by("key").aggregate([("recorded", "max")])
        keys = newest["key"].filter(pc.less(newest["recorded_max"], before)).to_pylist()
        old[name] = frozenset(keys)
        hidden = {key for key in own["key"].unique().to_pylist() if is_hashed(key)}
        prompts |= hidden | (
            {hashed_key(key) for key in keys if not is_hashed(key)} if rule.prompts else set()
        )
    return _Chosen(rule, before, frozenset(ledgers), frozenset(texts - ledgers), old, frozenset(prompts))


def _ledgers(rows: pa.Table, runs: list[RunRecord]) -> tuple[set[str], set[str]]:
    """(builders that are paid for and keyed by one text, builders whose values may repeat it)."""
    told = [(name, facts) for run in runs for name, facts in (run.record.get("builders") or {}).items()]
    costly = rows.filter(pc.or_(pc.is_valid(rows["tokens"]), pc.is_valid(rows["usd"])))
    paid = {name for name, facts in told if facts.get("paid") or facts.get("calls")}
    paid |= set(costly["builder"].unique().to_pylist())
    types: dict[str, set[str]] = {}
    for name, facts in told:
        types.setdefault(name, set()).add(str(facts.get("type", "")))
    vectors = {name for name, found in types.items() if any(text.startswith("float32[") for text in found)}
    names = set(rows["builder"].unique().to_pylist())
    ledgers = {
        name
        for name in (paid & names) - vectors
        if _is_one_text(rows["key"].filter(pc.equal(rows["builder"], name))[0].as_py())
    }
    # Of builders that no run has had, nobody knows the type.
    return ledgers, {name for name in names if not types.get(name, {""}).isdisjoint({*_TEXT_TYPES, ""})}


def _is_one_text(key: str) -> bool:
    fields = json.loads(key)
    return len(fields) == 1 and isinstance(fields[0], str)


def _counts(cache: DeltaCache, chosen: _Chosen) -> dict[str, Any]:
    """What would change: prompts and answers by builder, rows that repeat prompts, traces."""
    answers: dict[str, int] = {}
    derived: dict[str, int] = {}
    table = cache.table("entries")
    for file in files.data_files(table) if table is not None else ():
        for rows in files.file_rows(cache, "entries", file, _COLUMNS):
            if file.builder in chosen.ledgers and chosen.rule.answers:
                lost = chosen.calls(rows) & as_mask(pc.is_valid(rows["value"]))
                answers[file.builder] = answers.get(file.builder, 0) + int(lost.sum())
            elif file.builder not in chosen.ledgers and chosen.rule.prompts:
                derived[file.builder] = derived.get(file.builder, 0) + int(chosen.derived(rows).sum())
    traces = 0
    table = cache.table("traces")
    for file in files.data_files(table) if table is not None and chosen.rule.prompts else ():
        if file.builder in chosen.ledgers:
            for rows in files.file_rows(cache, "traces", file, ("builder", "key")):
                traces += int(chosen.calls(rows).sum())
    prompts = {
        name: sum(not is_hashed(key) for key in keys) * chosen.rule.prompts
        for name, keys in chosen.old.items()
    }
    return {
        "prompts": _some(prompts),
        "answers": _some(answers),
        "repeated_in": _some(derived),
        "traces": traces,
    }


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def _take_texts(cache: DeltaCache, chosen: _Chosen) -> None:
    """First what repeats the prompts, then they themselves: what a crash leaves is found by their hashes."""
    rule = chosen.rule
    others = set(cache.builders()) - chosen.ledgers
    if rule.prompts:
        _edited(cache, "entries", chosen.derived, lambda rows: _without_repeats(rows, chosen), others)
        _edited(cache, "traces", chosen.calls, lambda rows: _hashed(rows), chosen.ledgers)
    _edited(
        cache,
        "entries",
        chosen.calls,
        lambda rows: _without_texts(rows, rule, chosen.ledgers),
        chosen.ledgers,
    )


def _edited(
    cache: DeltaCache,
    name: str,
    doomed: Callable[[pa.Table], Any],
    edit: Callable[[pa.Table], pa.Table],
    builders: Collection[str],
) -> None:
    columns = _COLUMNS if name == "entries" else ("builder", "key")
    files.remove_rows(cache, name, doomed, columns=columns, builders=builders, edit=edit)


def _without_texts(rows: pa.Table, rule: Retention, ledgers: Collection[str]) -> pa.Table:
    if rule.answers:
        rows = _expired(rows, as_mask(pc.is_valid(rows["value"])))
    if rule.prompts:
        rows = _replaced(_hashed(rows), "error", lambda text: forgotten(text, ledgers))
    return rows


def _without_repeats(rows: pa.Table, chosen: _Chosen) -> pa.Table:
    rows = _replaced(rows, "error", lambda text: forgotten(text, chosen.ledgers))
    return _expired(rows, as_mask(pc.equal(rows["status"], "ok")))


def _hashed(rows: pa.Table) -> pa.Table:
    return _replaced(rows, "key", lambda key: key if is_hashed(key) else hashed_key(key))


def _expired(rows: pa.Table, mask: Any) -> pa.Table:
    """Without the values of these rows; an error stays one."""
    ok = pc.and_(pc.equal(rows["status"], "ok"), pa.array(mask))
    none = pa.nulls(len(rows), pa.binary())
    rows = _with(rows, "value", pc.if_else(pa.array(mask), none, rows["value"]))
    return _with(rows, "status", pc.if_else(ok, EXPIRED, rows["status"]))


def _replaced(rows: pa.Table, name: str, edit: Callable[[str], str]) -> pa.Table:
    texts = [None if text is None else edit(text) for text in rows[name].to_pylist()]
    return _with(rows, name, pa.array(texts, pa.string()))


def _with(rows: pa.Table, name: str, column: Any) -> pa.Table:
    place = rows.column_names.index(name)
    return rows.set_column(place, rows.schema.field(place), column)
