"""An event loop whose time passes only by sleeping: hours of waiting take no time, and the same always happens.

    virtual_run(main())

For code that waits by `asyncio.sleep` and asks `loop.time()`; not for sockets, threads or processes.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualLoop", "virtual_run"]

T = TypeVar("T")


class _NoWait(selectors.DefaultSelector):
    """Instead of waiting for a timer, makes it due."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits for something that no timer brings")
        self.loop.elapsed += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 0 seconds."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        super().__init__(_NoWait(self))

    def time(self) -> float:
        return self.elapsed


def virtual_run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
