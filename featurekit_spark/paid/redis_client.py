"""Connections to a Redis server as everything paid has them: one client per event loop, errors in our words.

Knows no key and no script. Needs the extra `featurekit-spark[redis]`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featurekit_spark.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisClients"]

_RETRIES = 2


@dataclass
class RedisClients:
    """Of one server, for one purpose: `what`, as errors begin. Travels without its connections."""

    url: str = field(repr=False)
    what: str
    timeout_s: float
    _by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Redis] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    @contextmanager
    def client(self) -> Iterator[Redis]:
        """The running loop's client. ConfigError where the address is none or the user is refused, ServiceError where
        the server does not answer."""
        try:
            import redis
        except ImportError as error:
            raise ConfigError(
                f"{self.what} in Redis: this needs the extra, pip install 'featurekit-spark[redis]'."
            ) from error
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is None:
            client = self._by_loop[loop] = self._connected()
        known = client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        try:
            yield client
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

        try:
            return redis.asyncio.Redis.from_url(
                self.url,
                socket_timeout=self.timeout_s,
                socket_connect_timeout=self.timeout_s,
                # redis-py's own default is ten retries, which hides an outage for minutes.
                retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), _RETRIES),
            )
        except ValueError as error:
            raise ConfigError(
                f"{self.what}: the Redis address is none ({error}): write redis://host:6379/0."
            ) from None

    def __reduce__(self) -> tuple[type[RedisClients], tuple[str, str, float]]:
        return RedisClients, (self.url, self.what, self.timeout_s)
