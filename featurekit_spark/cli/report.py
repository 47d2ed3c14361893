"""What is said of a run when it ends: one JSON object for programs, a small table for people.

Knows results and outcomes; prints nothing itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, Literal

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.wording import counted, counts_table

if TYPE_CHECKING:
    from featurekit_spark.execute import Execution
    from featurekit_spark.pipelines.logic import LogicOutcome
    from featurekit_spark.records import EarlyEnd
    from featurekit_spark.results import Counts
    from featurekit_spark.session import RunResult
    from featurekit_spark.settings import Settings

__all__ = ["RunReport"]

_SHOWN_ERRORS = 5
_FAILURES = ("retryable", "terminal", "quota", "remembered")
_QUALITY = {"kept": "answers kept from before, because this run failed for them"}


class RunReport:
    """Filled in as the run goes on, so that one that fails tells how far it came."""

    def __init__(self, *, merchant: str, market: str, run_id: str, run_date: date | None = None) -> None:
        self.code: int = ExitCode.OK
        self.run_id = run_id
        self.started = self.ended = datetime.now(UTC)
        self.errors: Mapping[str, str] = {}
        self.settings: Settings | None = None  # None: they could not be read
        self.execution: Any = None
        self._start = time.perf_counter()
        self.facts: dict[str, Any] = {
            "status": "failed",
            "run_id": run_id,
            "run_date": run_date.isoformat() if run_date else None,
            "merchant": merchant,
            "market": market,
            "products": None,
            "wall_seconds": 0.0,
            "builders": {},
            "failures": _failures([]),
            "sinks": {},
            "quality": {},
            "unchanged": False,
            "paid_twice": {"calls": 0, "tokens": 0, "usd": 0.0},
            "warnings": [],
        }

    @property
    def status(self) -> str:
        """ok, partial (some keys have no answer of this run), stopped (its budget is reached) or failed."""
        return str(self.facts["status"])

    def computed(self, result: RunResult) -> None:
        """Everything is computed and kept; nothing is published yet."""
        self.errors, self.execution = result.errors, result.execution
        self.facts |= {
            "run_id": result.run_id,
            "products": result.keys,
            "builders": {name: _counts(counts) for name, counts in result.builders.items()},
            "failures": _failures(result.builders.values()),
            "unchanged": result.unchanged,
            "paid_twice": asdict(result.paid_twice),
            "warnings": list(result.warnings),
        }

    def came_to(self, execution: Execution | None, end: EarlyEnd | None) -> None:
        """Something was computed; where the run fails, this is how far it came."""
        if self.execution is None and execution is not None:
            self.execution = execution
            done = execution.counts() if end is None else end.builders
            self.facts["builders"] = {name: _counts(counts) for name, counts in done.items()}
            self.facts["failures"] = _failures(done.values())
        if end is not None:
            self.facts["paid_twice"] = asdict(end.paid_twice)
            self.facts["warnings"] = end.paid_twice.told()

    def done(self, outcome: LogicOutcome) -> None:
        """The run came to its end."""
        self.computed(outcome.result)
        self.facts |= {
            "status": outcome.result.status,
            "sinks": dict(outcome.sinks),
            "quality": dict(outcome.quality),
        }
        self.code = ExitCode.OK if outcome.result.status == "ok" else ExitCode.PARTIAL
        self._stop()

    def failed(self, message: str, code: int, *, status: Literal["failed", "stopped"] = "failed") -> None:
        """The run ended before its end; stopped by its own limit, or failed."""
        self.facts |= {"status": status, "error": message, "exit_code": int(code)}
        self.code = code
        self._stop()

    def json(self) -> str:
        """One line; ASCII, because some readers take U+2028 for the end of a line."""
        return json.dumps(self.facts)

    def text(self) -> str:
        """The facts for a person."""
        facts = self.facts
        day = f" {facts['run_date']}" if facts["run_date"] else ""
        products = counted(facts["products"], "product")
        lines = [
            f"{facts['merchant']} {facts['market']}{day}: {products}, {facts['status']} in "
            f"{facts['wall_seconds']:.1f} s (run {facts['run_id']})"
            + (", nothing had changed" if facts["unchanged"] else "")
        ]
        lines += counts_table(facts["builders"])
        lines += _told_failures(facts["failures"])
        lines += _told_attempts(facts["builders"].values())
        for name, sink in facts["sinks"].items():
            lines.append(f"  sink {name}: {sink['status']}, {counted(sink['rows'], 'row')}")
        told = ", ".join(
            f"{count} {_QUALITY.get(name, name.replace('_', ' '))}"
            for name, count in facts["quality"].items()
            if count or name == "rows"
        )
        page = [f"  page: {facts['page']}"] if "page" in facts else []
        return "\n".join([*lines, f"  data: {told}", *page])

    def problems(self) -> Iterator[str]:
        """What looks wrong, then the first keys that failed, a line each, and how many more there are."""
        for warning in self.facts["warnings"]:
            yield f"warning: {warning}"
        for key, error in list(self.errors.items())[:_SHOWN_ERRORS]:
            yield f"failed: {key}: {error}"
        more = len(self.errors) - _SHOWN_ERRORS
        if more > 0:
            yield f"failed: {more} more keys; --export-failed writes all of them to a table"

    def _stop(self) -> None:
        self.ended = datetime.now(UTC)
        self.facts["wall_seconds"] = round(time.perf_counter() - self._start, 3)


def _counts(counts: Counts) -> dict[str, Any]:
    return {
        "hit": counts.hit,
        "computed": counts.computed,
        "updated": counts.updated,
        "error": counts.error,
        "empty": counts.empty,
        "calls": counts.calls,
        "tokens": counts.tokens,
        "usd": None if counts.usd is None else round(counts.usd, 6),
        "seconds": round(counts.seconds, 3),
        "attempts": counts.attempts,
        "failed_attempts": counts.failed_attempts,
        "estimated_tokens": counts.estimated_tokens,
        **({"failures": _failures([counts])} if any(_failures([counts]).values()) else {}),
    }


def _failures(counts: Iterable[Counts]) -> dict[str, int]:
    """Keys at which paid builders failed, by kind; `remembered` are those of them that were not asked again."""
    parts = list(counts)
    return {name: sum(getattr(own, name) for own in parts) for name in _FAILURES}


def _told_attempts(builders: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    counts = list(builders)
    calls, attempts, failed = (
        sum(own[name] for own in counts) for name in ("calls", "attempts", "failed_attempts")
    )
    if attempts > calls:
        told = f"{failed} of {attempts} requests for paid keys led to no answer"
        yield f"  {told}; what is known of their cost is counted"


def _told_failures(failures: Mapping[str, int]) -> Iterator[str]:
    again = failures["retryable"] + failures["quota"]
    if again:
        yield f"  {counted(again, 'paid key')} got no answer: the next run asks again, as does `featurekit retry`"
    if failures["terminal"]:
        keys, before = counted(failures["terminal"], "paid key"), failures["remembered"]
        yield (
            f"  {keys} refused for good ({before} of them before): only `featurekit retry --errors terminal` asks "
            "again"
        )
