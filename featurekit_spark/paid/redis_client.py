"""Connections to a Redis server as everything paid has them: one client per event loop, errors in our words, and a
server that does not answer is left alone. An address that is none is found when the first object is made.

Knows no key and no script. Needs the extra `featurekit-spark[redis]`.
"""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.paid.redis_outage import Outage

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisClients", "check_address"]

_RETRIES = 1
_PATIENCE = 2  # timeouts: a single one may be one connection's


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
        answer, and at once where it has not for a while: a run must not wait for it once for each of its keys."""
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is None:
            client = self._by_loop[loop] = self._connected()
        outage = _outage(self.url, _PATIENCE * self.timeout_s)
        if not outage.may_ask():
            raise ServiceError(
                f"{self.what} in Redis cannot be asked: it has answered nothing for {outage.patience_s:g} s, and is "
                f"left alone for {outage.pause_s:g} s ({outage.why.rstrip('.')}). Is it running?"
            )
        with self._told(client, outage):
            yield client

    async def check(self) -> None:
        """One small write, which finds a wrong password, a read-only replica and full memory as well. Raises as
        `client`, but asks in any case, and leaves no connection open."""
        client = self._connected()
        try:
            with self._told(client, _outage(self.url, _PATIENCE * self.timeout_s)):
                await client.set("featurekit/check", "ok", ex=10)
        finally:
            await client.aclose()

    @contextmanager
    def _told(self, client: Redis, outage: Outage) -> Iterator[None]:
        import redis

        began = outage.clock()
        known = client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        try:
            yield
            outage.answered()
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            outage.answered()
            raise ConfigError(f"Redis at {where} refused the user or the command: {error}.") from error
        except redis.RedisError as error:
            if isinstance(error, redis.ConnectionError | redis.TimeoutError):
                outage.unanswered(began, f"at {where}: {error}")
            else:
                outage.answered()
            raise ServiceError(
                f"{self.what} in Redis at {where} cannot be asked: {str(error).rstrip('.')}. Is it running?"
            ) from error
        except BaseException:
            outage.undecided()
            raise

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        client = self._by_loop.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _connected(self) -> Redis:
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import ExponentialBackoff

        return redis.asyncio.Redis.from_url(
            self.url,
            socket_timeout=self.timeout_s,
            socket_connect_timeout=self.timeout_s,
            # redis-py's own default is ten retries, which hides an outage for minutes. What was not answered in time
            # is not tried again: everybody waits for it.
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), _RETRIES, (redis.ConnectionError,)),
        )

    def __reduce__(self) -> tuple[type[RedisClients], tuple[str, str, float]]:
        return RedisClients, (self.url, self.what, self.timeout_s)


@lru_cache(maxsize=64)
def _outage(url: str, patience_s: float) -> Outage:
    """One for all in this process who ask the same server."""
    return Outage(patience_s)
