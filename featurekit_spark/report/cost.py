"""What was paid, by builder, merchant, model and day: summed from a cache's entries and its records of runs.

Reads only. An entry of a paid builder is a call; a call of which a record tells and no entry any more is one as well.
Amounts are decimals, so that every way of grouping them adds up to the same. Must not know how sums are shown.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache import files
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.rows import run_records
from featurekit_spark.errors import UsageError, known_names
from featurekit_spark.failures import failure_in
from featurekit_spark.settings import mask_password

__all__ = ["DIMENSIONS", "Spent", "checked_dimensions", "paid_lots", "spent_in", "summed"]

DIMENSIONS: Final = ("builder", "merchant", "model", "day")
_COLUMNS: Final = (
    *("builder", "config_hash", "entry_id", "run_id", "status", "error"),
    *("seconds", "tokens", "usd", "attempts", "estimated_tokens", "recorded"),
)
_USD: Final = pa.decimal128(38, 12)
_LOT: Final = ("builder", "run_id", "config_hash", "day")
_AMOUNTS: Final = (
    *("calls", "failed", "tokens", "usd", "unpriced", "seconds"),
    *("attempts", "failed_attempts", "estimated_tokens"),
)


@dataclass(frozen=True)
class Spent:
    """Calls that are alike, and what they took.

    `merchant`: the first field of the group whose run made them; `day`: when they were kept, UTC. None where nobody
    knows; in a sum, also what it is not grouped by. `failed`: calls that gave no answer. `tokens`, `usd`: as far as
    they are known, None where that is nothing; `unpriced`: calls whose usd nobody knows. `removed`: calls that only
    the record of their run tells of: their entries were taken out, or are not taken in yet. `estimated_tokens`: of the
    tokens, how many the provider did not count; usd of them are as uncertain. `attempts`: requests that the calls
    took, one where nobody counted; `failed_attempts`: those of them that led to no answer. What a provider billed for
    them is in the sums, where it said so.
    """

    builder: str | None = None
    merchant: str | None = None
    model: str | None = None
    day: date | None = None
    calls: int = 0
    failed: int = 0
    tokens: int | None = None
    usd: Decimal | None = None
    unpriced: int = 0
    seconds: float = 0.0
    removed: int = 0
    estimated_tokens: int = 0
    attempts: int = 0
    failed_attempts: int = 0

    def __add__(self, other: Spent) -> Spent:
        """Both together, under this one's names."""
        return replace(
            self,
            calls=self.calls + other.calls,
            failed=self.failed + other.failed,
            tokens=_sum(self.tokens, other.tokens),
            usd=_sum(self.usd, other.usd),
            unpriced=self.unpriced + other.unpriced,
            seconds=self.seconds + other.seconds,
            removed=self.removed + other.removed,
            estimated_tokens=self.estimated_tokens + other.estimated_tokens,
            attempts=self.attempts + other.attempts,
            failed_attempts=self.failed_attempts + other.failed_attempts,
        )

    def facts(self, by: Sequence[str] = DIMENSIONS) -> dict[str, Any]:
        """For programs: what it is grouped by, then the amounts."""
        amounts = [field.name for field in fields(self) if field.name not in DIMENSIONS]
        found = {name: getattr(self, name) for name in (*by, *amounts)}
        found["usd"] = None if self.usd is None else float(self.usd)
        return found


def checked_dimensions(names: Sequence[str]) -> tuple[str, ...]:
    """`names` if a sum can be grouped by them, else UsageError."""
    for name in names:
        if name not in DIMENSIONS:
            raise UsageError(f"sums cannot be grouped by {name!r}. {known_names(name, DIMENSIONS)}")
        if names.count(name) > 1:
            raise UsageError(f"{name!r} is named twice; sums are grouped by it once.")
    return tuple(names)


def summed(lots: Iterable[Spent], by: Sequence[str]) -> list[Spent]:
    """One sum per combination of the dimensions in `by`, in their order; what nobody knows comes last."""
    sums: dict[tuple[Any, ...], Spent] = {}
    for lot in lots:
        key = tuple(getattr(lot, name) for name in by)
        empty = Spent(**dict(zip(by, key, strict=True)))
        sums[key] = sums.get(key, empty) + lot
    return [sums[key] for key in sorted(sums, key=lambda key: [(part is None, str(part)) for part in key])]


def paid_lots(
    cache: DeltaCache,
    *,
    since: date | None = None,
    until: date | None = None,
    merchants: Mapping[str, str] | None = None,
) -> list[Spent]:
    """What was paid from `since` to the end of `until`. `merchants`: by run, where a run left no record."""
    records = run_records(cache)
    never_paid = _never_paid(records)
    table = cache.table("entries")
    names = {file.builder for file in files.data_files(table)} if table is not None else set()
    rows = files.rows_of(cache, "entries", _COLUMNS, builders=names - never_paid)
    lots = spent_in(rows, records, merchants=merchants or {})
    return [
        lot
        for lot in lots
        if (since is None or (lot.day is not None and lot.day >= since))
        and (until is None or (lot.day is not None and lot.day <= until))
    ]


def spent_in(entries: pa.Table, records: Sequence[RunRecord], *, merchants: Mapping[str, str]) -> list[Spent]:
    """The calls among `entries` (any builder's), and those that only `records` tell of."""
    told = [
        (record, name, facts)
        for record in records
        for name, facts in (record.record.get("builders") or {}).items()
    ]
    paid = {name for _, name, facts in told if facts.get("paid") or facts.get("calls")}
    models = {facts["config_hash"]: _model(facts.get("config", "")) for _, _, facts in told}
    whose = {**merchants, **{record.run_id: _merchant(record) for record in records}}
    lots: list[Spent] = []
    by_run = defaultdict[tuple[str, str], Spent](Spent)
    places = defaultdict[tuple[str, str], list[int]](list)
    for row in _calls(entries, paid):
        lot = Spent(
            row["builder"],
            whose.get(row["run_id"]),
            models.get(row["config_hash"]),
            row["day"],
            calls=row["calls_sum"],
            failed=row["failed_sum"],
            tokens=row["tokens_sum"],
            usd=row["usd_sum"],
            unpriced=row["unpriced_sum"],
            seconds=row["seconds_sum"] or 0.0,
            attempts=row["attempts_sum"],
            failed_attempts=row["failed_attempts_sum"],
            estimated_tokens=row["estimated_tokens_sum"] or 0,
        )
        places[row["run_id"], row["builder"]].append(len(lots))
        lots.append(lot)
        by_run[row["run_id"], row["builder"]] += lot
    for record, name, facts in told:
        kept = by_run[record.run_id, name]
        gone = int(facts.get("calls") or 0) - kept.calls
        if gone > 0:
            day = datetime.fromtimestamp(record.recorded / 1e9, UTC).date()
            names = Spent(name, whose[record.run_id], models[facts["config_hash"]], day)
            places[record.run_id, name].append(len(lots))
            lots.append(names + _removed(facts, kept, gone))
            by_run[record.run_id, name] += lots[-1]  # a run's name may have two records
        left = int(facts.get("estimated_tokens") or 0) - kept.estimated_tokens
        for place in places[record.run_id, name]:  # entries of before they said who counted
            if left <= 0:
                break
            own = min(left, (lots[place].tokens or 0) - lots[place].estimated_tokens)
            lots[place] = replace(lots[place], estimated_tokens=lots[place].estimated_tokens + own)
            left -= own
    return lots


def _calls(entries: pa.Table, paid: set[str]) -> Iterator[dict[str, Any]]:
    """Lots of calls: entries of paid builders, and others that say what they cost.

    No calls: what an input's failure passed on, and copies of entries under another identity, which cost nothing.
    """
    costly = pc.or_(pc.is_valid(entries["tokens"]), pc.is_valid(entries["usd"]))
    of_paid = pc.is_in(entries["builder"], pa.array(sorted(paid), pa.string()))
    ok = pc.not_equal(entries["status"], "error")
    built = pc.or_(costly, pc.if_else(ok, pc.is_valid(entries["seconds"]), _own_failure(entries)))
    rows = entries.filter(pc.and_(pc.or_(costly, of_paid), built))
    # The same answer may have been appended twice, by two runs, under two times: `seconds` tell how long it took until
    # its journal had it, or its share of the batch that it was built in.
    rows = rows.set_column(rows.column_names.index("attempts"), "attempts", _attempts(rows))
    same = ["builder", "entry_id", "run_id", "config_hash", "status", "tokens", "usd"]
    same += ["attempts", "estimated_tokens"]
    first = rows.select([*same, "seconds", "recorded"]).group_by(same)
    first = first.aggregate([("seconds", "min"), ("recorded", "min")])
    failed = pc.equal(first["status"], "error")
    usd = first["usd"].cast(_USD, safe=False)
    lots = pa.table(
        {
            **{name: first[name] for name in _LOT if name != "day"},
            "day": first["recorded_min"].cast(pa.timestamp("ns", tz="UTC")).cast(pa.date32()),
            "calls": pa.array([1] * len(first), pa.int64()),
            "failed": failed.cast(pa.int64()),
            "tokens": first["tokens"],
            "usd": usd,
            "unpriced": pc.is_null(usd).cast(pa.int64()),
            "seconds": first["seconds_min"],
            "attempts": first["attempts"],
            "failed_attempts": pc.max_element_wise(
                pc.subtract(first["attempts"], pc.invert(failed).cast(pa.int64())), 0
            ),
            "estimated_tokens": first["estimated_tokens"],
        }
    )
    grouped = lots.group_by(list(_LOT)).aggregate([(name, "sum") for name in _AMOUNTS])
    yield from grouped.to_pylist()


def _attempts(entries: pa.Table) -> Any:
    """Requests that entries took. Before there was a column for it, only the text of an error told."""
    known = entries["attempts"]
    untold = pc.and_(pc.is_null(known), pc.equal(entries["status"], "error"))
    if pc.any(untold).as_py():
        texts = entries["error"].filter(untold).to_pylist()
        told = [1 if (found := failure_in(text)) is None else found.attempts for text in texts]
        known = pc.replace_with_mask(
            known.combine_chunks(), untold.combine_chunks(), pa.array(told, pa.int64())
        )
    return pc.fill_null(known, 1)


def _own_failure(entries: pa.Table) -> Any:
    """Errors begin with the builder and key at fault."""
    own, error = pc.is_null(entries["builder"]), pc.fill_null(entries["error"], "")
    for name in entries["builder"].unique().to_pylist():
        itself = pc.and_(pc.equal(entries["builder"], name), pc.starts_with(error, f"{name}["))
        own = pc.or_(own, itself)
    return own


def _removed(facts: Mapping[str, Any], kept: Spent, gone: int) -> Spent:
    """The calls of a run's record less those whose entries are there."""
    usd = facts.get("usd")
    rest = None if usd is None else max(Decimal(str(usd)) - (kept.usd or 0), Decimal(0))
    tokens = max(int(facts.get("tokens") or 0) - (kept.tokens or 0), 0)
    seconds = max(float(facts.get("seconds") or 0.0) - kept.seconds, 0.0)
    return Spent(
        calls=gone,
        tokens=tokens,
        usd=rest,
        unpriced=gone if rest is None else 0,
        seconds=seconds,
        removed=gone,
        attempts=max(int(facts.get("attempts") or facts["calls"]) - kept.attempts, 0),
        failed_attempts=max(int(facts.get("failed_attempts") or 0) - kept.failed_attempts, 0),
    )


def _never_paid(records: Sequence[RunRecord]) -> set[str]:
    """Builders that every record of them says are not paid: their entries need not be read."""
    told: dict[str, bool] = {}
    for record in records:
        for name, facts in (record.record.get("builders") or {}).items():
            told[name] = told.get(name, False) or facts.get("paid", True)
    return {name for name, paid in told.items() if not paid}


def _merchant(record: RunRecord) -> str | None:
    group = json.loads(record.group)
    return str(group[0]) if isinstance(group, list) and group else None


def _model(config: str) -> str | None:
    """The `model` (or `embedder`) in a config as a record tells it, `Config(model='...', ...)`."""
    _, bracket, rest = config.partition("(")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body if bracket else None
    except (SyntaxError, ValueError):
        return None  # a field that does not tell itself as Python
    if isinstance(call, ast.Call):
        for keyword in call.keywords:
            named, value = keyword.arg in ("model", "embedder"), keyword.value
            if named and isinstance(value, ast.Constant) and isinstance(value.value, str):
                return mask_password(value.value)
    return None


def _sum(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else one + other
