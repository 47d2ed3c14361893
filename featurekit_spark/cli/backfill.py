"""`featurekit run --backfill FROM..TO`: one run per date, oldest first, until one fails or stops.

Owns the range and where to go on; what a run is, it must not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.report import RunReport
from featurekit_spark.cli.shared import aside

__all__ = ["Dates", "path_of_day", "run_each"]


@dataclass(frozen=True)
class Dates:
    """All dates from `first` to `last`, both included."""

    first: date
    last: date

    @classmethod
    def parse(cls, text: str) -> Dates:
        """From `2026-01-01..2026-01-31`; typer's own error for anything else."""
        first, dots, last = text.partition("..")
        try:
            dates = cls(date.fromisoformat(first), date.fromisoformat(last))
        except ValueError as error:
            what = str(error) if dots else "there is no .. in it"
            raise typer.BadParameter(f"{text!r}: {what}; write 2026-01-01..2026-01-31.") from None
        if dates.last < dates.first:
            raise typer.BadParameter(f"{text!r}: ends before it begins; write the earlier date first.")
        return dates

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"

    def __len__(self) -> int:
        return (self.last - self.first).days + 1

    def __iter__(self) -> Iterator[date]:
        return (self.first + timedelta(days) for days in range(len(self)))


def path_of_day(path: str, day: date) -> str:
    """`path` with the day in its name, where it is a file that the next day's run would replace."""
    stem, dot, ending = path.rpartition(".")
    return f"{stem}-{day}{dot}{ending}" if dot and ending in ("csv", "parquet") else path


def run_each(dates: Dates, run: Callable[[date], RunReport]) -> int:
    """The exit code: of the run that failed or stopped at its budget, else 5 where any was partial, else 0.

    Says where to go on.
    """
    codes = []
    for done, day in enumerate(dates):
        try:
            report = run(day)
        except KeyboardInterrupt:
            _told(dates, done, day)
            raise
        if report.status in ("failed", "stopped"):
            _told(dates, done, day)
            return int(report.code)
        codes.append(report.code)
    return int(ExitCode.PARTIAL if ExitCode.PARTIAL in codes else ExitCode.OK)


def _told(dates: Dates, done: int, day: date) -> None:
    rest = Dates(day, dates.last)
    aside(f"backfill: stopped at {day}, {done} of {len(dates)} dates are done; go on with --backfill {rest}")
