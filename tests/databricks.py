"""A Databricks workspace on loopback: the part of its REST API that secrets are read by, for one token."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from featurekit_spark.testing.loopback import JsonHandler, served

__all__ = ["TOKEN", "Workspace", "workspace"]

TOKEN = "dapi-of-the-test"


@dataclass
class Workspace:
    """`scopes`: of each, its keys; `denied`: scopes that the token may not read. `asked`: what was asked for."""

    url: str = ""
    scopes: dict[str, dict[str, bytes]] = field(default_factory=dict)
    denied: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)
    fails: tuple[int, str, str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """By which the SDK finds it."""
        return {
            "DATABRICKS_HOST": self.url,
            "DATABRICKS_TOKEN": TOKEN,
            "DATABRICKS_CONFIG_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, scope: str, key: str) -> tuple[int, Any]:
        self.asked.append(f"{scope}/{key}")
        if self.fails is not None:
            status, code, message = self.fails
            return status, {"error_code": code, "message": message}
        if scope in self.denied:
            why = f"User somebody does not have READ permission on scope {scope}"
            return 403, {"error_code": "PERMISSION_DENIED", "message": why}
        if scope not in self.scopes:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"Scope {scope} does not exist!"}
        if key not in self.scopes[scope]:
            why = f"Secret does not exist with scope: {scope} and key: {key}"
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": why}
        return 200, {"key": key, "value": base64.b64encode(self.scopes[scope][key]).decode()}


@contextmanager
def workspace(**scopes: dict[str, bytes]) -> Iterator[Workspace]:
    """A running one."""
    made = Workspace(scopes=dict(scopes))

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if parts.path == "/.well-known/databricks-config":
                self.reply(200, {}, {"oidc_endpoint": f"{made.url}/oidc", "workspace_id": "1"})
            elif parts.path != "/api/2.0/secrets/get":
                self.reply(
                    404, {}, {"error_code": "ENDPOINT_NOT_FOUND", "message": f"No API at {parts.path}"}
                )
            elif self.headers["authorization"] != f"Bearer {TOKEN}":
                self.reply(403, {}, {"error_code": "403", "message": "Invalid access token."})
            else:
                self.reply(*_with_headers(made.answer(query["scope"], query["key"])))

    with served(Handler) as url:
        made.url = url
        yield made


def _with_headers(answer: tuple[int, Any]) -> tuple[int, dict[str, str], Any]:
    return answer[0], {}, answer[1]
