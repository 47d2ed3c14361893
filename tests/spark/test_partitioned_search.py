"""Search on Spark, part by part, equals one search in memory; so do the values, hashes and entries of a run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featurekit_spark.errors import ContextError
from featurekit_spark.locks import table_lock
from featurekit_spark.search import FlatIndex, MatrixStore, ivf_spark
from featurekit_spark.search import matrix as module
from featurekit_spark.search.blocks import stored_blocks
from featurekit_spark.search.choice import search_stored
from featurekit_spark.search.ivf import IVFParams, build_index, list_lengths, open_index
from featurekit_spark.search.ivf_spark import build_index_on, search_index_on
from featurekit_spark.search.partitioned import search_blocks
from featurekit_spark.search.removal import matrices_with, remove_matrices

pytestmark = pytest.mark.spark
ROWS, DIM = 500, 16
IDS = [f"p{i:04}" for i in range(ROWS)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MatrixStore:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 30 * 4 * DIM)  # 30 rows a block
    return MatrixStore(tmp_path / "matrices")


def vectors(rows: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    found = random.integers(-2, 3, (rows, DIM)) + 0.01 * random.standard_normal((rows, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def expected(matrix: Any, queries: Any, k: int, **options: Any) -> dict[str, list[tuple[str, float]]]:
    scores, rows = FlatIndex(matrix, ids=IDS[: len(matrix)]).search(queries, k, **options)
    exact = np.round(scores.astype(np.float64), 6)
    return {
        f"q{i:02}": [(IDS[row], score) for row, score in zip(*own, strict=True) if row >= 0]
        for i, own in enumerate(zip(rows.tolist(), exact.tolist(), strict=True))
    }


def shown(frame: Any) -> dict[str, list[tuple[str, float]]]:
    rows = frame.toArrow().to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: [(hit["product_id"], hit["score"]) for hit in row["hits"]] for row in rows}


def frame(spark: Any, queries: Any, *, as_bytes: bool = False, **columns: Any) -> Any:
    keys = pa.array([f"q{i:02}" for i in range(len(queries))], pa.string())
    own = [row.tobytes() for row in queries] if as_bytes else [row.tolist() for row in queries]
    kind = pa.binary() if as_bytes else pa.list_(pa.float32())
    return spark.createDataFrame(pa.table({"key": keys, "vector": pa.array(own, kind), **columns}))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_equal_to_one_search(spark: Any, store: MatrixStore, as_bytes: bool) -> None:
    matrix, queries = vectors(ROWS, 1), vectors(20, 2)
    ref = store.put(IDS, matrix)
    asked = frame(spark, queries, as_bytes=as_bytes)
    for part_bytes, least in ((10**9, 3), (70 * 4 * DIM, 1)):
        found = search_blocks(asked, store, ref, 7, part_bytes=part_bytes, least_parts=least)
        assert shown(found) == expected(matrix, queries, 7)


def test_exclusions_masks_and_k_beyond_the_rows(spark: Any, store: MatrixStore) -> None:
    matrix, queries = vectors(40, 3), vectors(6, 4)
    ref = store.put(IDS[:40], matrix)
    left_out = [[IDS[0], IDS[35]], [], None, ["nobody"], [IDS[5]], IDS[:39]]
    rows = [[IDS.index(member) for member in own or () if member in IDS] for own in left_out]
    asked = frame(spark, queries, exclude=pa.array(left_out, pa.list_(pa.string())))
    options = {"part_bytes": 30 * 4 * DIM}
    assert shown(search_blocks(asked, store, ref, 50, **options)) == expected(
        matrix, queries, 50, exclude=rows
    )
    mask = np.random.default_rng(5).random((2, 40)) < 0.5
    groups = [0, 1, 0, 1, 1, 0]
    asked = frame(spark, queries, group=pa.array(groups, pa.int32()))
    found = search_blocks(asked, store, ref, 9, mask=mask, **options)
    assert shown(found) == expected(matrix, queries, 9, mask=mask, groups=np.array(groups))


def test_an_empty_matrix_and_no_queries(spark: Any, store: MatrixStore) -> None:
    ref = store.put([], np.empty((0, DIM), np.float32))
    assert shown(search_blocks(frame(spark, vectors(2, 1)), store, ref, 3)) == {"q00": [], "q01": []}
    ref = store.put(IDS, vectors(ROWS, 1))
    assert shown(search_blocks(frame(spark, vectors(0, 1)), store, ref, 3)) == {}


def test_all_lists_probed_are_an_exact_search(spark: Any, store: MatrixStore) -> None:
    matrix, queries = vectors(ROWS, 6), vectors(20, 7)
    index = build_index(store, store.put(IDS, matrix), IVFParams(lists=12))
    asked = frame(spark, queries)
    for spread in (1, 3):
        found = search_index_on(asked, store, index, 8, nprobe=12, partitions=3, spread=spread)
        assert shown(found) == expected(matrix, queries, 8)


def test_an_index_made_by_jobs_is_the_one_made_here(
    spark: Any, store: MatrixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivf_spark, "_SAMPLED", 60 * 4 * DIM)  # three jobs for the sample
    other, params = MatrixStore(tmp_path / "other"), IVFParams(lists=9, sample=20)
    made = []
    for own in (store, other):
        ref = own.put(IDS, vectors(ROWS, 6))
        index = (
            build_index(own, ref, params)
            if own is store
            else build_index_on(spark, own, ref, params, part_bytes=9000)
        )
        rows = sorted(stored_blocks(own, index.hash), key=lambda row: int(row["block"]))
        made.append([(row["block"], row["ids"], row["vectors"].to_pybytes()) for row in rows])
    assert made[0] == made[1]
    assert len({block for block, _, _ in made[0]}) > 5


def test_the_table_is_not_locked_while_jobs_make_an_index(
    spark: Any, store: MatrixStore, tmp_path: Path
) -> None:
    ref, params = store.put(IDS, vectors(ROWS, 6)), IVFParams(lists=3)
    folder = tmp_path / "matrices" / f"hash={params.hash(ref)}"
    with ThreadPoolExecutor(1) as pool:
        with table_lock(store.path):  # as another run that commits
            made = pool.submit(build_index_on, spark, store, ref, params)
            deadline = time.monotonic() + 120
            while not list(folder.glob("*/_SUCCESS")) and time.monotonic() < deadline and not made.done():
                time.sleep(0.05)
            written = list(folder.glob("*/_SUCCESS"))
            assert open_index(store, ref, params) is None
        index = made.result()
    assert written
    assert list_lengths(store, index).sum() == ROWS
    assert matrices_with(store.path, IDS[7:8]) == {ref.hash, index.hash}
    remove_matrices(store.path, [index.hash])
    assert open_index(store, ref, params) is None and not list(folder.rglob("*.parquet"))


def test_what_a_job_fails_at_is_told_once(spark: Any, store: MatrixStore) -> None:
    ref = store.put(IDS, vectors(ROWS, 1))
    with pytest.raises(ContextError, match="queries have 3 dimensions"):
        search_stored(store.on_spark(spark), ref, np.ones((2, 3), np.float32), 1)
