"""The recommendations table itself: its schema, its commits, and writers side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake
from deltalake.exceptions import CommitFailedError

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.sinks import DeltaSink, Publication
from featurekit_spark.sinks.delta import recommendations_schema

Publish = Callable[..., Publication]

WRITER = """
import sys
from datetime import UTC, datetime
import pyarrow as pa
from featurekit_spark.sinks import DeltaSink, Publication
path, market = sys.argv[1:]
for number in range(8):
    rows = pa.table({"product_id": ["1"], "logic_builder": ["L"], "recs": [[str(number)]],
                     "scores": pa.nulls(1, pa.list_(pa.float32()))})
    DeltaSink(path).publish(Publication("abt", market, f"run-{number}", datetime.now(UTC), ("L",), rows))
"""


def rows(path: Path, version: int | None = None) -> list[dict[str, object]]:
    table = DeltaTable(path, version=version)
    found = QueryBuilder().register("t", table).execute("SELECT * FROM t ORDER BY market, product_id")
    return pa.table(found.read_all()).to_pylist()


def test_columns_types_and_protocol(tmp_path: Path, publication: Publish) -> None:
    DeltaSink(str(tmp_path / "r")).publish(publication("run-1", {"1": ["2"]}))
    table = DeltaTable(tmp_path / "r")
    assert pa.schema(table.schema().to_arrow()) == recommendations_schema()
    assert table.metadata().partition_columns == ["merchant", "market"]
    protocol = table.protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    assert rows(tmp_path / "r") == [
        {
            "merchant": "abt",
            "market": "US",
            "product_id": "1",
            "logic_builder": "Main",
            "recs": ["2"],
            "scores": [0.5],
            "ts": datetime(2026, 1, 1, 1, tzinfo=UTC),
            "run_id": "run-1",
        }
    ]


def test_an_empty_result_makes_a_typed_table(tmp_path: Path, publication: Publish) -> None:
    DeltaSink(str(tmp_path / "r")).publish(publication("run-1", {}))
    assert pa.schema(DeltaTable(tmp_path / "r").schema().to_arrow()) == recommendations_schema()
    assert rows(tmp_path / "r") == []


def test_a_replacement_is_one_commit_and_history_stays(tmp_path: Path, publication: Publish) -> None:
    sink = DeltaSink(str(tmp_path / "r"))
    sink.publish(publication("run-1", {"1": ["2"], "2": ["1"]}))
    version = DeltaTable(sink.path).version()
    sink.publish(publication("run-2", {"3": ["1"]}))
    assert DeltaTable(sink.path).version() == version + 1
    assert [row["product_id"] for row in rows(tmp_path / "r", version)] == ["1", "2"]
    assert [row["product_id"] for row in rows(tmp_path / "r")] == ["3"]


def test_processes_that_replace_different_markets_both_succeed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), market]) for market in ("US", "NO")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert [(row["market"], row["recs"]) for row in rows(path)] == [("NO", ["7"]), ("US", ["7"])]
    assert DeltaTable(path).version() == 16


@pytest.mark.parametrize("losses", [2, 99])
def test_a_lost_commit_is_tried_again(
    tmp_path: Path, publication: Publish, monkeypatch: pytest.MonkeyPatch, losses: int
) -> None:
    tries = 0

    def sometimes(*args: object, **options: object) -> None:
        nonlocal tries
        tries += 1
        if tries <= losses:
            raise CommitFailedError("somebody was faster")
        write_deltalake(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("featurekit_spark.sinks.delta.write_deltalake", sometimes)
    monkeypatch.setattr("featurekit_spark.sinks.delta.time.sleep", lambda seconds: None)
    sink = DeltaSink(str(tmp_path / "r"))
    if losses == 2:
        assert sink.publish(publication("run-1", {"1": ["2"]})).rows == 1
    else:
        with pytest.raises(ServiceError, match=r"Lost 5 commits to .* Last: somebody was faster"):
            sink.publish(publication("run-1", {"1": ["2"]}))


def test_a_path_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.csv").touch()
    (tmp_path / "file").touch()
    write_deltalake(tmp_path / "other", pa.table({"a": [1]}))
    with pytest.raises(ConfigError, match="holds files and no Delta table"):
        DeltaSink(str(tmp_path / "files")).check()
    with pytest.raises(ConfigError, match="is a file"):
        DeltaSink(str(tmp_path / "file")).check()
    with pytest.raises(ConfigError, match="is another table: it has a, partitioned by nothing"):
        DeltaSink(str(tmp_path / "other")).check()


def test_a_damaged_table_is_a_service_error(tmp_path: Path, publication: Publish) -> None:
    sink = DeltaSink(str(tmp_path / "r"))
    sink.publish(publication("run-1", {"1": ["2"]}))
    for file in (tmp_path / "r").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(ServiceError, match="cannot be read"):
        sink.state("abt", "US")


def test_relative_paths_and_file_uris_are_one_table(
    tmp_path: Path, publication: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    DeltaSink("w/r").publish(publication("run-1", {"1": ["2"]}))
    assert DeltaSink(f"file://{tmp_path}/w/r").state("abt", "US") is not None
