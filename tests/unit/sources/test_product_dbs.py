"""What only files or only Delta tables have: versions, names, bad rows, duplicates, native types."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from featurekit_spark.errors import ConfigError, DataError, ServiceError, UsageError
from featurekit_spark.sources import catalog as catalog_module
from featurekit_spark.sources import files as files_module
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.sources.memory import InMemoryProductDB


def csv_db(folder: Path, text: str, **settings: str) -> FileProductDB:
    (folder / "shop_US.csv").write_text(text, encoding="utf-8", newline="")
    return FileProductDB(folder, merchant="shop", market="US", **settings)  # type: ignore[arg-type]


def read(db: FileProductDB | DeltaProductDB, *attributes: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = db.scan(attributes, dimensions={}).to_arrow().to_pylist()
    return rows


# -- finding files -------------------------------------------------------------------------------------


def test_a_missing_catalog_names_those_that_are_near(tmp_path: Path) -> None:
    for name in ("abt_US.csv", "buy_US.parquet", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"no abtt_US\.csv or .* It has .*\babt_US\b"):
        FileProductDB(tmp_path, merchant="abtt", market="US").version()
    with pytest.raises(ConfigError, match="there is no such folder"):
        FileProductDB(tmp_path / "nowhere", merchant="abt", market="US").version()
    with pytest.raises(ConfigError, match="must be a mounted path"):
        FileProductDB("s3://bucket/catalogs", merchant="abt", market="US").version()


def test_two_formats_of_one_catalog_are_refused(tmp_path: Path) -> None:
    for ending in ("csv", "parquet"):
        (tmp_path / f"abt_US.{ending}").touch()
    with pytest.raises(ConfigError, match=r"both 'abt_US\.csv' and 'abt_US\.parquet'"):
        FileProductDB(tmp_path, merchant="abt", market="US").version()


@pytest.mark.parametrize("merchant", ["../x", "a/b", ".hidden", "", "a" * 65, "a\n", "ä"])
def test_no_name_leaves_the_folder(tmp_path: Path, merchant: str) -> None:
    with pytest.raises(UsageError, match="merchant"):
        FileProductDB(tmp_path, merchant=merchant, market="US").version()


def test_a_folder_without_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shop_US.parquet").mkdir()
    (tmp_path / "shop_US.parquet" / "_SUCCESS").touch()
    with pytest.raises(ConfigError, match=r"holds no \*\.parquet files"):
        FileProductDB(tmp_path, merchant="shop", market="US").version()


# -- versions ------------------------------------------------------------------------------------------


def test_a_version_changes_with_the_file_and_only_then(tmp_path: Path) -> None:
    db = csv_db(tmp_path, "product_id,title\n1,a\n")
    before = db.version()
    assert before == FileProductDB(str(tmp_path), merchant="shop", market="US").version()
    stat = (tmp_path / "shop_US.csv").stat()
    (tmp_path / "new").write_text("product_id,title\n1,b\n")
    (tmp_path / "new").rename(tmp_path / "shop_US.csv")
    # Same size and modification time, as `cp --preserve` leaves them.
    os.utime(tmp_path / "shop_US.csv", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert db.version() != before
    assert read(db, "title") == [{"product_id": "1", "title": "b"}]


def test_a_new_part_is_a_new_version(tmp_path: Path) -> None:
    folder = tmp_path / "shop_US.csv"
    folder.mkdir()
    (folder / "1.csv").write_text("product_id\n1\n")
    db = FileProductDB(tmp_path, merchant="shop", market="US")
    before = db.version()
    (folder / "2.csv").write_text("product_id\n2\n")
    assert db.version() != before


def test_asking_for_the_version_loads_nothing_heavy(tmp_path: Path) -> None:
    csv_db(tmp_path, "product_id\n")
    code = (
        "import sys; from featurekit_spark.sources.files import FileProductDB as F;"
        f"F({str(tmp_path)!r}, merchant='shop', market='US').version();"
        "print([m for m in ('pyarrow', 'pandas', 'deltalake', 'pyspark') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_is_loaded_once_per_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    real = files_module.read_tables

    def counting(path: Path, names: Sequence[str]) -> Iterator[Any]:
        loads.append(path)
        return real(path, names)

    monkeypatch.setattr(files_module, "read_tables", counting)
    db = csv_db(tmp_path, "product_id,title\n1,a\n")
    for _ in range(3):
        asyncio.run(db.get_products({"title"}, {"1"}))
    assert len(loads) == 1
    csv_db(tmp_path, "product_id,title\n1,changed\n")
    assert asyncio.run(db.get_products({"title"}, {"1"})) == {"1": {"title": {(): "changed"}}}
    assert len(loads) == 2


def test_few_catalogs_are_kept(tmp_path: Path) -> None:
    db = csv_db(tmp_path, "product_id," + ",".join(f"a{i}" for i in range(9)) + "\n")
    for i in range(9):
        asyncio.run(db.get_products({f"a{i}"}))
    assert len(catalog_module._loaded) <= catalog_module.KEPT


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    db = csv_db(tmp_path, "product_id,title\n1,a\n")
    scan = db.scan(["title"], dimensions={})
    csv_db(tmp_path, "product_id,title\n1,a\n2,b\n")
    with pytest.raises(ServiceError, match="changed while it was read"):
        scan.to_arrow()


# -- bad rows and duplicates ---------------------------------------------------------------------------


def test_a_missing_column_names_file_and_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shop_US\.csv: no column 'product_id'; .* 'id', 'title'"):
        read(csv_db(tmp_path, "id,title\n1,a\n"), "title")
    assert read(csv_db(tmp_path, "id,title\n1,a\n", id_column="id"), "title")[0]["product_id"] == "1"


def test_every_part_must_have_the_columns(tmp_path: Path) -> None:
    folder = tmp_path / "shop_US.csv"
    folder.mkdir()
    (folder / "1.csv").write_text("product_id,title\n1,a\n")
    (folder / "2.csv").write_text("title,product_id\nb,2\n")
    db = FileProductDB(tmp_path, merchant="shop", market="US")
    assert read(db, "title")[1] == {"product_id": "2", "title": "b"}
    (folder / "3.csv").write_text("product_id\n3\n")
    with pytest.raises(DataError, match=r"3\.csv: no column 'title'"):
        read(db, "title")


def test_rows_without_id_are_named_by_line(tmp_path: Path) -> None:
    text = 'product_id,title\n1,"a\nb"\n,c\n2,d\n \u00a0,e\n'
    with pytest.raises(DataError, match=r"2 rows have no product_id \(line 4, line 6\)"):
        read(csv_db(tmp_path, text), "title")


def test_rows_without_id_are_named_by_part(tmp_path: Path) -> None:
    folder = tmp_path / "shop_US.parquet"
    folder.mkdir()
    pq.write_table(pa.table({"product_id": ["1", "2"]}), folder / "1.parquet")
    pq.write_table(pa.table({"product_id": ["3", None]}), folder / "2.parquet")
    with pytest.raises(DataError, match=r"1 rows have no product_id \(2\.parquet row 2\)"):
        read(FileProductDB(tmp_path, merchant="shop", market="US"))


REPEATED = "product_id,title\nb,1\na,2\nb,3\nc,4\na,5\nb,6\n"


def test_duplicates_are_counted_and_refused(tmp_path: Path) -> None:
    message = r"2 product_ids are there more than once \(3 rows too many\): 'a', 'b'\."
    with pytest.raises(DataError, match=message):
        read(csv_db(tmp_path, REPEATED), "title")
    with pytest.raises(DataError, match=message):
        asyncio.run(csv_db(tmp_path, REPEATED).get_products({"title"}))


def test_the_last_of_duplicates_may_be_kept(tmp_path: Path) -> None:
    scan = csv_db(tmp_path, REPEATED, duplicates="keep_last").scan(["title"], dimensions={})
    assert dict(zip(*scan.to_arrow().to_pydict().values(), strict=True)) == {"c": "4", "a": "5", "b": "6"}
    assert scan.quality()["duplicates_dropped"] == 3
    assert scan.quality()["rows"] == 6


def test_the_last_row_wins_even_where_it_says_less(tmp_path: Path) -> None:
    db = csv_db(tmp_path, "product_id,title\na,old\na,\n", duplicates="keep_last")
    assert read(db, "title") == [{"product_id": "a", "title": None}]


def test_ids_that_look_alike_stay_apart(tmp_path: Path) -> None:
    ids = ["e\u0301", "\u00e9", "A", "a", "1", "01", " 1", "\u0410", "\u200b1"]
    db = csv_db(tmp_path, "product_id\n" + "\n".join(ids) + "\n")
    assert [row["product_id"] for row in read(db)] == ids


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop_US.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"shop_US\.parquet: cannot be read as Parquet"):
        read(FileProductDB(tmp_path, merchant="shop", market="US"))


# -- types ---------------------------------------------------------------------------------------------


def test_parquet_and_delta_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "product_id": pa.array([1, 2], pa.int64()),
            "title": pa.array(["a", "b"], pa.large_string()),
            "price": [1.5, None],
            "tags": pa.array([["x"], []], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "shop_US.parquet")
    write_deltalake(tmp_path / "delta", table)
    dbs = [
        FileProductDB(tmp_path, merchant="shop", market="US"),
        DeltaProductDB(tmp_path / "delta", merchant="shop", market="US"),
    ]
    for db in dbs:
        found = db.scan(["title", "price", "tags"], dimensions={}).to_arrow()
        assert [str(kind) for kind in found.schema.types[:3]] == ["string", "string", "double"]
        assert found.to_pylist() == [
            {"product_id": "1", "title": "a", "price": 1.5, "tags": ["x"]},
            {"product_id": "2", "title": "b", "price": None, "tags": []},
        ]


def test_an_id_with_more_than_one_spelling_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": [1.0, 2.0]}), tmp_path / "shop_US.parquet")
    with pytest.raises(DataError, match="of type double; it must be a string or an integer"):
        read(FileProductDB(tmp_path, merchant="shop", market="US"))


def test_variants_of_one_attribute_have_one_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": ["1"], "p": [1], "p[l=de]": ["x"]}), tmp_path / "shop_US.parquet")
    with pytest.raises(DataError, match=r"attribute 'p' have different types \(int64, string\)"):
        read(FileProductDB(tmp_path, merchant="shop", market="US"), "p")


def test_mixed_values_in_memory_are_refused() -> None:
    with pytest.raises(DataError, match="'p' has values of different types"):
        InMemoryProductDB({"1": {"p": 1}, "2": {"p": "x"}}).scan(["p"], dimensions={}).to_arrow()


# -- Delta ---------------------------------------------------------------------------------------------


def owned(rows: list[tuple[str, str, str, int]]) -> pa.Table:
    names = ["merchant", "market", "product_id", "n"]
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def test_a_delta_version_is_that_of_the_table(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", owned([("a", "US", "1", 1)]))
    db = DeltaProductDB(tmp_path / "t", merchant="a", market="US")
    assert db.version() == f"delta:{DeltaTable(tmp_path / 't').metadata().id}:0"
    scan = db.scan(["n"], dimensions={})
    write_deltalake(tmp_path / "t", owned([("a", "US", "2", 2)]), mode="append")
    assert db.version().endswith(":1")
    assert scan.to_arrow().to_pylist() == [{"product_id": "1", "n": 1}]


def test_a_merchant_sees_its_own_rows_only(tmp_path: Path) -> None:
    rows = [("a", "US", "1", 1), ("a", "DE", "1", 2), ("b", "US", "1", 3), ("o'b", "US", "1", 4)]
    write_deltalake(tmp_path / "t", owned(rows), partition_by=["merchant", "market"])

    def db(merchant: str, market: str) -> DeltaProductDB:
        return DeltaProductDB(tmp_path / "t", merchant=merchant, market=market)

    assert [read(db(m, k), "n")[0]["n"] for m, k, _, _ in rows] == [1, 2, 3, 4]
    assert 0 < db("a", "US").scan(["n"], dimensions={}).bytes < 4000
    with pytest.raises(ConfigError, match=r"no rows of 'c, US'; it has those of 4 others, such as: a, DE"):
        read(db("c", "US"), "n")


def test_named_columns_must_be_there(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", owned([("a", "US", "1", 1)]))
    with pytest.raises(DataError, match="no column 'shop'"):
        read(DeltaProductDB(tmp_path / "t", merchant="a", market="US", merchant_column="shop"))
    with pytest.raises(ConfigError, match="there is no Delta table"):
        DeltaProductDB(tmp_path / "nothing", merchant="a", market="US").version()


def test_the_last_delta_row_is_told_by_a_column(tmp_path: Path) -> None:
    rows = [("a", "US", "1", 2), ("a", "US", "1", 3), ("a", "US", "1", 1), ("a", "US", "2", 1)]
    write_deltalake(tmp_path / "t", owned(rows))
    with pytest.raises(ConfigError, match="give product_db.order_by"):
        DeltaProductDB(tmp_path / "t", merchant="a", market="US", duplicates="keep_last")
    with pytest.raises(DataError, match=r"1 product_ids are there more than once \(2 rows"):
        read(DeltaProductDB(tmp_path / "t", merchant="a", market="US"))
    db = DeltaProductDB(tmp_path / "t", merchant="a", market="US", duplicates="keep_last", order_by="n")
    assert read(db, "n") == [{"product_id": "1", "n": 3}, {"product_id": "2", "n": 1}]
    write_deltalake(tmp_path / "t", owned([("a", "US", "1", 3)]), mode="append")
    with pytest.raises(DataError, match="1 duplicate rows are as new as"):
        read(db, "n")
