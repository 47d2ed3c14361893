"""Every interaction DB gives the same rows, in the same order, for the same log."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from featurekit_spark.errors import ConfigError, DataError, UsageError
from featurekit_spark.sources.interactions import (
    COLUMNS,
    DeltaInteractionDB,
    FileInteractionDB,
    InteractionDataDB,
    interaction_schema,
)

Row = tuple[str | None, str | None, str | None, datetime | None, datetime | None]
Make = Callable[[Path, list[Row]], InteractionDataDB]


def at(hour: int, micro: int = 0) -> datetime:
    return datetime(2026, 1, 31, hour, microsecond=micro, tzinfo=UTC)


ROWS: list[Row] = [
    ("u2", "p1", "recs", at(3), None),
    ("u1", "p2", "recs", at(1, 250), at(2)),
    ("u1", "p1", "recs", at(1, 250), None),
    ("u1", "p1", "mail", at(5), at(5, 1)),
    ("ü", "p,1", "recs", at(4), None),
]
SORTED = [ROWS[2], ROWS[1], ROWS[0], ROWS[4], ROWS[3]]


def table_of(rows: list[Row]) -> pa.Table:
    fields = [field.with_nullable(True) for field in interaction_schema()]
    return pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows], pa.schema(fields))


def in_csv(folder: Path, rows: list[Row]) -> InteractionDataDB:
    table = table_of(rows)
    texts = [pa.array([t and t.isoformat() for t in table[i].to_pylist()], pa.string()) for i in (3, 4)]
    table = table.set_column(3, "served_at", texts[0]).set_column(4, "reacted_at", texts[1])
    pa.csv.write_csv(table, folder / "shop_US.csv")
    return FileInteractionDB(folder)


def in_parquet(folder: Path, rows: list[Row]) -> InteractionDataDB:
    pq.write_table(table_of(rows), folder / "shop_US.parquet")
    return FileInteractionDB(folder)


def in_naive_parquet_parts(folder: Path, rows: list[Row]) -> InteractionDataDB:
    table = table_of(rows)
    for i in (3, 4):
        table = table.set_column(i, COLUMNS[i], table[i].cast(pa.timestamp("ns" if i > 3 else "us")))
    parts = folder / "shop_US.parquet"
    parts.mkdir()
    pq.write_table(table.slice(0, 2), parts / "a.parquet")
    pq.write_table(table.slice(2), parts / "b.parquet")
    return FileInteractionDB(folder)


def in_delta(folder: Path, rows: list[Row]) -> InteractionDataDB:
    write_deltalake(folder / "log", table_of(rows))
    return DeltaInteractionDB(folder / "log")


def in_shared_delta(folder: Path, rows: list[Row]) -> InteractionDataDB:
    table = table_of(rows)
    for merchant in ("shop", "other"):
        owned = table.append_column("merchant", pa.array([merchant] * len(table), pa.string()))
        write_deltalake(folder / "log", owned, partition_by=["merchant"], mode="append")
    return DeltaInteractionDB(folder / "log")


MAKERS = [in_csv, in_parquet, in_naive_parquet_parts, in_delta, in_shared_delta]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def ask(db: InteractionDataDB, **wanted: Any) -> pa.Table:
    return asyncio.run(db.get_interactions("shop", "US", **wanted))


def rows_of(table: pa.Table) -> list[Row]:
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.fixture
def db(make: Make, tmp_path: Path) -> InteractionDataDB:
    return make(tmp_path, ROWS)


def test_all_rows_typed_and_in_a_stable_order(db: InteractionDataDB) -> None:
    table = ask(pickle.loads(pickle.dumps(db)))
    assert table.schema == interaction_schema()
    assert rows_of(table) == SORTED


def test_since_is_included_and_until_is_not(db: InteractionDataDB) -> None:
    assert rows_of(ask(db, since=at(1, 250), until=at(4))) == SORTED[:3]
    assert rows_of(ask(db, since=at(1, 251))) == SORTED[2:]
    assert rows_of(ask(db, until=at(5))) == SORTED[:4]
    assert rows_of(ask(db, until=at(0))) == []


def test_bounds_may_be_naive_or_elsewhere(db: InteractionDataDB) -> None:
    expected = SORTED[3:]
    assert rows_of(ask(db, since=datetime(2026, 1, 31, 4))) == expected
    assert rows_of(ask(db, since=at(4).astimezone(timezone(timedelta(hours=-5))))) == expected


def test_only_the_entities_asked_for(db: InteractionDataDB) -> None:
    assert rows_of(ask(db, entity_ids={"u2", "ü", "no'body"})) == SORTED[2:4]
    assert rows_of(ask(db, entity_ids=["u1"], since=at(2))) == SORTED[4:]
    assert ask(db, entity_ids=[]).schema == interaction_schema()
    assert rows_of(ask(db, entity_ids=[])) == []
    with pytest.raises(UsageError, match="is one text"):
        ask(db, entity_ids="u1")


def test_no_interactions_are_fine_and_typed(make: Make, tmp_path: Path) -> None:
    table = ask(make(tmp_path, []))
    assert table.schema == interaction_schema() and len(table) == 0


@pytest.mark.parametrize("column", range(4))
def test_a_row_that_misses_something_is_an_error(make: Make, tmp_path: Path, column: int) -> None:
    bad = list(ROWS[0])
    bad[column] = None
    db = make(tmp_path, [*ROWS[2:], tuple(bad)])  # type: ignore[list-item]
    with pytest.raises(DataError, match=f"(line 5|row [0-9]).*: no {COLUMNS[column]}"):
        ask(db)
    if column in (0, 3):
        # Nobody can say whether such a row is among those wanted.
        with pytest.raises(DataError, match=f"no {COLUMNS[column]}"):
            ask(db, entity_ids={"u1", "u2"}, since=at(2))


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"interaction_data_db: no shop_US\.csv"):
        ask(FileInteractionDB(tmp_path))
    with pytest.raises(ConfigError, match=r"interaction_data_db\.path .* no Delta table"):
        ask(DeltaInteractionDB(tmp_path / "log"))


HEADER = "entity_id,product_id,kind,served_at,reacted_at\n"


@pytest.mark.parametrize(
    "text",
    ["2026-01-31T12:00:00Z", "2026-01-31 12:00", "2026-01-31T14:00:00+02:00", " 2026-01-31T12:00:00.000000 "],
)
def test_times_in_csv(tmp_path: Path, text: str) -> None:
    (tmp_path / "shop_US.csv").write_text(HEADER + f"u,p,recs,{text},\n")
    assert rows_of(ask(FileInteractionDB(tmp_path))) == [("u", "p", "recs", at(12), None)]


@pytest.mark.parametrize("text", ["yesterday", "31.01.2026", "1769860800"])
def test_a_time_that_is_none_is_named_by_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "shop_US.csv").write_text(HEADER + f'"u\nx",p,recs,2026-01-31,\nu,p,recs,2026-01-31,{text}\n')
    with pytest.raises(DataError, match=rf"shop_US\.csv, line 4: reacted_at '{text}' is no time"):
        ask(FileInteractionDB(tmp_path))


def test_a_missing_column_and_a_wrong_type(tmp_path: Path) -> None:
    (tmp_path / "shop_US.csv").write_text("entity_id,product_id,served_at,reacted_at\n")
    with pytest.raises(DataError, match="no column 'kind'"):
        ask(FileInteractionDB(tmp_path))
    numbers = table_of(ROWS).set_column(3, "served_at", pa.array(range(5)))
    pq.write_table(numbers, tmp_path / "other_US.parquet")
    with pytest.raises(DataError, match="'served_at' is of type int64; it must be a timestamp or ISO 8601"):
        asyncio.run(FileInteractionDB(tmp_path).get_interactions("other", "US", since=at(1)))
