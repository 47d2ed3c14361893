"""What changes in place leave in a LanceDB folder does not pile up."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import pytest

from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.stores import LanceIndex, lance
from featurekit_spark.testing.vector_samples import SPEC, sample


def table_of(folder: Path, index: LanceIndex) -> Any:
    state = index.describe()
    assert state is not None
    return lancedb.connect(folder).open_table(f"abt--{state.generation}")


def test_versions_that_nobody_reads_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lance, "_OLD", timedelta(milliseconds=1))
    index, (ids, vectors, payloads) = LanceIndex("abt", SPEC, uri=tmp_path), sample(100)
    export_vectors(index, ids, vectors, payloads)
    most, files = 0, []
    for number in range(40):
        payloads[number % 10] = {"brand": f"of {number}"}
        assert export_vectors(index, ids, vectors, payloads).how == "changed"
        most = max(most, len(table_of(tmp_path, index).list_versions()))
        files.append(sum(1 for path in tmp_path.rglob("*") if path.is_file()))
    assert 5 < most < 25, "not at every change, and again and again"
    assert max(files[20:]) <= 1.5 * max(files[:20])
    assert [hit.payload["brand"] for hit in index.search(vectors[9:10], 1)[0]] == ["of 39"]
    index.close()


def test_fragments_are_made_one_and_a_reader_of_before_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance, "_FRAGMENTS", 5)
    index, (ids, vectors, payloads) = LanceIndex("abt", SPEC, uri=tmp_path), sample(100)
    export_vectors(index, ids, vectors, payloads)
    before = table_of(tmp_path, index)
    before.checkout(before.version)
    fragments = []
    for number in range(12):
        payloads[number] = {"brand": f"of {number}"}
        assert export_vectors(index, ids, vectors, payloads).how == "changed"
        fragments.append(table_of(tmp_path, index).stats()["fragment_stats"]["num_fragments"])
    assert max(fragments) == 5 and fragments.count(1) == 2
    assert set(before.to_arrow()["p_brand"].to_pylist()).isdisjoint(f"of {number}" for number in range(12))
    found = {hit.id: hit.payload["brand"] for hit in index.search(vectors[:1], 100)[0]}
    assert [found[name] for name in ids[:12]] == [f"of {number}" for number in range(12)]
    index.close()


def test_rows_that_lie_far_apart_go_together(tmp_path: Path) -> None:
    index, (ids, vectors, payloads) = LanceIndex("abt", SPEC, uri=tmp_path), sample(200)
    export_vectors(index, ids, vectors, payloads, batch=10)
    version = table_of(tmp_path, index).version
    for number in range(0, 200, 10):  # one in each batch
        payloads[number] = {"brand": "changed"}
    done = export_vectors(index, ids, vectors, payloads, batch=10)
    assert (done.how, done.sent) == ("changed", 20)
    assert table_of(tmp_path, index).version == version + 2
    assert export_vectors(index, ids, vectors, payloads).how == "unchanged"
    index.close()
