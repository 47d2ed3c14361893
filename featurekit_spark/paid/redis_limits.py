"""A rate limit shared by tasks, hosts and jobs, in Redis.

Owns one key per limit and the script that gives turns by the server's clock. Needs the extra
`featurekit-spark[redis]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from featurekit_spark.paid.limits import Rates, Turn, wait_for_turn
from featurekit_spark.paid.redis_client import RedisClients

__all__ = ["RedisLimiter"]

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


@dataclass(frozen=True)
class RedisLimiter:
    """Shared by who gives the same server and `name`; `url` is `redis://`, `rediss://` or `unix://`."""

    url: str = field(repr=False)
    name: str = ""
    rates: Rates = field(default_factory=Rates)
    timeout_s: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _clients: RedisClients = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_clients", RedisClients(self.url, "the rate limit", self.timeout_s))

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
        await self._clients.aclose()

    async def _asked(self, ask: str, amount: float = 0, tokens: float = 0) -> tuple[float, float, float]:
        """(turn, wait, resume) after what was asked for."""
        numbers = (amount, tokens, *self.rates.per_second, *self.rates.bursts)
        key = f"featurekit/limit/{self.name}"
        with self._clients.client() as client:
            script = client.register_script(_SCRIPT)  # sends nothing yet, and afterwards its hash
            answer = await script(keys=[key], args=[ask, *map(repr, map(float, numbers))])
        turn, wait, resume = (float(part) for part in answer)
        return turn, wait, resume
