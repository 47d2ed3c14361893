"""A rate limit shared by tasks, hosts and jobs, in Redis.

Owns one key per limit and the script that gives turns by the server's clock. Needs the extra
`featurekit-spark[redis]`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.paid.limits import Rates, Turn, wait_for_turn

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = ["RedisLimiter"]

_RETRIES = 2

# The same arithmetic as `Timetable`, where all share one clock. `ask` is one of: turn, resume, correct, pause.
_SCRIPT = """
local key, ask, amount, tokens = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local rate = {tonumber(ARGV[4]), tonumber(ARGV[5])}
local burst = {tonumber(ARGV[6]), tonumber(ARGV[7])}
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local kept = redis.call('HMGET', key, 'turn', 'requests', 'tokens', 'resume')
local turn, resume = tonumber(kept[1] or '0'), tonumber(kept[4] or '0')
local paid_off = {tonumber(kept[2] or '0'), tonumber(kept[3] or '0')}
if ask == 'turn' then
  local asked = {amount, tokens}
  turn = math.max(now, turn, resume)
  for i = 1, 2 do
    if rate[i] > 0 and asked[i] > 0 then
      turn = math.max(turn, paid_off[i] - math.max(0, burst[i] - asked[i]) / rate[i])
    end
  end
  for i = 1, 2 do
    if rate[i] > 0 and asked[i] > 0 then
      paid_off[i] = math.max(paid_off[i], turn) + asked[i] / rate[i]
    end
  end
elseif ask == 'correct' then
  if rate[2] > 0 then paid_off[2] = paid_off[2] + tokens / rate[2] end
elseif ask == 'pause' and now + amount > resume then
  resume = now + amount
  for i = 1, 2 do
    if rate[i] > 0 then paid_off[i] = math.max(paid_off[i], resume + burst[i] / rate[i]) end
  end
end
local function text(number) return string.format('%.6f', number) end
if ask ~= 'resume' then
  redis.call('HSET', key, 'turn', text(turn), 'requests', text(paid_off[1]), 'tokens', text(paid_off[2]),
             'resume', text(resume))
  local last = math.max(turn, resume, paid_off[1], paid_off[2])
  redis.call('PEXPIRE', key, math.ceil((math.max(0, last - now) + 60) * 1000))
end
return {text(turn), text(turn - now), text(resume)}
"""


@dataclass
class _Scripts:
    by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def __reduce__(self) -> tuple[type[_Scripts], tuple[()]]:
        return _Scripts, ()  # a connection does not travel


@dataclass(frozen=True)
class RedisLimiter:
    """Shared by who gives the same server and `name`; `url` is `redis://`, `rediss://` or `unix://`."""

    url: str = field(repr=False)
    name: str = ""
    rates: Rates = field(default_factory=Rates)
    timeout_s: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _scripts: _Scripts = field(default_factory=_Scripts, compare=False, repr=False)

    async def acquire(self, requests: int = 1, tokens: int = 0) -> None:
        async def take() -> Turn:
            at, wait_s, _ = await self._asked("turn", requests, tokens)
            return Turn(at, wait_s)

        async def resume() -> float:
            return (await self._asked("resume"))[2]

        await wait_for_turn(take, resume, self.sleep)

    async def correct(self, tokens: int) -> None:
        if self.rates.tokens_per_minute is not None and tokens:
            await self._asked("correct", tokens=tokens)

    async def pause(self, seconds: float) -> None:
        await self._asked("pause", seconds)

    def divided(self, n: int, *, one_host: bool = False) -> RedisLimiter:
        """Itself: all tasks share the server."""
        return self

    async def aclose(self) -> None:
        script = self._scripts.by_loop.pop(asyncio.get_running_loop(), None)
        if script is not None:
            await script.registered_client.aclose()

    async def _asked(self, ask: str, amount: float = 0, tokens: float = 0) -> tuple[float, float, float]:
        """(turn, wait, resume) after what was asked for."""
        numbers = (amount, tokens, *self.rates.per_second, *self.rates.bursts)
        key = f"featurekit/limit/{self.name}"
        async with self._script() as script:
            answer = await script(keys=[key], args=[ask, *map(repr, map(float, numbers))])
        turn, wait, resume = (float(part) for part in answer)
        return turn, wait, resume

    @asynccontextmanager
    async def _script(self) -> AsyncIterator[Any]:
        """The script at the running loop's client, with redis-py's errors translated into ours."""
        try:
            import redis
        except ImportError as error:
            raise ConfigError(
                "A rate limit in Redis needs the extra: pip install 'featurekit-spark[redis]'."
            ) from error
        loop = asyncio.get_running_loop()
        script = self._scripts.by_loop.get(loop)
        if script is None:
            script = self._scripts.by_loop[loop] = self._connected().register_script(_SCRIPT)
        client: Any = script.registered_client
        known = client.connection_pool.connection_kwargs
        where = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        try:
            yield script
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(f"Redis at {where} refused the user or the command: {error}.") from error
        except redis.RedisError as error:
            raise ServiceError(
                f"the rate limit in Redis at {where} cannot be asked: {error} Is it running?"
            ) from error

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
                f"the rate limit's Redis address is none ({error}): write redis://host:6379/0."
            ) from None
