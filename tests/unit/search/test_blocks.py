from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import QueryBuilder, write_deltalake

from featurekit_spark.errors import CacheError
from featurekit_spark.search import MatrixRef, MatrixStore
from featurekit_spark.search import matrix as module
from featurekit_spark.search.blocks import block_ranges, read_parts, stored_blocks

DIM = 4


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MatrixStore:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 3 * 4 * DIM)  # three rows a block
    return MatrixStore(tmp_path / "matrices")


def vectors(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, DIM), dtype=np.float32)


def named(rows: int) -> list[str]:
    return [f"p{i:03}" for i in range(rows)]


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("rows", [0, 1, 3, 10, 12])
def test_parts_are_the_matrix(store: MatrixStore, rows: int, storage: str) -> None:
    store.put(named(5), vectors(5))  # somebody else's blocks
    ref = store.put(named(rows), vectors(rows), storage=storage)
    whole = store.open(ref)
    for part_bytes in (1, 7 * 4 * DIM, 10**6):
        at = 0
        for part in read_parts(store, ref, part_bytes=part_bytes):
            assert part.start == at
            at += len(part.ids)
            assert list(part.ids) == named(rows)[part.start : at]
            assert part.vectors.tobytes() == np.asarray(whole.vectors)[part.start : at].tobytes()
        assert at == rows


def test_parts_are_of_about_one_size_and_as_many_for_every_slot(store: MatrixStore) -> None:
    ref = store.put(named(30), vectors(30))  # ten blocks
    assert block_ranges(store, ref, part_bytes=10**6) == [(0, 10)]
    assert block_ranges(store, ref, part_bytes=10**6, least=3) == [(0, 3), (3, 6), (6, 10)]
    assert len(block_ranges(store, ref, part_bytes=200, least=2)) == 4  # three would leave a slot idle
    assert len(block_ranges(store, ref, part_bytes=1, least=4)) == 10


def test_a_block_that_was_written_twice_counts_once(store: MatrixStore, tmp_path: Path) -> None:
    other = MatrixStore(tmp_path / "matrices")
    other._has = lambda ref: False  # type: ignore[method-assign]  # as if both had looked before one wrote
    ref = store.put(named(7), vectors(7))
    other.put(named(7), vectors(7))
    parts = list(read_parts(store, ref, part_bytes=1))
    assert [member for part in parts for member in part.ids] == named(7)


def test_the_vectors_of_a_file_of_one_row_group_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: MatrixStore
) -> None:
    ref = store.put(named(30), vectors(30))
    blocks = sorted(stored_blocks(store, ref.hash), key=lambda row: int(row["block"]))
    old = pa.table(
        {
            "hash": [ref.hash] * 10,
            "block": pa.array(range(10), pa.int32()),
            "ids": pa.array([row["ids"] for row in blocks], pa.list_(pa.string())),
            "vectors": pa.array([row["vectors"].to_pybytes() for row in blocks], pa.binary()),
        }
    )
    former = MatrixStore(tmp_path / "former")
    write_deltalake(former.path, old, partition_by=["hash"])
    asked, execute = [], QueryBuilder.execute

    def recorded(self: QueryBuilder, sql: str) -> Any:
        asked.append(sql)
        return execute(self, sql)

    monkeypatch.setattr(QueryBuilder, "execute", recorded)
    parts = list(read_parts(former, ref, part_bytes=1))
    assert np.concatenate([part.vectors for part in parts]).tobytes() == vectors(30).tobytes()
    assert [member for part in parts for member in part.ids] == named(30) and len(parts) == 10
    assert asked and not any("vectors" in query for query in asked)


def test_a_matrix_that_is_gone_is_told(store: MatrixStore) -> None:
    with pytest.raises(CacheError, match="is not in"):
        list(read_parts(store, MatrixRef("0" * 32, 3, DIM, "hash=0"), part_bytes=1))
