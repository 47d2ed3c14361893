from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from featurekit_spark.errors import UsageError
from featurekit_spark.locks import table_lock
from featurekit_spark.search import FlatIndex, MatrixStore, ivf
from featurekit_spark.search import matrix as module
from featurekit_spark.search.ivf import (
    IVFParams,
    build_index,
    chosen_rows,
    list_lengths,
    list_sums,
    open_index,
    pieces,
    search_index,
    train,
)
from featurekit_spark.search.removal import matrices_with, remove_matrices

DIM = 12


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MatrixStore:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_BLOCK_BYTES", 40 * 4 * DIM)
    monkeypatch.setattr(ivf, "_BLOCK_BYTES", 25 * 4 * DIM)
    return MatrixStore(tmp_path / "matrices")


def clustered(rows: int, seed: int, *, clusters: int = 10) -> Any:
    random = np.random.default_rng(seed)
    centers = random.standard_normal((clusters, DIM)) * 3
    found = centers[random.integers(0, clusters, rows)] + random.standard_normal((rows, DIM)) * 0.5
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def named(rows: int) -> list[str]:
    return [f"p{i:05}" for i in np.random.default_rng(rows).permutation(rows)]


@pytest.mark.parametrize("lists", [1, 7, 40])
@pytest.mark.parametrize("kind", ["clustered", "equal"])
def test_all_lists_probed_are_an_exact_search(store: MatrixStore, lists: int, kind: str) -> None:
    vectors = clustered(300, 1) if kind == "clustered" else np.repeat(clustered(1, 1), 300, axis=0)
    ids, queries = named(300), clustered(30, 2)
    index = build_index(store, store.put(ids, vectors), IVFParams(lists=lists), part_bytes=5000)
    found = search_index(store, index, queries, 9, nprobe=lists)
    scores, rows = FlatIndex(vectors, ids=ids).search(queries, 9)
    assert found.ids.tolist() == [[ids[row] for row in own] for own in rows.tolist()]
    np.testing.assert_array_equal(found.scores.astype(np.float32), scores)


def test_more_probes_find_more_and_few_find_most(store: MatrixStore) -> None:
    vectors, queries = clustered(2000, 3, clusters=20), clustered(50, 3, clusters=20)
    index = build_index(store, store.put(named(2000), vectors), IVFParams(lists=20))
    exact = search_index(store, index, queries, 10, nprobe=20)
    recall = []
    for nprobe in (1, 4, 20):
        found = search_index(store, index, queries, 10, nprobe=nprobe)
        pairs = zip(found.ids.tolist(), exact.ids.tolist(), strict=True)
        recall.append(np.mean([len(set(own) & set(best)) / 10 for own, best in pairs]))
    assert recall == sorted(recall) and recall[1] > 0.9 and recall[-1] == 1.0


def test_an_index_is_made_once_and_is_the_same_everywhere(store: MatrixStore, tmp_path: Path) -> None:
    ref = store.put(named(200), clustered(200, 4))
    assert open_index(store, ref, IVFParams()) is None
    index = build_index(store, ref, IVFParams(), part_bytes=3000)
    version = DeltaTable(store.path).version()
    assert build_index(store, ref, IVFParams()).hash == index.hash
    assert DeltaTable(store.path).version() == version
    other = MatrixStore(tmp_path / "other")
    again = build_index(other, other.put(named(200), clustered(200, 4)), IVFParams())
    assert again.centroids.tobytes() == index.centroids.tobytes() and again.hash == index.hash


def test_every_part_of_an_index_is_in_its_name(store: MatrixStore) -> None:
    ref = store.put(named(50), clustered(50, 5))
    other = store.put(named(50), clustered(50, 6))
    given = [
        IVFParams(),
        IVFParams(lists=3),
        IVFParams(sample=9),
        IVFParams(iterations=1),
        IVFParams(seed=1),
        IVFParams(sample_bytes=9999),
    ]
    names = {params.hash(ref) for params in given} | {IVFParams().hash(other)}
    assert len(names) == 7


def test_the_sample_is_bounded_by_its_bytes(store: MatrixStore) -> None:
    ref = store.put(named(500), clustered(500, 5))
    assert len(chosen_rows(ref, IVFParams(lists=5))) == 320
    assert len(chosen_rows(ref, IVFParams(lists=5, sample_bytes=40 * 4 * DIM))) == 40
    assert len(chosen_rows(ref, IVFParams(lists=5, sample_bytes=0))) == 5  # a centroid each
    index = build_index(store, ref, IVFParams(lists=5, sample_bytes=40 * 4 * DIM), part_bytes=3000)
    assert len(index.centroids) == 5 and list_lengths(store, index).sum() == 500


def test_the_table_is_not_locked_while_an_index_is_written(
    store: MatrixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, taken = store.put(named(200), clustered(200, 4)), []

    def other(*given: Any) -> Any:
        with table_lock(store.path, timeout_s=1):
            taken.append(1)
        return pieces(*given)

    monkeypatch.setattr(ivf, "pieces", other)
    assert list_lengths(store, build_index(store, ref, IVFParams(lists=3))).sum() == 200
    assert len(taken) == 3


def test_training_takes_a_few_times_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "_TRAINED", 500)
    sample = np.random.default_rng(3).standard_normal((40_000, 128), dtype=np.float32)
    tracemalloc.start()
    try:
        train(sample, 4, iterations=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * sample.nbytes


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_sums_do_not_depend_on_how_many_rows_are_added_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivf, "_TRAINED", at_once)
    rows, nearest = clustered(90, 2), np.random.default_rng(2).integers(0, 7, 90) + 1
    sums = list_sums(rows, nearest, 9)
    expected = [rows[nearest == number].astype(np.float64).sum(axis=0) for number in range(9)]
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_an_empty_matrix_has_an_index(store: MatrixStore) -> None:
    index = build_index(store, store.put([], np.empty((0, DIM), np.float32)), IVFParams())
    assert search_index(store, index, clustered(2, 1), 3, nprobe=2).ids.tolist() == [[None] * 3] * 2


def test_no_probes_are_refused(store: MatrixStore) -> None:
    index = build_index(store, store.put(named(9), clustered(9, 1)), IVFParams(lists=2))
    with pytest.raises(UsageError, match="nprobe"):
        search_index(store, index, clustered(1, 1), 3, nprobe=0)


def test_training_does_not_depend_on_lengths_and_keeps_empty_lists() -> None:
    rows = clustered(60, 7)
    longer = rows * np.float32(4)
    assert train(rows, 5).tobytes() == train(longer, 5).tobytes()
    assert train(np.repeat(rows[:1], 20, axis=0), 6).shape == (6, DIM)


def test_what_is_removed_is_removed_from_its_index(store: MatrixStore) -> None:
    ids = named(60)
    ref = store.put(ids, clustered(60, 8))
    index = build_index(store, ref, IVFParams(lists=4))
    held = matrices_with(store.path, [ids[5]])
    assert held == {ref.hash, index.hash}
    remove_matrices(store.path, held)
    assert open_index(store, ref, IVFParams(lists=4)) is None
