"""Leases shared by tasks, hosts and jobs, in Redis.

Owns a key per lease, which ends by itself, and the scripts that give and take it. Needs the extra
`featurekit-spark[redis]`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from featurekit_spark.flight import Held, Refusal
from featurekit_spark.paid.leases import ANSWERED_S, LEASE_S
from featurekit_spark.paid.redis_client import RedisClients

__all__ = ["RedisLeases"]

_HELD: Final = "asked by "
_ANSWERED: Final = "answered by "
_REFUSED: Final = "refused to "  # and a Refusal as JSON
# What a key holds is changed by its owner alone; whoever finds nothing, or what led to nothing, owns it. One's own mark
# is there where a reply was lost: redis-py sends the script again.
_TAKE = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and held ~= ARGV[2] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return false
"""
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end"
_END = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
"""


@dataclass(frozen=True)
class RedisLeases:
    """Shared by who gives the same server; `url` is `redis://`, `rediss://` or `unix://`."""

    url: str = field(repr=False)
    lease_s: float = LEASE_S
    answered_s: float = ANSWERED_S
    timeout_s: float = 5.0
    _clients: RedisClients = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_clients", RedisClients(self.url, "leases of paid calls", self.timeout_s))

    @property
    def renew_s(self) -> float:
        return self.lease_s / 3

    async def check(self) -> None:
        await self._clients.check()

    async def take(self, name: str, owner: str, *, instead_of: str | None = None) -> Held | None:
        with self._clients.client() as client:
            asked: Any = client.eval(_TAKE, 1, _key(name), _HELD + owner, instead_of or "", _ms(self.lease_s))
            held = await asked
        if held is None:
            return None
        mark = held.decode() if isinstance(held, bytes) else str(held)
        return Held(mark, mark.startswith(_ANSWERED), _refusal(mark))

    async def renew(self, names: Collection[str], owner: str) -> None:
        with self._clients.client() as client:
            async with client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.eval(_RENEW, 1, _key(name), _HELD + owner, _ms(self.lease_s))
                await pipe.execute()

    async def end(self, name: str, owner: str, *, answered: bool, refused: str | None = None) -> None:
        told = ""
        if answered:
            told = _ANSWERED + owner
        elif refused is not None:
            told = _REFUSED + json.dumps([owner, time.time(), refused])
        with self._clients.client() as client:
            ended: Any = client.eval(_END, 1, _key(name), _HELD + owner, told, _ms(self.answered_s))
            await ended

    async def aclose(self) -> None:
        await self._clients.aclose()


def _refusal(mark: str) -> Refusal | None:
    return Refusal(*json.loads(mark.removeprefix(_REFUSED))) if mark.startswith(_REFUSED) else None


def _key(name: str) -> str:
    return f"featurekit/lease/{name}"


def _ms(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))
