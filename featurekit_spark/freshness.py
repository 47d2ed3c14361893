"""How fresh a feature must be, and what stands in where there is none: the one home of ttl.

Pure: knows durations and instants, not builders, caches or clocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from featurekit_spark.errors import DefinitionError

__all__ = ["NO_FALLBACK", "Freshness", "duration"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class _NoFallback:
    def __repr__(self) -> str:
        return "NO_FALLBACK"


NO_FALLBACK: Final = _NoFallback()
"""Stands for "nothing stands in"; `None` would itself be a legitimate fallback."""


def duration(text: str | timedelta) -> timedelta:
    """`"90s"`, `"15m"`, `"6h"`, `"30d"`, `"2w"` or a timedelta, as a timedelta.

    Raises DefinitionError for anything else.
    """
    if isinstance(text, timedelta):
        return text
    found = re.fullmatch(r"(\d+)\s*([smhdw])", text)
    if not found:
        raise DefinitionError(
            f"{text!r} is no duration; write a whole number and a unit: '90s', '15m', '6h', '30d' or '2w'"
        )
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class Freshness:
    """`ttl`: how long an entry answers after it was computed (None: for as long as its inputs stand).

    `fallback`: served with status `fallback` where a feature failed or is missing; never stored as a value.
    """

    ttl: str | timedelta | None = None
    mode: Literal["batched", "jit"] = "batched"
    source: str | None = None
    fallback: Any = NO_FALLBACK

    def __post_init__(self) -> None:
        if self.ttl is not None:
            object.__setattr__(self, "ttl", duration(self.ttl))

    def expiry(self, ts: datetime) -> datetime | None:
        """The instant from which an entry computed at `ts` no longer answers; None is never."""
        return ts + self.ttl if isinstance(self.ttl, timedelta) else None
