"""Failed keys as a table."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from pyarrow import csv, parquet

from featurekit_spark.errors import ConfigError
from featurekit_spark.report.failed import write_rows

ROWS = pa.table(
    {
        "run_id": ["r1"],
        "builder": ["LLMLogic"],
        "product_id": ['a,"b\n'],
        "error": ["=bad"],
        "ts": pa.array([datetime(2026, 1, 1, tzinfo=UTC)], pa.timestamp("us", tz="UTC")),
    }
)


def rows(path: Path) -> list[str]:
    found = QueryBuilder().register("t", DeltaTable(path)).execute("SELECT run_id FROM t").read_all()
    return [str(name) for name in pa.table(found)["run_id"].to_pylist()]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "failed.parquet"
    for _ in range(2):
        write_rows(ROWS, str(path))
    assert parquet.read_table(path).equals(ROWS)
    write_rows(ROWS, str(path.with_suffix(".csv")))
    assert (
        csv.read_csv(
            path.with_suffix(".csv"), parse_options=csv.ParseOptions(newlines_in_values=True)
        ).to_pylist()[0]["product_id"]
        == 'a,"b\n'
    )
    assert sorted(found.name for found in path.parent.iterdir()) == ["failed.csv", "failed.parquet"]


def test_a_delta_table_grows(tmp_path: Path) -> None:
    for _ in range(2):
        write_rows(ROWS, str(tmp_path / "failed"))
    assert rows(tmp_path / "failed") == ["r1", "r1"]


@pytest.mark.parametrize("name", ["failed.csv", "failed.parquet", "failed"])
def test_no_failed_keys_are_an_empty_table(tmp_path: Path, name: str) -> None:
    write_rows(ROWS.slice(0, 0), str(tmp_path / name))
    assert (tmp_path / name).exists()


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file/failed.csv", "file/failed", "nowhere://x/failed.csv"):
        with pytest.raises(ConfigError, match="could not be written to .*Nothing is published yet"):
            write_rows(ROWS, f"{tmp_path}/{name}" if "://" not in name else name)
