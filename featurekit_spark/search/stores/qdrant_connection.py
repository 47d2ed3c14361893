"""Clients of Qdrant: one for each folder in a process, one for each index at a server.

Owns how they are opened and shared, and where the API key comes from. It must not know what is kept there.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from featurekit_spark.errors import ConfigError, ContextError, LockedError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

__all__ = ["Client", "connected", "opened", "quicken"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Client:
    """A client with its lock (the local one is not safe among threads) and how many use it."""

    def __init__(self, client: QdrantClient, lock: Any, closed: Callable[[], None]) -> None:
        self.client, self.lock, self.closed = client, lock, closed


def connected(url: str, api_key_env: str | None, timeout_s: float) -> Client:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{parts.hostname or 'the address'}: Qdrant's URL begins with http:// or https:// and a host"
        )
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(
            f"the URL of Qdrant at {parts.hostname} holds a user or a query; leave them out, and put the key into the "
            "variable that api_key_env names"
        )
    headers = {}
    if api_key_env is not None:
        key = os.environ.get(api_key_env)
        if not key:
            raise ConfigError(
                f"the variable {api_key_env}, which should hold Qdrant's API key, is not set or empty"
            )
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ConfigError(f"the API key would go to {parts.hostname} unencrypted; use https")
        headers["api-key"] = key
    client = _package()(
        url=url,
        port=parts.port or (443 if parts.scheme == "https" else 6333),
        headers=headers,
        timeout=max(1, int(timeout_s)),
        check_compatibility=False,  # a request of its own whose failure is a warning
    )
    return Client(client, _NoLock(), client.close)


_local: dict[Path, tuple[QdrantClient, Any, list[int]]] = {}
_local_lock = threading.Lock()


def opened(path: Path) -> Client:
    """The process's one client of a folder: a second one would find it locked."""
    path = path.absolute()
    make = _package()
    with _local_lock:
        if path not in _local:
            try:
                client = make(path=str(path))
            except RuntimeError as error:
                raise LockedError(
                    f"the Qdrant folder {str(path)!r} is in use by another process; end it, or use a Qdrant server"
                ) from error
            except OSError as error:
                raise ConfigError(f"the Qdrant folder {str(path)!r} cannot be used: {error}") from error
            _local[path] = client, threading.RLock(), [0]
        client, lock, users = _local[path]
        users[0] += 1

    def closed() -> None:
        with _local_lock:
            users[0] -= 1
            if not users[0]:
                del _local[path]
                client.close()

    return Client(client, lock, closed)


def quicken(path: Path, collection: str) -> None:
    """A folder's client commits row by row: let SQLite write ahead, which is one wait for the disk instead of three."""
    file = path / "collection" / collection / "storage.sqlite"
    if file.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA journal_mode=WAL")


class _NoLock:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        pass


def _package() -> type[QdrantClient]:
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise ContextError("Qdrant needs qdrant-client: pip install 'featurekit-spark[vector]'.") from error
    return QdrantClient
