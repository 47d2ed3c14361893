"""A catalog read by Spark is the catalog read in-process: same rows, same values, same refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from featurekit_spark.errors import ConfigError, DataError
from featurekit_spark.sources.base import BLANKS, ScannableProductDB
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.sources.memory import InMemoryProductDB

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

ADVERSARIAL = (
    "\ufeffproduct_id,title,title[locale=de_DE],we`ird. name\r\n"
    'a,"x, ""y""","line\r\nbreak\n",1\r\n'
    "b,  spaces  ,,C:\\n\\\r\n"
    'c,5" pipe,"\u00a0",""\r\n'
    "\r\n"
    "e\u0301,nfd,,NULL\r\n"
    "\u00e9,nfc,,\\N\r\n"
    "01,leading zero,null,#comment\r\n"
    "1,\ufffd,NaN,'single'\r\n"
    "#d,\u2028,\u200b,\x00"
)


def csv_db(folder: Path, text: str, **settings: Any) -> FileProductDB:
    (folder / "shop_US.csv").write_text(text, encoding="utf-8", newline="")
    return FileProductDB(folder, merchant="shop", market="US", **settings)


def same(spark: SparkSession, db: ScannableProductDB, attributes: list[str], **dimensions: str) -> list[Any]:
    """Read both ways, require the same, and give the rows sorted by id."""
    scan = db.scan(attributes, dimensions=dimensions)
    here, there = scan.to_arrow(), scan.to_spark(spark)
    assert there.columns == here.schema.names == ["product_id", *attributes]
    arrow = there.toArrow()
    assert arrow.schema.types == here.schema.types
    rows = arrow.sort_by("product_id").to_pylist()
    assert rows == here.sort_by("product_id").to_pylist()
    return rows


def refused(spark: SparkSession, db: ScannableProductDB, *attributes: str) -> tuple[str, str]:
    """The messages of both ways."""
    messages = []
    reads: list[Callable[[Any], Any]] = [lambda scan: scan.to_arrow(), lambda scan: scan.to_spark(spark)]
    for read in reads:
        with pytest.raises(DataError) as caught:
            read(db.scan(attributes, dimensions={}))
        messages.append(str(caught.value))
    return messages[0], messages[1]


@pytest.mark.parametrize("wanted", [{}, {"locale": "de_DE"}])
def test_adversarial_csv(spark: SparkSession, tmp_path: Path, wanted: dict[str, str]) -> None:
    rows = same(spark, csv_db(tmp_path, ADVERSARIAL), ["title", "we`ird. name"], **wanted)
    assert len(rows) == 8
    titles = {row["product_id"]: row["title"] for row in rows}
    assert titles["a"] == ("line\r\nbreak\n" if wanted else 'x, "y"')
    assert titles["b"] == "  spaces  " and titles["c"] == '5" pipe'
    assert titles["e\u0301"] == "nfd" and titles["\u00e9"] == "nfc"
    assert titles["#d"] == ("\u200b" if wanted else None)


def test_parts_without_rows_and_an_empty_catalog(spark: SparkSession, tmp_path: Path) -> None:
    assert same(spark, csv_db(tmp_path, "product_id,title\n"), ["title"]) == []
    folder = tmp_path / "parts [1] {x}" / "shop_US.csv"
    folder.mkdir(parents=True)
    (folder / "1.csv").write_text("product_id,title\n")
    (folder / "2.csv").write_text("title,product_id\na,1\n")
    db = FileProductDB(folder.parent, merchant="shop", market="US")
    assert same(spark, db, ["title"]) == [{"product_id": "1", "title": "a"}]
    assert same(spark, db, []) == [{"product_id": "1"}]


@pytest.mark.parametrize(
    "text",
    [
        "product_id,title\n1,a\n2\n",
        'product_id,title\n1,a\n2,"b\n',
        "product_id,title\n1,a\n1,b\n2,c\n2,d\n2,e\n",
        "id,title\n1,a\n",
        "product_id,name\n1,a\n",
    ],
)
def test_the_same_words_for_bad_csv(spark: SparkSession, tmp_path: Path, text: str) -> None:
    here, there = refused(spark, csv_db(tmp_path, text), "title")
    assert here == there


def test_bytes_that_are_no_text(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "shop_US.csv").write_bytes(b"product_id,title\n1,caf\xe9\n")
    here, there = refused(spark, FileProductDB(tmp_path, merchant="shop", market="US"), "title")
    assert here == there and "line 2: byte 0xe9" in there


def test_rows_without_id(spark: SparkSession, tmp_path: Path) -> None:
    here, there = refused(spark, csv_db(tmp_path, "product_id,title\n1,a\n ,b\n,c\n"), "title")
    assert "2 rows have no product_id (line 3, line 4)" in here
    assert "2 rows have no product_id" in there


def test_the_last_row_wins_across_parts(spark: SparkSession, tmp_path: Path) -> None:
    parts = {"1": [("a", "old"), ("b", "1"), ("b", "2")], "2": [("c", "x"), ("a", None)]}
    for ending in ("csv", "parquet"):
        folder = tmp_path / ending / f"shop_US.{ending}"
        folder.mkdir(parents=True)
        for name, rows in parts.items():
            if ending == "csv":
                lines = [f"{product_id},{title or ''}" for product_id, title in rows]
                (folder / f"{name}.csv").write_text("\n".join(["product_id,title", *lines]))
            else:
                ids, titles = zip(*rows, strict=True)
                pq.write_table(pa.table({"product_id": ids, "title": titles}), folder / f"{name}.parquet")
        db = FileProductDB(tmp_path / ending, merchant="shop", market="US", duplicates="keep_last")
        assert same(spark, db, ["title"]) == [
            {"product_id": "a", "title": None},
            {"product_id": "b", "title": "2"},
            {"product_id": "c", "title": "x"},
        ]


def native() -> pa.Table:
    return pa.table(
        {
            "product_id": pa.array([3, 1, 2], pa.int32()),
            "title": ["c", BLANKS, None],
            "title[locale:de_DE]": ["\u200b", "x", ""],
            "price": [1.5, None, -0.0],
            "tags": pa.array([["x", None], [], None], pa.list_(pa.string())),
            "stock": pa.array([1, None, 3], pa.int64()),
        }
    )


@pytest.mark.parametrize("wanted", [{}, {"locale": "de_DE"}])
def test_parquet(spark: SparkSession, tmp_path: Path, wanted: dict[str, str]) -> None:
    folder = tmp_path / "a b [c]"
    folder.mkdir()
    pq.write_table(native(), folder / "shop_US.parquet")
    db = FileProductDB(f"file:{folder}", merchant="shop", market="US")
    same(spark, db, ["title", "price", "stock"], **wanted)
    scan = db.scan(["tags"], dimensions={})
    there = {row["product_id"]: row["tags"] for row in scan.to_spark(spark).collect()}
    assert there == dict(zip(*scan.to_arrow().to_pydict().values(), strict=True))


@pytest.mark.parametrize("wanted", [{}, {"locale": "de_DE"}])
def test_delta(spark: SparkSession, tmp_path: Path, wanted: dict[str, str]) -> None:
    table = native()
    for merchant in ("shop", "o'ther"):
        owned = table.append_column("merchant", pa.array([merchant] * len(table), pa.string()))
        write_deltalake(tmp_path / "t", owned, partition_by=["merchant"], mode="append")
    for merchant in ("shop", "o'ther"):
        db = DeltaProductDB(tmp_path / "t", merchant=merchant, market="US")
        assert len(same(spark, db, ["title", "price", "stock"], **wanted)) == 3
    with pytest.raises(ConfigError, match="no rows of 'nobody'"):
        DeltaProductDB(tmp_path / "t", merchant="nobody", market="US").scan([], dimensions={}).to_spark(spark)


def test_a_delta_scan_stays_at_its_version(spark: SparkSession, tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"product_id": ["1"], "n": [1]}))
    db = DeltaProductDB(tmp_path / "t", merchant="shop", market="US")
    scan = db.scan(["n"], dimensions={})
    write_deltalake(tmp_path / "t", pa.table({"product_id": ["1"], "n": [2]}), mode="append")
    assert scan.to_spark(spark).collect() == [("1", 1)]
    here, there = refused(spark, db, "n")
    assert here == there
    newest = DeltaProductDB(
        tmp_path / "t", merchant="shop", market="US", duplicates="keep_last", order_by="n"
    )
    assert same(spark, newest, ["n"]) == [{"product_id": "1", "n": 2}]
    write_deltalake(tmp_path / "t", pa.table({"product_id": ["1"], "n": [2]}), mode="append")
    here, there = refused(spark, newest, "n")
    assert here == there


def test_an_id_with_more_than_one_spelling(spark: SparkSession, tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": [1.0]}), tmp_path / "shop_US.parquet")
    here, there = refused(spark, FileProductDB(tmp_path, merchant="shop", market="US"))
    assert here == there


def test_products_in_memory(spark: SparkSession) -> None:
    same(spark, InMemoryProductDB({"1": {"title": "a"}, "2": {"title": " "}}), ["title"])
    same(spark, InMemoryProductDB({}), ["title"])
