"""A stand-in for a Qdrant server on a loopback port: the REST calls that `QdrantIndex` makes, answered by
qdrant-client's local mode.

It checks requests and answers by the client's own models, the API key, and fails when told to. It is no Qdrant: no
graph, no segments, nothing of a cluster; searches are exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from featurekit_spark.testing.loopback import JsonHandler, served

__all__ = ["QdrantStandIn", "qdrant_server"]


@dataclass
class QdrantStandIn:
    """`url` to connect to. `requests`: method and path of each, in order. `fail`: asked for each request, a status
    other than None is answered with, and nothing is done. `params` are the search parameters that came."""

    url: str = ""
    api_key: str | None = None
    fail: Callable[[str, str], int | None] = lambda method, path: None
    requests: list[str] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)


@contextmanager
def qdrant_server(*, api_key: str | None = None) -> Iterator[QdrantStandIn]:
    """An empty one, whose rows are in memory."""
    from qdrant_client import QdrantClient

    state = QdrantStandIn(api_key=api_key)
    client, lock = QdrantClient(location=":memory:"), threading.Lock()

    class Handler(JsonHandler):
        def _any(self) -> None:
            path = urlsplit(self.path).path
            length = int(self.headers.get("content-length") or 0)
            body = self.body() if length else None
            state.requests.append(f"{self.command} {path}")
            status = state.fail(self.command, path)
            if state.api_key is not None and self.headers.get("api-key") != state.api_key:
                status = 401
            if status is not None:
                self.reply(status, {}, {"status": {"error": "told to fail"}, "time": 0})
                return
            parts = [unquote(part) for part in path.strip("/").split("/")]
            try:
                with lock:
                    found = _answer(client, state, self.command, parts, body)
            except ValueError as error:
                missing = "not found" in str(error)
                self.reply(404 if missing else 400, {}, {"status": {"error": str(error)}, "time": 0})
                return
            self.reply(200, {}, {"result": found, "status": "ok", "time": 0})

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _any

    with served(Handler) as state.url:
        try:
            yield state
        finally:
            client.close()


def _answer(client: Any, state: QdrantStandIn, method: str, parts: list[str], body: Any) -> Any:
    from qdrant_client import models

    match method, parts:
        case "GET", ["aliases"]:
            return _plain(client.get_aliases())
        case "GET", ["collections"]:
            return _plain(client.get_collections())
        case "POST", ["collections", "aliases"]:
            return client.update_collection_aliases(models.ChangeAliasesOperation(**body).actions)
        case "GET", ["collections", name]:
            return _plain(client.get_collection(name))
        case "PUT", ["collections", name]:
            asked = models.CreateCollection(**body)
            return client.create_collection(name, vectors_config=asked.vectors, metadata=asked.metadata)
        case "PATCH", ["collections", name]:
            return client.update_collection(name, metadata=models.UpdateCollection(**body).metadata)
        case "DELETE", ["collections", name]:
            return client.delete_collection(name)
        case "PUT", ["collections", name, "index"]:
            models.CreateFieldIndex(**body)
            client.get_collection(name)
            return {"operation_id": 0, "status": "completed"}
        case "PUT", ["collections", name, "points"]:
            return _plain(client.upsert(name, models.PointsList(**body).points))
        case "POST", ["collections", name, "points"]:
            wanted = models.PointRequest(**body)
            return _plain(client.retrieve(name, wanted.ids, wanted.with_payload, bool(wanted.with_vector)))
        case "POST", ["collections", name, "points", "delete"]:
            return _plain(client.delete(name, models.PointIdsList(**body)))
        case "POST", ["collections", name, "points", "count"]:
            counted = models.CountRequest(**body)
            return _plain(client.count(name, counted.filter, exact=bool(counted.exact)))
        case "POST", ["collections", name, "points", "scroll"]:
            page = models.ScrollRequest(**body)
            points, offset = client.scroll(
                name, page.filter, page.limit or 10, offset=page.offset, with_payload=page.with_payload or False,
                with_vectors=bool(page.with_vector),
            )  # fmt: skip
            return {"points": _plain(points), "next_page_offset": offset}
        case "POST", ["collections", name, "points", "query", "batch"]:
            searches = models.QueryRequestBatch(**body).searches
            state.params += [search.params for search in searches]
            bare = [search.model_copy(update={"params": None}) for search in searches]
            return _plain(client.query_batch_points(name, bare))
    raise ValueError(f"the stand-in does not know {method} {'/'.join(parts)}")


def _plain(found: Any) -> Any:
    if isinstance(found, list):
        return [_plain(item) for item in found]
    return found.model_dump(mode="json", exclude_none=True)
