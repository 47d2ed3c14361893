"""Connections to a Redis server as everything paid has them: one client per event loop, errors in our words. An
address that is none is found when the first object is made.

Knows no key and no script. Needs the extra `featurekit-spark[redis]`.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from featurekit_spark.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisClients", "check_address"]

_RETRIES = 2


def check_address(url: str) -> None:
    """ConfigError where nothing could ever be connected to by this address. It is not shown, nor is any part of it: a
    password that is not quoted can be taken for a port, a path or a fragment."""
    try:
        from redis.asyncio import ConnectionPool
    except ImportError as error:
        raise ConfigError("this needs the extra, pip install 'featurekit-spark[redis]'.") from error
    try:
        parts = urlsplit(url)
        odd = "@" in parts.query.partition("=")[0] or "#" in url
        if parts.scheme != "unix":
            odd = odd or not re.fullmatch(r"/?\d*", parts.path) or bool(parts.netloc and not parts.hostname)
            (parts.hostname or "").encode("idna")
        if not odd:
            ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError):
        odd = True
    if odd:
        raise ConfigError(
            "the address cannot be read, and is not shown, since a password may be in it. Write "
            "redis://:password@host:6379/0, in the password %23 for #, %2F for /, %3A for :, %3F for ?, %40 for @."
        )


@dataclass
class RedisClients:
    """Of one server, for one purpose: `what`, as errors begin. Travels without its connections."""

    url: str = field(repr=False)
    what: str
    timeout_s: float
    _by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Redis] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        try:
            check_address(self.url)
        except ConfigError as error:
            raise ConfigError(f"{self.what} in Redis: {error}") from error.__cause__

    @contextmanager
    def client(self) -> Iterator[Redis]:
        """The running loop's client. ConfigError where the user is refused, ServiceError where the server does not
        answer."""
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is None:
            client = self._by_loop[loop] = self._connected()
        with self._told(client):
            yield client

    async def check(self) -> None:
        """One small write, which finds a wrong password, a read-only replica and full memory as well. Raises as
        `client`, and leaves no connection open."""
        client = self._connected()
        try:
            with self._told(client):
                await client.set("featurekit/check", "ok", ex=10)
        finally:
            await client.aclose()

    @contextmanager
    def _told(self, client: Redis) -> Iterator[None]:
        import redis

        known = client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        try:
            yield
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(f"Redis at {where} refused the user or the command: {error}.") from error
        except redis.RedisError as error:
            raise ServiceError(
                f"{self.what} in Redis at {where} cannot be asked: {error} Is it running?"
            ) from error

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _connected(self) -> Redis:
        import redis.asyncio
        from redis.backoff import ExponentialBackoff
        from redis.retry import Retry

        return redis.asyncio.Redis.from_url(
            self.url,
            socket_timeout=self.timeout_s,
            socket_connect_timeout=self.timeout_s,
            # redis-py's own default is ten retries, which hides an outage for minutes.
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), _RETRIES),
        )

    def __reduce__(self) -> tuple[type[RedisClients], tuple[str, str, float]]:
        return RedisClients, (self.url, self.what, self.timeout_s)
