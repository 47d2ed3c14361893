"""What float16 and int8 make of vectors: bounds of the error, equal bits, searches exact on what is stored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.search import FlatIndex
from featurekit_spark.search.rounded import STORAGES, RoundedRows, as_rows, decode_block, encode, pack, unpack


def draw(seed: int, rows: int, dim: int, scale: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = random.standard_normal((rows, dim)) * np.exp(scale * random.standard_normal((rows, 1)))
    return (found + np.where(found == 0, 1e-3, 0)).astype(np.float32)


matrices = st.builds(
    draw, st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 48), st.sampled_from([0.0, 1.0, 3.0])
)


@given(vectors=matrices, storage=st.sampled_from(STORAGES))
def test_errors_are_within_their_bounds(vectors: np.ndarray, storage: str) -> None:
    read = np.asarray(as_rows(*encode(vectors, storage)), dtype=np.float64)
    exact = vectors.astype(np.float64)
    error = np.sqrt(np.square(read - exact).sum(axis=1))
    norms = np.sqrt(np.square(exact).sum(axis=1))
    largest = np.abs(exact).max(axis=1)
    match storage:
        case "float32":
            assert (error == 0).all()
        case "float16":  # half a unit in the last of 11 bits, or of the smallest number
            bound = np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)
            assert (np.abs(read - exact) <= bound).all()
        case _:
            assert (error <= 1.001 * largest / 127 * np.sqrt(vectors.shape[1])).all()
            lengths = np.sqrt(np.square(read).sum(axis=1))
            np.testing.assert_allclose(lengths, norms, rtol=1e-6)


@given(vectors=matrices, storage=st.sampled_from(STORAGES), at=st.integers(0, 39))
def test_a_row_is_the_same_bits_however_it_is_read(vectors: np.ndarray, storage: str, at: int) -> None:
    values, factors = encode(vectors, storage)
    rows, row = as_rows(values, factors), at % len(vectors)
    alone = as_rows(*encode(vectors[row : row + 1], storage))[:]
    data = bytes(pack(values, factors))
    for found in (
        rows[row : row + 1],
        rows[np.array([row])],
        rows[:][row : row + 1],
        decode_block(data, storage, vectors.shape[1])[row : row + 1],
    ):
        assert found.dtype == np.float32
        assert found.tobytes() == alone.tobytes()


@given(vectors=matrices, storage=st.sampled_from(STORAGES), k=st.integers(1, 12))
def test_a_search_is_exact_on_what_is_stored(vectors: np.ndarray, storage: str, k: int) -> None:
    rows = as_rows(*encode(vectors, storage))
    queries = vectors[:7]
    scores, found = FlatIndex(rows).search(queries, k)
    expected = FlatIndex(np.ascontiguousarray(rows[:])).search(queries, k)
    np.testing.assert_array_equal(found, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_packed_bytes_are_whole_rows() -> None:
    values, factors = encode(np.ones((3, 5), np.float32), "int8")
    data = bytes(pack(values, factors))
    assert len(data) == 3 * (5 + 4)
    again, more = unpack(data, "int8", 5)
    assert np.array_equal(again, values) and np.array_equal(more, factors)
    with pytest.raises(ValueError, match="26 bytes are no whole rows of 9"):
        unpack(data[:-1], "int8", 5)


def test_one_query_decodes_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = draw(1, 20_000, 16, 0.0)
    rows = as_rows(*encode(vectors, "int8"))
    assert isinstance(rows, RoundedRows)
    index, decoded = FlatIndex(rows), []
    read = RoundedRows.__getitem__

    def counted(self: RoundedRows, at: object) -> np.ndarray:
        found = read(self, at)
        decoded.append(len(found))
        return found

    monkeypatch.setattr(RoundedRows, "__getitem__", counted)
    index.search(vectors[:1], 10)
    assert max(decoded) <= 4096
