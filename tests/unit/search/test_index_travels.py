"""An index travels to workers as what opens it, without connections and keys."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from featurekit_spark.search.stores import LanceIndex, QdrantIndex
from featurekit_spark.testing.qdrant import qdrant_server
from featurekit_spark.testing.vector_samples import SPEC, sample


def test_a_copy_opens_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "s3cret-of-the-test"
    monkeypatch.setenv("TEST_QDRANT_KEY", key)
    ids, vectors, payloads = sample(5)
    with qdrant_server(api_key=key) as server:
        for index in (
            LanceIndex("abt", SPEC, uri=tmp_path / "lance"),
            QdrantIndex("abt", SPEC, url=server.url, api_key_env="TEST_QDRANT_KEY", exact=False),
            QdrantIndex("abt", SPEC, path=tmp_path / "q"),
        ):
            index.upsert(ids, vectors, payloads)
            travelling = pickle.dumps(index)
            assert key.encode() not in travelling
            copy = pickle.loads(travelling)
            assert copy.describe() == index.describe()
            assert copy.search(vectors, 3) == index.search(vectors, 3)
            copy.close()
            index.close()
