"""Every product DB, real or in memory, gives the same products for the same data."""

from __future__ import annotations

import asyncio
import csv
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.sources import catalog
from featurekit_spark.sources.base import Dimension, ScannableProductDB, resolve_dimension
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.sources.memory import InMemoryProductDB

Row = dict[str, str | None]
Make = Callable[[Path, list[Row]], ScannableProductDB]

COLUMNS = ["product_id", "title", "title[locale:de_DE]", "title[locale:de_DE|warehouse:w1]", "price"]
DE, DE_W1 = (("locale", "de_DE"),), (("locale", "de_DE"), ("warehouse", "w1"))

ROWS: list[Row] = [
    dict(zip(COLUMNS, values, strict=True))
    for values in [
        ("p1", "Lamp", "Lampe", "Lampe (Lager 1)", "9.99"),
        ("p2", "Sofa", None, "Sofa (Lager 1)", None),
        ("p3", "  ", "\u00a0", None, "1"),
        ("e\u0301", 'quo"ted, and\nbroken', "back\\slash", None, "0"),
        ("\u00e9", " spaces kept ", None, None, None),
    ]
]


def table_of(rows: list[Row]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in COLUMNS})


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def in_csv(folder: Path, rows: list[Row]) -> ScannableProductDB:
    write_csv(folder / "shop_US.csv", rows)
    return FileProductDB(folder, merchant="shop", market="US")


def in_csv_parts(folder: Path, rows: list[Row]) -> ScannableProductDB:
    write_csv(folder / "shop_US.csv" / "part-0.csv", rows[:2])
    write_csv(folder / "shop_US.csv" / "part-1.csv", rows[2:])
    (folder / "shop_US.csv" / "_SUCCESS").touch()
    return FileProductDB(f"file:{folder}", merchant="shop", market="US")


def in_parquet(folder: Path, rows: list[Row]) -> ScannableProductDB:
    pq.write_table(table_of(rows), folder / "shop_US.parquet")
    return FileProductDB(folder, merchant="shop", market="US")


def in_parquet_parts(folder: Path, rows: list[Row]) -> ScannableProductDB:
    parts = folder / "shop_US.parquet"
    parts.mkdir()
    for name, some in (("a", rows[:2]), ("b", rows[2:])):
        pq.write_table(table_of(some), parts / f"{name}.parquet", use_dictionary=True)
    return FileProductDB(folder, merchant="shop", market="US")


def in_delta(folder: Path, rows: list[Row]) -> ScannableProductDB:
    write_deltalake(folder / "table", table_of(rows))
    return DeltaProductDB(folder / "table", merchant="shop", market="US")


def in_shared_delta(folder: Path, rows: list[Row]) -> ScannableProductDB:
    table = table_of(rows)
    for merchant in ("other", "shop"):
        owner = [pa.array([text] * len(table), pa.string()) for text in (merchant, "US")]
        whole = table.append_column("merchant", owner[0]).append_column("market", owner[1])
        write_deltalake(folder / "table", whole, mode="append", partition_by=["merchant"])
    return DeltaProductDB(folder / "table", merchant="shop", market="US")


def in_memory(folder: Path, rows: list[Row]) -> ScannableProductDB:
    keys = dict(zip(COLUMNS[1:4], [(), DE, DE_W1], strict=True))
    return InMemoryProductDB(
        {
            str(row["product_id"]): {
                "title": {key: row[column] for column, key in keys.items()},
                "price": row["price"],
            }
            for row in rows
        },
        version="1",
    )


MAKERS = [in_csv, in_csv_parts, in_parquet, in_parquet_parts, in_delta, in_shared_delta, in_memory]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def get(db: ScannableProductDB, *args: Any) -> dict[str, Any]:
    return asyncio.run(db.get_products(*args))


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: str(row["product_id"]))


def test_all_products_with_all_their_values(make: Make, tmp_path: Path) -> None:
    db = make(tmp_path, ROWS)
    assert isinstance(db, ScannableProductDB)
    assert get(db, {"title", "price"}) == {
        "p1": {"title": {(): "Lamp", DE: "Lampe", DE_W1: "Lampe (Lager 1)"}, "price": {(): "9.99"}},
        "p2": {"title": {(): "Sofa", DE_W1: "Sofa (Lager 1)"}, "price": {}},
        "p3": {"title": {}, "price": {(): "1"}},
        "e\u0301": {"title": {(): 'quo"ted, and\nbroken', DE: "back\\slash"}, "price": {(): "0"}},
        "\u00e9": {"title": {(): " spaces kept "}, "price": {}},
    }


def test_only_what_is_asked_for(make: Make, tmp_path: Path) -> None:
    db = make(tmp_path, ROWS)
    assert get(db, {"price"}, {"p1", "p2", "nobody"}) == {"p1": {"price": {(): "9.99"}}, "p2": {"price": {}}}
    assert get(db, set(), {"p1"}) == {"p1": {}}
    assert get(db, {"price"}, set()) == {}


def test_attributes_and_what_they_vary_by(make: Make, tmp_path: Path) -> None:
    found = asyncio.run(make(tmp_path, ROWS).get_product_attribute_dimensions())
    assert found == {
        "price": Dimension(),
        "title": Dimension(("locale", "warehouse"), (("de_DE",), ("w1",))),
    }


@pytest.mark.parametrize("wanted", [{}, {"locale": "de_DE"}, {"locale": "de_DE", "warehouse": "w1"}])
def test_a_scan_resolves_as_single_look_ups_do(make: Make, tmp_path: Path, wanted: dict[str, str]) -> None:
    db = make(tmp_path, ROWS)
    scan = db.scan(["price", "title"], dimensions=wanted)
    table = scan.to_arrow()
    assert table.schema.names == ["product_id", "price", "title"]
    assert table.schema.types == [pa.string()] * 3
    products = get(db, {"title", "price"})
    assert rows_of(table) == rows_of(
        pa.Table.from_pylist(
            [
                {
                    "product_id": p,
                    "price": resolve_dimension(v["price"], wanted),
                    "title": resolve_dimension(v["title"], wanted),
                }
                for p, v in products.items()
            ]
        )
    )
    assert scan.quality() == {
        "rows": 5,
        "products": 5,
        "duplicates_dropped": 0,
        "missing_price": 2,
        "missing_title": 1,
    }
    assert scan.bytes > 0
    assert scan.version == db.version() is not None


def test_a_scan_without_attributes_gives_the_ids(make: Make, tmp_path: Path) -> None:
    table = make(tmp_path, ROWS).scan([], dimensions={}).to_arrow()
    assert table.schema.names == ["product_id"] and len(table) == 5


def test_a_catalog_without_products_is_fine_and_typed(make: Make, tmp_path: Path) -> None:
    db = make(tmp_path, [])
    table = db.scan(["title"], dimensions={"locale": "de_DE"}).to_arrow()
    assert table.schema == pa.schema([("product_id", pa.string()), ("title", pa.string())])
    assert len(table) == 0
    assert get(db, {"title"}) == {}


def test_an_unknown_attribute_is_an_error_that_names_those_there_are(make: Make, tmp_path: Path) -> None:
    db = make(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"'titel'.*'title'"):
        get(db, {"titel"})
    with pytest.raises(DataError, match=r"'titel'.*'title'"):
        db.scan(["titel"], dimensions={}).to_arrow()


def test_no_attribute_twice_in_a_scan(make: Make, tmp_path: Path) -> None:
    db = make(tmp_path, ROWS)
    for attributes in (["title", "title"], ["product_id"]):
        with pytest.raises(UsageError, match="ask for each once"):
            db.scan(attributes, dimensions={})


def test_it_travels_and_serves_many_threads(make: Make, tmp_path: Path) -> None:
    db = pickle.loads(pickle.dumps(make(tmp_path, ROWS)))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: get(db, {"title"}, {"p1"}), range(16)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["p1"]["title"][DE] == "Lampe"


def test_counts_of_a_reading_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abt_US.csv").write_text("product_id,title\np1,red lamp\np2,\n")
    db = FileProductDB(tmp_path, merchant="abt", market="US")
    db.scan(["title"], dimensions={}).to_arrow()
    monkeypatch.setattr(catalog, "load", None)  # not read again
    counts = {"rows": 2, "products": 2, "duplicates_dropped": 0, "missing_title": 1}
    assert db.scan(["title"], dimensions={}).quality() == counts
