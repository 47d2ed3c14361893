"""One background event loop per process, and the one sync facade over it.

Async clients live on that loop, so that sync callers work in a notebook, in a web server and in a forked Spark
worker alike. Knows nothing of features.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def _loop() -> asyncio.AbstractEventLoop:
    # Keyed by process: a forked worker inherits the dict, but not the thread that runs the parent's loop.
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="featurekit-aio", daemon=True).start()
            _loops[os.getpid()] = loop
        return loop


def _fresh_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` on the background loop and wait for its result; its exception is raised here.

    Raises RuntimeError when called from the background loop itself, which would wait for itself forever.
    """
    loop = _loop()
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        coroutine.close()
        raise RuntimeError("a sync get was called inside an async builder; await the async client instead")
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
