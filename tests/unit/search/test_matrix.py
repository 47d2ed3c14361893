from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from featurekit_spark.errors import CacheError, DataError, UsageError
from featurekit_spark.search import FlatIndex, Matrix, MatrixRef, MatrixStore
from featurekit_spark.search import matrix as module
from featurekit_spark.search.ids import Ids
from featurekit_spark.search.rounded import STORAGES, as_rows, encode
from featurekit_spark.search.table import append_matrix, streamed


@pytest.fixture(autouse=True)
def _host_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    module._opened.clear()


@pytest.fixture
def store(tmp_path: Path) -> MatrixStore:
    return MatrixStore(tmp_path / "matrices")


def vectors(rows: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, dim), dtype=np.float32)


def named(rows: int) -> list[str]:
    return [f"p-{i:05d}" for i in range(rows)]


def test_what_is_put_is_opened(store: MatrixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    ref = store.put(named(100), vectors(100))
    assert (ref.rows, ref.dim) == (100, 8)
    matrix = store.open(asdict(ref))
    assert matrix.ids == tuple(named(100))
    assert matrix.vectors.tobytes() == vectors(100).tobytes()
    assert not matrix.vectors.flags.writeable
    assert matrix.ids[42] == "p-00042"
    assert (Path(store.path) / ref.path).is_dir()


def test_equal_content_is_stored_once(store: MatrixStore) -> None:
    ref = store.put(named(3), vectors(3))
    assert store.put(named(3), vectors(3)) == ref
    assert DeltaTable(store.path).version() == 1  # after that which made the table
    assert store.put(named(3), vectors(3) + 1) != ref
    assert store.put(["x", "y", "z"], vectors(3)) != ref
    assert DeltaTable(store.path).version() == 3
    protocol = DeltaTable(store.path).protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)


def test_an_empty_matrix(store: MatrixStore) -> None:
    matrix = store.open(store.put([], np.empty((0, 8), np.float32)))
    assert matrix.ids == () and matrix.vectors.shape == (0, 8)
    assert matrix.index.search(vectors(1), 2)[1].tolist() == [[-1, -1]]


def test_another_process_opens_it(store: MatrixStore, tmp_path: Path) -> None:
    ref = store.put(named(5), vectors(5))
    code = (
        "import pickle, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "store, ref = pickle.loads(bytes.fromhex(sys.argv[2]))\n"
        "print(store.open(ref).vectors.tobytes().hex())"
    )
    sent = pickle.dumps((store, ref)).hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), sent], check=True, capture_output=True, text=True
    )
    assert bytes.fromhex(done.stdout.strip()) == vectors(5).tobytes()


def test_two_writers_at_once_leave_the_blocks_twice(store: MatrixStore) -> None:
    ref = store.put(named(5), vectors(5))
    append_matrix(
        store.path, ref.hash, named(5), (vectors(5), None), "float32", block_bytes=module._BLOCK_BYTES
    )
    assert store.open(ref).ids == tuple(named(5))


def test_what_is_gone_is_told(store: MatrixStore) -> None:
    ref = MatrixRef("0" * 32, 1, 8, "hash=0")
    with pytest.raises(CacheError, match="Compute the embedding DB again"):
        store.open(ref)
    store.put(named(1), vectors(1))
    with pytest.raises(CacheError, match="Compute the embedding DB again"):
        store.open(ref)


def test_smaller_types_are_matrices_of_their_own(store: MatrixStore) -> None:
    refs = {storage: store.put(named(900), vectors(900), storage=storage) for storage in STORAGES}
    assert len({ref.hash for ref in refs.values()}) == 3
    for storage, ref in refs.items():
        matrix = store.open(ref)
        assert (matrix.copy.storage, matrix.ids) == (storage, named(900))
        expected = as_rows(*encode(vectors(900), storage))[:]
        assert matrix.vectors[:].tobytes() == expected.tobytes()
        assert np.array_equal(
            matrix.index.search(vectors(3), 7)[1],
            FlatIndex(expected, ids=named(900)).search(vectors(3), 7)[1],
        )
    sizes = [(module.Copies().folder / f"{refs[storage].hash}.matrix").stat().st_size for storage in STORAGES]
    assert sizes == sorted(sizes, reverse=True)


def test_what_a_type_cannot_hold_is_refused_by_its_id(store: MatrixStore) -> None:
    with pytest.raises(DataError, match="zero or not finite: 'large'"):
        store.put(["large", "x"], np.array([[1e6, 0], [1, 1]], np.float32), storage="float16")
    with pytest.raises(DataError, match="zero or not finite: 'small'"):
        store.put(["small", "x"], np.array([[1e-9, 0], [1, 1]], np.float32), storage="float16")
    assert (
        store.open(store.put(["large"], np.array([[1e6, 3]], np.float32), storage="int8")).vectors[0][0] > 9e5
    )
    with pytest.raises(UsageError, match="storage 'int4' is not known. Known: float32, float16, int8"):
        store.put(["x"], vectors(1), storage="int4")


def test_a_table_from_before_there_were_types_is_read_and_written(store: MatrixStore) -> None:
    ref = MatrixStore(f"{store.path}.other").put(named(3), vectors(3))
    old = pa.table(
        {
            "hash": [ref.hash],
            "block": pa.array([0], pa.int32()),
            "ids": pa.array([named(3)], pa.list_(pa.string())),
            "vectors": pa.array([vectors(3).tobytes()], pa.binary()),
        }
    )
    write_deltalake(store.path, old, partition_by=["hash"])
    assert store.put(named(3), vectors(3)) == ref
    assert store.open(ref).vectors.tobytes() == vectors(3).tobytes()
    small = store.put(named(3), vectors(3), storage="int8")
    module._opened.clear()
    assert store.open(small).copy.storage == "int8"
    for path in module.Copies().folder.glob("*.matrix"):
        path.unlink()
    module._opened.clear()
    assert (store.open(ref).copy.storage, store.open(small).copy.storage) == ("float32", "int8")


@pytest.mark.parametrize("backwards", [False, True])
def test_a_file_of_one_row_group_is_read_once(
    store: MatrixStore, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    rows, numbers = vectors(40), np.arange(20)[:: -1 if backwards else 1].tolist()
    ref = MatrixStore(f"{store.path}.other").put(named(40), rows)
    store.put(named(3), vectors(3))
    old = pa.table(
        {
            "hash": [ref.hash] * 20,
            "block": pa.array(numbers, pa.int32()),
            "ids": pa.array([named(40)[2 * i : 2 * i + 2] for i in numbers], pa.list_(pa.string())),
            "vectors": pa.array([rows[2 * i : 2 * i + 2].tobytes() for i in numbers], pa.binary()),
        }
    )
    write_deltalake(store.path, old, mode="append", schema_mode="merge", partition_by=["hash"])
    opened, open_file = [], pq.ParquetFile

    def counted(*arguments: Any, **options: Any) -> Any:
        opened.append(open_file(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(pq, "ParquetFile", counted)
    asked = queries_of(monkeypatch)
    assert store.open(ref).vectors.tobytes() == rows.tobytes()
    assert opened[0].metadata.num_row_groups == 1
    assert len(opened) == (20 if backwards else 1), "once per turn of the order"
    assert [query for query in asked if "vectors" in query.split("FROM")[0]] == []


def test_a_file_that_ends_early_is_no_lack_of_room_for_copies(store: MatrixStore) -> None:
    ref = store.put(named(900), vectors(900))
    (file,) = Path(store.path).glob("hash=*/*.parquet")
    whole = file.read_bytes()
    blocks = streamed(store.path, ref.hash, [0, 1])
    assert len(next(blocks)) == 900 * 8 * 4
    with pytest.raises(CacheError, match="block 1 of matrix .* is not in"):
        next(blocks)
    file.write_bytes(whole[:-9])
    with pytest.raises(CacheError, match="cannot be read"):
        next(streamed(store.path, ref.hash, [0]))
    file.unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        next(streamed(store.path, ref.hash, [0]))


def test_what_changed_is_found_by_the_bytes_of_ids(
    store: MatrixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = vectors(4)
    then = store.put(["b", "ä '", "a", "\U0001f600"], rows)
    now = store.put(["\U0001f600", "new", "ä '", "b"], np.stack([rows[3], rows[2], rows[1], -rows[0]]))
    monkeypatch.setattr(Ids, "__iter__", None)
    change = store.change(then, now)
    assert change.kept == {"\U0001f600": 0, "ä '": 2}
    assert change.fresh.tolist() == [1, 3]


def queries_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that are put to tables from now on."""
    asked, execute = [], QueryBuilder.execute

    def recorded(self: QueryBuilder, sql: str) -> Any:
        asked.append(sql)
        return execute(self, sql)

    monkeypatch.setattr(QueryBuilder, "execute", recorded)
    return asked


def test_few_matrices_stay_open(store: MatrixStore) -> None:
    refs = [store.put(named(n), vectors(n)) for n in range(1, 8)]
    opened: list[Matrix] = [store.open(ref) for ref in refs]
    assert len(module._opened) == module._KEPT_OPEN
    assert store.open(refs[-1]) is opened[-1]
    assert opened[0].vectors.tobytes() == vectors(1).tobytes()


def test_what_could_not_be_searched_is_refused(store: MatrixStore) -> None:
    with pytest.raises(DataError, match="'p-00001'"):
        store.put(named(2), np.array([[1, 0], [0, 0]], dtype=np.float32))
    with pytest.raises(DataError, match="'a' is in the matrix twice"):
        store.put(["a", "a"], vectors(2))
    with pytest.raises(DataError, match="one row per id"):
        store.put(["a"], vectors(2))


def test_a_temporary_store_ends_with_its_process() -> None:
    code = (
        "import numpy as np; from featurekit_spark.search import MatrixStore\n"
        "store = MatrixStore.temporary(); store.put(['a'], np.ones((1, 2), np.float32)); print(store.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip())
    assert path.is_absolute() and not path.exists()
