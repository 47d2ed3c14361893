"""An embeddings server on a loopback port that speaks the OpenAI protocol: vectors by the hashing embedder, so that
they are known beforehand, and a memory of what was asked.

    with embedding_server() as server:
        embedder = OpenAIEmbedder(server.url, "m", dim=64, api_key_env="ANY")

Being a real server, it serves calls from Spark workers and from jobs in processes of their own as well.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.testing.loopback import JsonHandler, served

__all__ = ["EmbeddingServer", "embedding_server"]


@dataclass
class EmbeddingServer:
    """Answers come from `script` in turn, else as the hashing embedder says, in `dim` dimensions unless the request
    asks for others; `delay_s` holds each back.

    `refuses(text)`: whether a request with this text gets status 400. `changed(body)` may spoil an answer. `length`:
    the vectors' length, for servers do not all send unit vectors.
    """

    url: str = ""
    dim: int = 384
    length: float = 1.0
    refuses: Callable[[str], bool] = lambda text: False
    changed: Callable[[dict[str, Any]], Any] = lambda body: body
    script: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def then(self, status: int, body: Any, **headers: str) -> EmbeddingServer:
        """Answer one more request so; underscores in header names stand for dashes."""
        self.script.append((status, {name.replace("_", "-"): text for name, text in headers.items()}, body))
        return self

    def fails(self, status: int, code: str = "", **headers: str) -> EmbeddingServer:
        """Answer one more request with an error."""
        return self.then(status, _error("no", code), **headers)

    @property
    def texts(self) -> list[str]:
        """All texts of all requests, in the order in which they came."""
        return [text for request in self.requests for text in request["input"]]

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body. Four characters count as a token, at least one for each text."""
        texts = request["input"]
        if any(map(self.refuses, texts)):
            return 400, {}, _error("a text is refused", "bad_text")
        dim = request.get("dimensions") or self.dim
        vectors = HashingEmbedder(dim).embed(texts) * self.length
        as_base64 = request.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
                if as_base64
                else row.tolist(),
            }
            for index, row in enumerate(vectors)
        ]
        tokens = sum(max(1, len(text) // 4) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return 200, {}, {"object": "list", "data": data, "model": request.get("model", ""), "usage": usage}


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "code": code}}


@contextmanager
def embedding_server(*, port: int = 0, **options: Any) -> Iterator[EmbeddingServer]:
    """A running server with the fields of EmbeddingServer; port 0: any free one. `GET .../models` lists `m`."""
    server = EmbeddingServer(**options)

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.reply(200, {}, {"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            request = self.body()
            with server.lock:
                server.requests.append(request)
                server.keys.append(self.headers["authorization"])
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
                scripted = server.script.pop(0) if server.script else None
            status, headers, body = scripted or server.answer(request)
            if server.delay_s:
                time.sleep(server.delay_s)
            with server.lock:
                server.in_flight -= 1
            self.reply(status, headers, server.changed(body) if status == 200 else body)

    with served(Handler, port=port) as url:
        server.url = f"{url}/v1"
        yield server
