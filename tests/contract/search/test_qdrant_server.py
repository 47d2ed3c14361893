"""What a server can do wrong, and what it is told: by the stand-in, which fails as it is asked to."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.errors import ConfigError, FeaturekitError, LockedError, ServiceError, UsageError
from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.index import IndexSpec
from featurekit_spark.search.stores import QdrantIndex
from featurekit_spark.testing.qdrant import QdrantStandIn, qdrant_server
from featurekit_spark.testing.vector_samples import DIM, SPEC, sample

KEY = "s3cret-of-the-test"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantStandIn]:
    monkeypatch.setenv("TEST_QDRANT_KEY", KEY)
    with qdrant_server(api_key=KEY) as server:
        yield server


def index_at(server: QdrantStandIn, spec: IndexSpec | None = SPEC, **more: Any) -> QdrantIndex:
    return QdrantIndex("abt", spec, url=server.url, api_key_env="TEST_QDRANT_KEY", **more)


@pytest.mark.parametrize("exact", [True, False])
def test_the_server_is_told_whether_to_compare_all_rows(server: QdrantStandIn, exact: bool) -> None:
    index, (ids, vectors, payloads) = index_at(server, exact=exact), sample(20)
    index.upsert(ids, vectors, payloads)
    index.search(vectors[:2], 3)
    assert [params.exact for params in server.params] == [exact, exact]
    state = index.describe()
    assert state is not None and state.exact is exact
    assert "PUT /collections/abt--first/index" in server.requests
    index.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, ConfigError), (403, ConfigError), (429, ServiceError), (503, ServiceError), (400, ConfigError)],
)
def test_refusals_and_failures_are_ours(
    server: QdrantStandIn, status: int, kind: type[FeaturekitError]
) -> None:
    index, (ids, vectors, _) = index_at(server), sample(5)
    index.upsert(ids, vectors)
    server.fail = lambda method, path: status if path.endswith("/query/batch") else None
    with pytest.raises(kind) as raised:
        index.search(vectors[:1], 3)
    assert server.url in str(raised.value) and KEY not in str(raised.value)
    assert raised.value.retryable is (kind is ServiceError)
    server.fail = lambda method, path: None
    assert len(index.search(vectors[:1], 3)[0]) == 3
    index.close()


def test_a_wrong_key_is_named_by_its_variable(server: QdrantStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_QDRANT_KEY", "wrong-one")
    index = index_at(server)
    with pytest.raises(ConfigError, match="refused the API key") as raised:
        index.describe()
    assert "wrong-one" not in f"{raised.value!r} {index!r} {index.store!r}"
    index.close()
    monkeypatch.delenv("TEST_QDRANT_KEY")
    with pytest.raises(ConfigError, match="TEST_QDRANT_KEY"):
        index_at(server)


@pytest.mark.parametrize("at", ["points", "aliases"])
def test_an_export_that_a_server_breaks_off_changes_nothing(server: QdrantStandIn, at: str) -> None:
    index, (ids, vectors, payloads) = index_at(server), sample(60)
    made = export_vectors(index, ids, vectors)
    seen = 0

    def fail(method: str, path: str) -> int | None:
        nonlocal seen
        seen += method in ("PUT", "POST") and path.endswith(f"/{at}") and "index" not in path
        return (
            503
            if seen >= (3 if at == "points" else 1) and path.endswith(f"/{at}") and method != "GET"
            else None
        )

    server.fail = fail
    with pytest.raises(ServiceError):
        export_vectors(index, ids, vectors, payloads, batch=20, in_place=0)
    server.fail = lambda method, path: None
    state = index.describe()
    assert state is not None and (state.content, state.rows) == (made.content, 60)
    resumed = export_vectors(index, ids, vectors, payloads, batch=20, in_place=0)
    assert resumed.how == "replaced" and resumed.sent == (20 if at == "points" else 0)
    index.close()


def test_a_generation_that_lacks_rows_is_not_switched_to(server: QdrantStandIn) -> None:
    """As where somebody else exports to the same index."""
    index, (ids, vectors, payloads) = index_at(server), sample(30)
    export_vectors(index, ids, vectors)
    before = index.search(vectors[:2], 30)

    class Losing:
        def __len__(self) -> int:
            return 30

        def __getitem__(self, part: slice) -> Any:
            for name in index.store.generations():
                if name != index.describe().generation:  # type: ignore[union-attr]
                    index.store.remove(name, ids[:1])
            return payloads[part]

    with pytest.raises(ServiceError, match="29 rows of the 30"):
        export_vectors(index, ids, vectors, Losing(), batch=10, in_place=0)
    assert index.search(vectors[:2], 30) == before
    assert export_vectors(index, ids, vectors, payloads, in_place=0).rows == index.count() == 30
    index.close()


def test_older_generations_go_and_the_one_before_stays(server: QdrantStandIn) -> None:
    index, (ids, vectors, _) = index_at(server), sample(10)
    other = QdrantIndex("abt.more", SPEC, url=server.url, api_key_env="TEST_QDRANT_KEY")
    other.upsert(ids, vectors)
    made = []
    for number in range(4):
        payloads = [{"stock": number}] * 10
        made.append(export_vectors(index, ids, vectors, payloads, in_place=0).generation)
    assert sorted(index.store.generations()) == sorted(made[-2:])
    assert other.count() == 10
    index.close()
    other.close()


def test_a_switch_between_the_look_up_and_the_search_is_met_by_looking_again(server: QdrantStandIn) -> None:
    index, (ids, vectors, _) = index_at(server), sample(10)
    export_vectors(index, ids, vectors, in_place=0)
    writer = index_at(server)
    done = False

    def fail(method: str, path: str) -> int | None:
        nonlocal done
        if path.endswith("/query/batch") and not done:
            done = True
            return 404
        return None

    server.fail = fail
    assert len(index.search(vectors[:1], 10)[0]) == 10
    assert done
    index.close()
    writer.close()


def test_a_collection_that_is_not_ours_is_left_alone(server: QdrantStandIn) -> None:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(url=server.url, headers={"api-key": KEY}, check_compatibility=False)
    client.create_collection(
        "theirs", vectors_config=models.VectorParams(size=3, distance=models.Distance.DOT)
    )
    create = models.CreateAlias(collection_name="theirs", alias_name="abt")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])
    index, (ids, vectors, _) = index_at(server), sample(3)
    for ask in (
        index.describe,
        lambda: index.upsert(ids, vectors),
        lambda: export_vectors(index, ids, vectors),
    ):
        with pytest.raises(ConfigError, match="theirs"):
            ask()
    assert client.count("theirs").count == 0
    client.close()
    index.close()


def test_addresses_that_would_give_a_secret_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_QDRANT_KEY", KEY)
    for url in (
        "http://qdrant.example:6333", f"https://user:{KEY}@qdrant.example", f"https://qdrant.example?key={KEY}",
        "qdrant.example:6333", "ftp://qdrant.example",
    ):  # fmt: skip
        with pytest.raises(ConfigError) as raised:
            QdrantIndex("abt", SPEC, url=url, api_key_env="TEST_QDRANT_KEY")
        assert KEY not in str(raised.value)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    index = QdrantIndex("abt", SPEC, url=f"http://127.0.0.1:{port}")
    with pytest.raises(ServiceError, match="does not answer"):
        index.describe()
    index.close()
    with pytest.raises(UsageError, match="closed"):
        index.describe()


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    import subprocess
    import sys

    index = QdrantIndex("abt", SPEC, path=tmp_path / "q")
    beside = QdrantIndex("other", SPEC, path=tmp_path / "q")  # the same process may
    ids, vectors, _ = sample(3)
    index.upsert(ids, vectors)
    assert beside.count() == 0
    program = (
        f"from featurekit_spark.search.stores import QdrantIndex as Q; Q('abt', path={str(tmp_path / 'q')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert LockedError.__name__ in done.stderr and "in use by another process" in done.stderr
    beside.close()
    assert index.count() == 3
    index.close()


@pytest.mark.parametrize("name", ["", "a--b", "-a", "a-", ".a", "a/b", "ü", "x" * 101, "a b"])
def test_names_that_a_store_would_not_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="index name"):
        QdrantIndex(name, IndexSpec(DIM), path=tmp_path)


def test_fields_are_indexed_by_whoever_goes_on(server: QdrantStandIn) -> None:
    index, (ids, vectors, payloads) = index_at(server), sample(20)
    server.fail = lambda method, path: 503 if path.endswith("/index") else None
    with pytest.raises(ServiceError):
        export_vectors(index, ids, vectors, payloads)
    server.fail = lambda method, path: None
    server.requests.clear()
    done = export_vectors(index, ids, vectors, payloads)
    asked = [request for request in server.requests if request.endswith("/index")]
    assert asked == [f"PUT /collections/abt--{done.generation}/index"] * len(SPEC.fields)
    made = f"PUT /collections/abt--{done.generation}"
    assert made not in server.requests, "it was there already"
    index.close()


def test_a_collection_of_somebody_else_is_neither_removed_nor_written(server: QdrantStandIn) -> None:
    """Even where its name could be ours."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(url=server.url, headers={"api-key": KEY}, check_compatibility=False)
    for name in ("abt--0123456789abcdef", "abt--first"):
        client.create_collection(name, models.VectorParams(size=DIM, distance=models.Distance.DOT))
    index, (ids, vectors, payloads) = index_at(server), sample(20)
    with pytest.raises(ConfigError, match=r"'abt--first'.*not made by this library"):
        index.upsert(ids, vectors, payloads)
    export_vectors(index, ids, vectors, payloads)
    export_vectors(index, ids, vectors)
    there = {found.name for found in client.get_collections().collections}
    assert {"abt--0123456789abcdef", "abt--first"} < there and len(there) == 4
    assert client.count("abt--first").count == 0
    client.close()
    index.close()
