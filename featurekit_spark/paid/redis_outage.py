"""Whether a server that may be hanging is asked at all: once it has answered nobody for a while it is left alone, and
then asked by one.

Knows times; what is asked, and why there was no answer, it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Outage"]


@dataclass
class Outage:
    """Of one server, shared by all who ask it: each asks `may_ask`, and says afterwards what came of it.

    Whoever finds no answer `patience_s` after the server was last heard of stops all for `pause_s`; then one asks, and
    decides for all. A server that is away for less is asked as if nothing were: who waits for it may still be answered.
    """

    patience_s: float
    pause_s: float = 10.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    why: str = ""
    _heard: float = float("-inf")
    _since: float | None = None  # from when on nothing was answered
    _until: float | None = None
    _probing: bool = False

    def may_ask(self) -> bool:
        if self._until is None:
            return True
        if self._probing or self.clock() < self._until:
            return False
        self._probing = True
        return True

    def answered(self) -> None:
        self._heard = self.clock()
        self._since = self._until = None
        self._probing = False

    def unanswered(self, began: float, why: str) -> None:
        """`began`: when it was asked."""
        if self._since is None:
            self._since = max(began, self._heard)
        now = self.clock()
        if now - self._since >= self.patience_s:
            self._until, self.why = now + self.pause_s, why
        self._probing = False

    def undecided(self) -> None:
        """Whoever asked went away before there was an answer."""
        self._probing = False
