"""Leases among the runs of one process: what `RedisLeases` does for hosts and jobs, without a server.

Knows names and owners; what is leased, it does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from featurekit_spark.flight import Held, Refusal

__all__ = ["ANSWERED_S", "LEASE_S", "LocalLeases"]

LEASE_S: Final = 30.0
"""Seconds after which a lease ends that nobody renews: its owner died."""
ANSWERED_S: Final = 6 * 3600.0
"""Seconds for which others are told that there is an answer, or never will be: as long as a run may go on that looked
before that was known."""


@dataclass(frozen=True)
class LocalLeases:
    """Shared by who holds this very object, in any thread; a copy that travelled shares with nobody."""

    lease_s: float = LEASE_S
    answered_s: float = ANSWERED_S
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    _held: dict[str, tuple[Held, float]] = field(default_factory=dict, compare=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def renew_s(self) -> float:
        return self.lease_s / 3

    async def check(self) -> None:
        """It is there."""

    async def take(self, name: str, owner: str, *, instead_of: str | None = None) -> Held | None:
        with self._lock:
            held, until = self._held.get(name, (None, 0.0))
            if held is not None and held.mark not in (owner, instead_of) and self.clock() < until:
                return held
            self._held[name] = (Held(owner, False), self.clock() + self.lease_s)
            return None

    async def renew(self, names: Collection[str], owner: str) -> None:
        with self._lock:
            for name in names:
                if self._is_held(name, owner):
                    self._held[name] = (Held(owner, False), self.clock() + self.lease_s)

    async def end(self, name: str, owner: str, *, answered: bool, refused: str | None = None) -> None:
        with self._lock:
            if not self._is_held(name, owner):
                return
            if answered:
                known = Held(f"answered by {owner}", True)
            elif refused is not None:
                known = Held(f"refused to {owner}", False, Refusal(owner, self.wall(), refused))
            else:
                del self._held[name]
                return
            self._held[name] = (known, self.clock() + self.answered_s)

    def _is_held(self, name: str, owner: str) -> bool:
        return name in self._held and self._held[name][0].mark == owner

    def __reduce__(self) -> Any:
        return LocalLeases, (self.lease_s, self.answered_s, self.clock, self.wall)
