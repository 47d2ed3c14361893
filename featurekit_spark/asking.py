"""Whose call a client is asked in: the key that a builder's code is called for, and how that ended.

Knows names and keys. Clients that give each answer once look here for whom they gave it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

__all__ = ["Asking", "asking", "asking_in_task", "asking_now"]


@dataclass(slots=True, eq=False)
class Asking:
    """A key that a builder's code is called for. `error`: how that ended, once it has."""

    builder: str
    key: tuple[Any, ...]
    error: BaseException | None = None


_asking: ContextVar[Asking | None] = ContextVar("asking", default=None)


def asking_now() -> Asking | None:
    """Whose code is running. What it does at once, in tasks of its own, belongs to the same."""
    return _asking.get()


@contextmanager
def asking(builder: str, key: tuple[Any, ...]) -> Iterator[None]:
    """Around a builder's code for one key."""
    own = Asking(builder, key)
    before = _asking.set(own)
    try:
        yield
    except BaseException as error:
        own.error = error
        raise
    finally:
        _asking.reset(before)


async def asking_in_task(builder: str, key: tuple[Any, ...], code: Callable[[], Awaitable[Any]]) -> Any:
    """A builder's code for one key, in a task of its own."""
    own = Asking(builder, key)
    _asking.set(own)  # of this task, and of those that it starts
    try:
        return await code()
    except BaseException as error:
        own.error = error
        raise
