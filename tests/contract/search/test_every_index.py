"""One behaviour suite over all vector indexes. The Qdrant server is a stand-in: no package brings a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.filters import Range
from featurekit_spark.search.generations import StoredIndex
from featurekit_spark.search.index import IndexSpec, checked_rows
from featurekit_spark.search.stores import FlatVectorIndex, LanceIndex, QdrantIndex
from featurekit_spark.testing.qdrant import QdrantStandIn, qdrant_server
from featurekit_spark.testing.vector_samples import SPEC, sample
from featurekit_spark.testing.vectors import VectorIndexBehaviour
from tests.s3 import Store, s3_server

OPEN = "from featurekit_spark.search.stores import LanceIndex, QdrantIndex\n"
TEXT_RANGES = (Range("brand", gte="a"),)


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    with s3_server() as store:
        yield store


class StoredIndexBehaviour(VectorIndexBehaviour):
    """And what all promise that keep generations under names."""

    def test_what_others_keep_under_such_a_name_stays(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(12)
        assert isinstance(index, StoredIndex)
        others = ["backup", "first-of-may", "0123456789abcdef-x", "0123456789ABCDEF"]
        for name in others:
            index.store.create(name, SPEC)
            index.store.put(name, SPEC, checked_rows(SPEC, ids, vectors, payloads))
        index.store.create("0123456789abcdef-2", SPEC)  # of an export that was killed
        for brand in ("a", "b", "c"):
            export_vectors(index, ids, vectors, [{"brand": brand}] * 12)
        assert set(others) <= set(index.store.generations())
        assert [index.store.count(name, None) for name in others] == [12] * 4
        assert len(index.store.generations()) == len(others) + 2  # the one that is searched, the one before
        index.close()


class TestFlat(StoredIndexBehaviour):
    durable = False

    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> FlatVectorIndex:
        return FlatVectorIndex(spec or SPEC)


class TestLance(StoredIndexBehaviour):
    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> LanceIndex:
        return LanceIndex("abt", spec, uri=folder / "db")

    def opening(self, folder: Path) -> str:
        return f"{OPEN}index = LanceIndex('abt', spec, uri={str(folder / 'db')!r})"


class TestLanceOnS3(StoredIndexBehaviour):
    store: Store

    @pytest.fixture(autouse=True)
    def _store(self, s3: Store) -> None:
        self.store = s3

    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> LanceIndex:
        uri, options = f"s3://bucket/{folder.name}", self.store.options
        return LanceIndex("abt", spec, uri=uri, storage_options=options)

    def opening(self, folder: Path) -> str:
        uri, options = f"s3://bucket/{folder.name}", self.store.options
        return f"{OPEN}index = LanceIndex('abt', spec, uri={uri!r}, storage_options={options!r})"


class TestQdrantFolder(StoredIndexBehaviour):
    tolerance = 1e-6  # it keeps unit vectors where the metric is cosine
    refused = TEXT_RANGES

    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> QdrantIndex:
        return QdrantIndex("abt", spec, path=folder / "q")

    def opening(self, folder: Path) -> str:
        return f"{OPEN}index = QdrantIndex('abt', spec, path={str(folder / 'q')!r})"


class TestQdrantServer(StoredIndexBehaviour):
    tolerance = 1e-6
    refused = TEXT_RANGES

    @pytest.fixture(autouse=True)
    def _server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("TEST_QDRANT_KEY", "s3cret-of-the-test")
        with qdrant_server(api_key="s3cret-of-the-test") as self.server:
            yield

    server: QdrantStandIn

    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> QdrantIndex:
        return QdrantIndex("abt", spec, url=self.server.url, api_key_env="TEST_QDRANT_KEY")

    def opening(self, folder: Path) -> str:
        url, key = self.server.url, "TEST_QDRANT_KEY"
        return f"{OPEN}index = QdrantIndex('abt', spec, url={url!r}, api_key_env={key!r})"
