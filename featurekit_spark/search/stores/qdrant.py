"""A vector index in Qdrant: a folder of this machine (for trials and tests), or a server by its URL.

Owns the layout there: a collection per generation, `{name}--{generation}`, whose metadata says what it is; the alias
`{name}` stands for the one that is searched. Ids become UUIDs, and are kept in the payload as they are.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.errors import (
    ConfigError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.filters import Filter
from featurekit_spark.search.generation_store import Candidates, GenerationGoneError, Live
from featurekit_spark.search.generations import StoredIndex
from featurekit_spark.search.index import IndexSpec, Row
from featurekit_spark.search.stores.names import checked_name
from featurekit_spark.search.stores.qdrant_connection import Client, connected, opened, quicken
from featurekit_spark.search.stores.qdrant_filters import compiled, condition

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = ["QdrantIndex"]

_REQUEST_BYTES = 8 << 20  # a server takes 32 MB by default
_PAGE = 1000
_KINDS = {"str": "keyword", "int": "integer", "float": "float", "bool": "bool"}


class QdrantIndex(StoredIndex):
    """The index `name` in the folder `path`, or at the server `url` whose key is in the variable `api_key_env`.

    A folder belongs to one process at a time (LockedError), and is always searched exactly. A server compares all rows
    as well; with `exact=False` it searches its graph, which is faster and may miss neighbours. It needs Qdrant 1.16 or
    newer, which keeps with a collection what it is.
    """

    def __init__(
        self,
        name: str,
        spec: IndexSpec | None = None,
        *,
        path: str | Path | None = None,
        url: str | None = None,
        api_key_env: str | None = None,
        exact: bool = True,
        timeout_s: float = 60.0,
    ) -> None:
        if (path is None) == (url is None):
            raise UsageError("Qdrant is in a folder or at a server: give path or url, one of them")
        checked_name(name)
        if path is not None:
            folder = Path(path)
            store = _Store(name, f"Qdrant in {str(path)!r}, {name}", True, folder, opened(folder))
        else:
            assert url is not None
            made = connected(url, api_key_env, timeout_s)
            store = _Store(name, f"Qdrant at {url}, {name}", exact, None, made)
        super().__init__(store, spec)
        self._made = partial(
            type(self),
            name,
            spec,
            path=path,
            url=url,
            api_key_env=api_key_env,
            exact=exact,
            timeout_s=timeout_s,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made, ()  # who gets a copy connects for himself


@dataclass
class _Store:
    name: str
    place: str
    exact: bool
    folder: Path | None
    _client: Client | None = field(repr=False)

    def live(self) -> Live | None:
        with self._asking() as client:
            found = [alias for alias in client.get_aliases().aliases if alias.alias_name == self.name]
            if not found:
                return None
            collection = found[0].collection_name
            told = (client.get_collection(collection).config.metadata or {}).get("featurekit")
        if told is None:
            raise ConfigError(
                f"{self.place}: the collection {collection!r} says nothing of what it is. It was not made by this "
                "library, or the server is older than Qdrant 1.16; give the index another name, or update the server."
            )
        generation = collection.removeprefix(f"{self.name}--")
        spec = IndexSpec.from_json(told["spec"])
        return Live(generation, spec, told["content"] or None, told["before"] or None)

    def publish(self, live: Live) -> None:
        from qdrant_client import models

        collection = self._collection(live.generation)
        with self._asking(live.generation) as client:
            client.update_collection(collection, metadata=_metadata(live))
            now = {alias.alias_name: alias.collection_name for alias in client.get_aliases().aliases}
            if now.get(self.name) == collection:
                return
            steps: list[Any] = []
            if self.name in now:
                steps.append(
                    models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self.name))
                )
            create = models.CreateAlias(collection_name=collection, alias_name=self.name)
            steps.append(models.CreateAliasOperation(create_alias=create))
            client.update_collection_aliases(steps)  # all of them in one step

    def generations(self) -> list[str]:
        start = f"{self.name}--"
        with self._asking() as client:
            names = [found.name for found in client.get_collections().collections]
        found = [name.removeprefix(start) for name in names if name.startswith(start)]
        return [generation for generation in found if self._told(generation) is not None]

    def create(self, generation: str, spec: IndexSpec) -> None:
        from qdrant_client import models

        distance = models.Distance.COSINE if spec.metric == "cosine" else models.Distance.DOT
        collection = self._collection(generation)
        with self._asking() as client:
            there = collection in [found.name for found in client.get_collections().collections]
        if there and self._told(generation) is None:
            raise ConfigError(
                f"{self.place}: the collection {collection!r}, which the export would write, was not made by this "
                "library, or the server is older than Qdrant 1.16. Remove it, name the index otherwise, or update "
                "the server."
            )
        with self._asking() as client:
            if not there:
                client.create_collection(
                    collection,
                    vectors_config=models.VectorParams(size=spec.dim, distance=distance),
                    metadata=_metadata(Live(generation, spec, None)),
                )
            if self.folder is not None:
                quicken(self.folder, collection)
            else:  # a folder has no use for them, and says so; who made the collection may have been killed before this
                for name, kind in spec.fields.items():
                    client.create_payload_index(
                        collection, f"p.{name}", field_schema=models.PayloadSchemaType(_KINDS[kind])
                    )

    def drop(self, generation: str) -> None:
        with self._asking() as client:
            client.delete_collection(self._collection(generation))

    def finish(self, generation: str, spec: IndexSpec) -> None:
        pass  # a server builds its graph by itself, and finds rows that are not in it yet

    def tidy(self, generation: str) -> None:
        pass  # a server does by itself

    def put(self, generation: str, spec: IndexSpec, rows: Sequence[Row]) -> None:
        from qdrant_client import models

        step = max(1, _REQUEST_BYTES // (spec.dim * 20 + 1000))
        for start in range(0, len(rows), step):
            points = [
                models.PointStruct(
                    id=_point(row.id),
                    vector=row.vector.tolist(),
                    payload={"id": row.id, "hash": row.hash, "p": _present(row.payload)},
                )
                for row in rows[start : start + step]
            ]
            with self._asking(generation) as client:
                client.upsert(self._collection(generation), points, wait=True)

    def remove(self, generation: str, ids: Sequence[str]) -> None:
        from qdrant_client import models

        for start in range(0, len(ids), _PAGE):
            points: list[Any] = [_point(name) for name in ids[start : start + _PAGE]]
            with self._asking(generation) as client:
                client.delete(self._collection(generation), models.PointIdsList(points=points), wait=True)

    def hashes(self, generation: str, ids: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        collection = self._collection(generation)
        if ids is not None:
            for start in range(0, len(ids), _PAGE):
                points = [_point(name) for name in ids[start : start + _PAGE]]
                with self._asking(generation) as client:
                    found = client.retrieve(
                        collection, points, with_payload=["id", "hash"], with_vectors=False
                    )
                yield from _hashes(found)
            return
        offset: Any = None
        while True:
            with self._asking(generation) as client:
                page, offset = client.scroll(
                    collection, limit=_PAGE, offset=offset, with_payload=["id", "hash"], with_vectors=False
                )
            yield from _hashes(page)
            if offset is None:
                return

    def count(self, generation: str, wanted: Filter | None) -> int:
        with self._asking(generation) as client:
            return client.count(self._collection(generation), count_filter=compiled(wanted), exact=True).count

    def check(self, wanted: Filter) -> None:
        condition(wanted)

    def candidates(
        self, generation: str, spec: IndexSpec, queries: Floats, limit: int, wanted: Filter | None
    ) -> list[Candidates]:
        from qdrant_client import models

        params = None if self.folder is not None else models.SearchParams(exact=self.exact)
        asked = compiled(wanted)
        requests = [
            models.QueryRequest(
                query=query.tolist(),
                limit=limit,
                filter=asked,
                params=params,
                with_vector=True,
                with_payload=True,
            )
            for query in queries
        ]
        with self._asking(generation) as client:
            answers = client.query_batch_points(self._collection(generation), requests)
        return [
            Candidates(
                [point.payload["id"] for point in answer.points if point.payload],
                np.array([point.vector for point in answer.points], dtype=np.float32).reshape(-1, spec.dim),
                np.array([point.score for point in answer.points], dtype=np.float64),
                [point.payload["p"] for point in answer.points if point.payload],
            )
            for answer in answers
        ]

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.closed()

    def _told(self, generation: str) -> dict[str, Any] | None:
        """What this library keeps with a collection of its own."""
        try:
            with self._asking(generation) as client:
                config = client.get_collection(self._collection(generation)).config
        except GenerationGoneError:
            return None
        told: dict[str, Any] | None = (config.metadata or {}).get("featurekit")
        return told

    def _collection(self, generation: str) -> str:
        return f"{self.name}--{generation}"

    @contextmanager
    def _asking(self, generation: str | None = None) -> Iterator[QdrantClient]:
        """The client, with its errors translated into ours."""
        if self._client is None:
            raise UsageError(f"{self.place} is closed; open it again")
        import httpx
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            with self._client.lock:
                yield self._client.client
        except FeaturekitError:
            raise
        except UnexpectedResponse as error:
            raise self._refused(error, generation) from error
        except ResourceExhaustedResponse as error:
            raise ServiceError(f"{self.place} takes no more requests for now: {error}") from error
        except (ResponseHandlingException, httpx.HTTPError, OSError) as error:
            cause = getattr(error, "source", error)
            raise ServiceError(f"{self.place} does not answer: {type(cause).__name__}: {cause}") from error
        except ValueError as error:  # the local one's word for what is not there
            if generation is not None and "not found" in str(error):
                raise GenerationGoneError(
                    f"{self.place}: generation {generation} is gone; search again"
                ) from error
            raise

    def _refused(self, error: Any, generation: str | None) -> FeaturekitError:
        status, told = error.status_code, error.content[:500].decode(errors="replace")
        if status in (401, 403):
            return ConfigError(
                f"{self.place} refused the API key ({status}): check the variable that api_key_env names."
            )
        if status == 404 and generation is not None:
            return GenerationGoneError(f"{self.place}: generation {generation} is gone; search again")
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            return ConfigError(f"{self.place} refused the request ({status}): {told}")
        return ServiceError(f"{self.place} failed ({status}): {told}")


def _metadata(live: Live) -> dict[str, Any]:
    """Merged by the server key by key, so nothing is null."""
    told = {"spec": live.spec.to_json(), "content": live.content or "", "before": live.before or ""}
    return {"featurekit": told}


def _point(name: str) -> str:
    """Qdrant's ids are numbers or UUIDs."""
    return str(uuid.UUID(bytes=sha256(f"row\n{name}".encode()).digest()[:16]))


def _present(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if value is not None}


def _hashes(points: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for point in points:
        yield point.payload["id"], point.payload["hash"]
