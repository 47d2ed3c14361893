"""What a model's tokens cost: a price, and a table of prices by model and by the day from which they hold.

Counts in decimals, so that what calls cost adds up exactly. Must not know files, settings, nor who makes calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Context, Decimal, localcontext
from typing import Any, Final

from featurekit_spark.errors import ConfigError, UsageError

__all__ = ["Price", "PriceTable"]

_EXACT: Final = Context(prec=60)
_FIELDS: Final = ("from", "input", "output", "cached")


@dataclass(frozen=True)
class Price:
    """usd per million tokens: of prompts (`input`), of answers (`output`), and of those parts of prompts that the
    provider had in its own cache (`cached`; None: as `input`). Make it with `Price.of`."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None

    @classmethod
    def of(
        cls,
        input: object,  # noqa: A002 - as providers call it
        output: object = 0,
        cached: object = None,
    ) -> Price:
        """From numbers as they are written: 0.15 is fifteen hundredths. Raises UsageError for what is no price."""
        return cls(_amount(input), _amount(output), None if cached is None else _amount(cached))

    def times(self, share: object) -> Price:
        """A share of it: half of it where calls that may wait cost half."""
        of = _amount(share)
        with localcontext(_EXACT):
            cached = None if self.cached is None else self.cached * of
            return Price(self.input * of, self.output * of, cached)

    def usd(self, prompt_tokens: int, completion_tokens: int, cached: int = 0) -> Decimal:
        """What a call costs; `cached` of the prompt's tokens were in the provider's cache.

        Exact. Raises UsageError for negative counts, and for more cached tokens than the prompt has.
        """
        if not 0 <= cached <= prompt_tokens or completion_tokens < 0:
            raise UsageError(
                f"{prompt_tokens!r} prompt tokens, {cached!r} of them cached, and {completion_tokens!r} of the answer "
                "cannot be priced: counts are not negative, and no more are cached than there are."
            )
        with localcontext(_EXACT):
            of_cached = self.input if self.cached is None else self.cached
            amount = (prompt_tokens - cached) * self.input + cached * of_cached
            return (amount + completion_tokens * self.output).scaleb(-6)


@dataclass(frozen=True)
class _Listed:
    since: date
    price: Price


class PriceTable:
    """Prices by model, each from a day on.

    A name with `*` stands for every name that fits. A plain name stands for itself alone: `gpt-4o` as the beginning of
    `gpt-4o-mini` would charge many times its price.
    """

    def __init__(self, models: Mapping[str, Sequence[tuple[date, Price]]]) -> None:
        self._models = {
            name: sorted((_Listed(since, price) for since, price in rows), key=lambda row: row.since)
            for name, rows in models.items()
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, origin: str) -> PriceTable:
        """From `models: {name: [{from: 2024-07-18, input: 0.15, output: 0.6, cached: 0.075}, ...]}`; one price may
        stand without its list, and a price without `from` holds ever since. Raises ConfigError, naming `origin`.
        """
        models = data.get("models")
        if not isinstance(models, Mapping) or set(data) != {"models"}:
            raise ConfigError(
                f"{origin}: a table of prices has one key, models, with a list of prices per model; found "
                f"{', '.join(map(repr, data)) or 'nothing'}."
            )
        return cls({str(name): _rows(found, f"{origin}: {name}") for name, found in models.items()})

    def price(self, model: str, on: date) -> Price | None:
        """The price of a model on a day: of its own name, else of the longest pattern that fits it. None where there
        is none, or none yet on that day."""
        name = model if model in self._models else self._pattern(model)
        valid = [row.price for row in self._models.get(name or "", ()) if row.since <= on]
        return valid[-1] if valid else None

    def _pattern(self, model: str) -> str | None:
        fitting = [name for name in self._models if "*" in name and _fits(model, name)]
        return max(fitting, key=lambda name: (len(name.replace("*", "")), name), default=None)


def _fits(model: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), model, re.DOTALL) is not None


def _rows(found: object, where: str) -> list[tuple[date, Price]]:
    listed = found if isinstance(found, list) else [found]
    rows = [_row(row, where) for row in listed]
    days = [since for since, _ in rows]
    twice = next((day for day in days if days.count(day) > 1), None)
    if twice is not None:
        when = "no from" if twice == date.min else f"from: {twice}"
        raise ConfigError(f"{where}: two prices have {when}; keep one of them.")
    if not rows:
        raise ConfigError(f"{where}: the list of prices is empty; leave the model out, or give it a price.")
    return rows


def _row(found: object, where: str) -> tuple[date, Price]:
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{where}: found {found!r} where a price should be, such as {{input: 0.15, output: 0.6}}."
        )
    unknown = [name for name in found if name not in _FIELDS]
    if unknown or "input" not in found or "output" not in found:
        told = f"found {unknown[0]!r}" if unknown else f"found only {', '.join(found) or 'nothing'}"
        raise ConfigError(f"{where}: a price has input, output and maybe cached and from; {told}.")
    since = found.get("from", date.min)
    if not isinstance(since, date) or isinstance(since, datetime):
        raise ConfigError(f"{where}: from: {since!r} is no date; write it like 2026-01-31, without quotes.")
    try:
        return since, Price.of(found["input"], found["output"], found.get("cached"))
    except UsageError as error:
        raise ConfigError(f"{where}: {error}") from None


def _amount(value: object) -> Decimal:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        amount = Decimal(str(value))
        if amount.is_finite() and amount >= 0:
            return amount
    raise UsageError(f"{value!r} is no price: give usd per million tokens, 0 or more.")
