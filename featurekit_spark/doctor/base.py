"""What a check is: a name, how it went, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Check", "Status", "fail", "ok", "warn", "worst"]


class Status(StrEnum):
    """`warn`: works, but slower, or not for everyone; `fail`: a run would fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `advice` is empty where there is nothing to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Check:
    """Everything is as it should be."""
    return Check(name, Status.OK, found)


def warn(name: str, found: str, advice: str) -> Check:
    """Something to know."""
    return Check(name, Status.WARN, found, advice)


def fail(name: str, found: str, advice: str) -> Check:
    """Something that a run would stumble over."""
    return Check(name, Status.FAIL, found, advice)


def worst(checks: Iterable[Check]) -> Status:
    """The worst status among checks."""
    order = list(Status)
    return max((check.status for check in checks), key=order.index, default=Status.OK)
