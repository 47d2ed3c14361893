"""What a Delta sink published before, by run: which version of the table holds it, and its rows.

Every publication's commit carries a note of what it is. Must not know why somebody wants to go back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Held", "commit_note", "held_by", "runs_in"]

_KIND = "featurekit.publication"


@dataclass(frozen=True)
class Held:
    """One run's rows of a merchant and market (`ROW_COLUMNS`), as a version of the table has them."""

    run_id: str
    ts: datetime
    version: int
    rows: pa.Table


def commit_note(merchant: str, market: str, run_id: str) -> str:
    """What a publication's commit says of itself; DESCRIBE HISTORY shows it as userMetadata."""
    return json.dumps({"kind": _KIND, "merchant": merchant, "market": market, "run_id": run_id})


def held_by(table: DeltaTable, merchant: str, market: str, run_id: str) -> Held | None:
    """What a run published last, None where no version that the table still knows has it. Raises DataError where the
    version is known and its files are gone."""
    for commit in table.history():
        note = _note(commit)
        if note is not None and (note["merchant"], note["market"], note["run_id"]) != (
            merchant,
            market,
            run_id,
        ):
            continue
        # Without a note: written before there were any, or by other hands. Then only its rows can tell.
        if note is None and "WRITE" not in str(commit.get("operation")):
            continue
        found = _rows(table, int(commit["version"]), merchant, market, run_id, sure=note is not None)
        if found is not None and (note is not None or len(found)):
            times = found["ts"].drop_null().unique().to_pylist()
            ts = max(times, default=datetime.fromtimestamp(commit["timestamp"] / 1000, UTC))
            return Held(run_id, ts, int(commit["version"]), found.drop(["ts"]))
    return None


def runs_in(table: DeltaTable, merchant: str, market: str) -> Iterator[str]:
    """The runs whose publications the table remembers, newest first."""
    notes = (_note(commit) for commit in table.history())
    return iter(
        dict.fromkeys(
            note["run_id"]
            for note in notes
            if note and (note["merchant"], note["market"]) == (merchant, market)
        )
    )


def _note(commit: Mapping[str, Any]) -> dict[str, str] | None:
    try:
        note = json.loads(commit.get("userMetadata") or "null")
    except ValueError:
        return None
    return note if isinstance(note, dict) and note.get("kind") == _KIND else None


def _rows(
    table: DeltaTable, version: int, merchant: str, market: str, run_id: str, *, sure: bool
) -> pa.Table | None:
    import pyarrow as pa

    texts = (text.replace("'", "''") for text in (merchant, market, run_id))
    query = "SELECT product_id, logic_builder, recs, scores, ts FROM t WHERE "
    query += " AND ".join(
        f"{name} = '{text}'" for name, text in zip(("merchant", "market", "run_id"), texts, strict=True)
    )
    try:
        at = DeltaTable(table.table_uri, version=version)
        found = pa.table(QueryBuilder().register("t", at).execute(query).read_all())
    except Exception as error:  # the query engine raises no type of its own
        if not sure:
            return None  # an older version, of any run, whose files are gone
        raise DataError(
            f"run {run_id!r} is version {version} of {table.table_uri!r}, which cannot be read any more ({error}): "
            "its files were removed, as by VACUUM. Choose a later run."
        ) from error
    return found
