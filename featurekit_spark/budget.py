"""What a run may still pay: limits on calls and on money, granted before calls are made and counted after.

Counts only. Knows builders by name, and neither how a call is made nor what is kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featurekit_spark.errors import BudgetReachedError, ConfigError, FeaturekitError

__all__ = ["Budget", "Purse"]

_MICRO = 1e-9  # usd are sums of floats: what is less than this is nothing
_BLIND = 8
_MANY = 2**31


@dataclass(frozen=True)
class Budget:
    """At most so many paid calls, and so much for them, in one run. None is no limit.

    `no_new_calls`: what was paid for is answered, and where anything is missing the run says what, and does not begin.
    """

    max_calls: int | None = None
    max_usd: float | None = None
    no_new_calls: bool = False

    @property
    def limited(self) -> bool:
        return self.no_new_calls or self.max_calls is not None or self.max_usd is not None

    def __str__(self) -> str:
        parts = {
            "max_calls": self.max_calls,
            "max_usd": self.max_usd,
            "no_new_calls": self.no_new_calls or None,
        }
        return ", ".join(f"{name}={limit}" for name, limit in parts.items() if limit is not None)


class Purse:
    """What is left of a run's budget.

    Nothing tells a call's price beforehand, so that the dearest call so far stands for the next. `dearest`: per builder
    that price, None where its answers are known to carry none.
    """

    def __init__(self, budget: Budget, *, dearest: Mapping[str, float | None] | None = None) -> None:
        self.budget = budget
        self.dearest: dict[str, float | None] = dict(dearest or {})
        self.calls, self.usd = 0, 0.0
        self._answered: dict[str, int] = dict.fromkeys(self.dearest, _MANY)

    def grant(self, builder: str, wanted: int) -> int:
        """How many of the `wanted` calls of a paid builder may be made now; 0 is the end of the run, see `ended`."""
        granted = 0 if self.budget.no_new_calls else wanted
        if self.budget.max_calls is not None:
            granted = min(granted, self.budget.max_calls - self.calls)
        if self.budget.max_usd is not None:
            granted = min(granted, self._affordable(builder))
        return max(granted, 0)

    def charge(
        self, builder: str, prices: Iterable[float | None], failed: Sequence[float | None] = ()
    ) -> None:
        """Count calls that were made: the price of each answer (None: it carries none), and what is known of each that
        failed. It counts as the dearest one, or as more where it is known to have cost more.
        """
        paid = list(prices)
        self.calls += len(paid) + len(failed)
        self._answered[builder] = self._answered.get(builder, 0) + len(paid) + len(failed)
        if any(price is None for price in paid):
            self.dearest[builder] = None
        known = [price for price in paid if price is not None]
        before = self.dearest.get(builder, 0.0)
        if known and before is not None:
            self.dearest[builder] = max(before, *known)
        dearest = self.dearest.get(builder) or 0.0
        self.usd += sum(known) + sum(max(usd or 0.0, dearest) for usd in failed)

    def charge_sum(self, builder: str, calls: int, usd: float | None) -> None:
        """Count calls of which only the sum is known; None: not even that, and each counts as the dearest."""
        self.calls += calls
        before = self.dearest.get(builder)
        self.usd += calls * (before or 0.0) if usd is None else usd
        if calls and usd is not None and before is not None:
            self.dearest[builder] = max(before, usd / calls)

    def prices(self, builder: str) -> bool:
        """Whether there is a price to reckon with, or none is needed."""
        return self.budget.max_usd is None or builder in self.dearest

    def ended(self, builder: str) -> FeaturekitError:
        """Why nothing more was granted."""
        if self._unpriced(builder):
            return ConfigError(
                f"max_usd={self.budget.max_usd} cannot be kept: the answers of {builder} carry no price (usd). What "
                "was paid for is kept; limit the calls instead (max_calls), or give the client prices."
            )
        return BudgetReachedError(
            f"the run stopped at its budget, {self.budget}, after {self.calls} calls and {self._spent()}, with "
            f"calls of {builder} left to make. What was paid for is kept; run again to go on from there."
        )

    def _spent(self) -> str:
        known = f"{self.usd:.4g} usd"
        if all(price is not None for price in self.dearest.values()):
            return known
        return f"{known} and calls without a price" if self.usd else "a price that nobody knows"

    def _unpriced(self, builder: str) -> bool:
        return self.budget.max_usd is not None and self.dearest.get(builder, 0.0) is None

    def _affordable(self, builder: str) -> int:
        """As many calls as the rest pays for at the dearest price, and at first no more than were answered before: one
        call may be cheaper than all others."""
        assert self.budget.max_usd is not None  # the only limit that asks
        left = self.budget.max_usd - self.usd
        answered = self._answered.get(builder, 0)
        if self._unpriced(builder) or left < -_MICRO:
            return 0
        price = self.dearest.get(builder)
        if price is None:  # nothing was answered yet
            return min(1 + answered, _BLIND) if left > _MICRO else 0
        return min(math.floor((left + _MICRO) / price) if price else _MANY, max(answered, 1))
