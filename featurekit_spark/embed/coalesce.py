"""Single questions of one event loop, collected for a few milliseconds and asked together.

Owns the collecting, and which answer goes to whom. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

__all__ = ["Coalescer", "shares"]

T = TypeVar("T")


class Coalescer(Generic[T]):
    """`send` gets up to `most` texts at a time (of together at most `longest` characters, unless one alone is longer)
    and answers each, with a value or an exception. A text waits at most `wait_s` for others.

    Belongs to the event loop that first asks.
    """

    def __init__(
        self,
        send: Callable[[list[str]], Awaitable[Sequence[T | Exception]]],
        *,
        most: int,
        longest: int,
        wait_s: float,
    ) -> None:
        self._send, self._most, self._longest, self._wait_s = send, most, longest, wait_s
        self._waiting: list[tuple[str, asyncio.Future[T]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    async def ask(self, text: str) -> T:
        """The answer to `text`; the exception that stands for it is raised."""
        loop = asyncio.get_running_loop()
        if self._waiting and self._length() + len(text) > self._longest:
            self._flush()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((text, answer))
        if len(self._waiting) >= self._most:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._flush)
        return await answer

    def _length(self) -> int:
        return sum(len(text) for text, _ in self._waiting)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        asked = [(text, answer) for text, answer in self._waiting if not answer.done()]  # else: given up
        self._waiting = []
        if asked:
            task = asyncio.get_running_loop().create_task(self._answer(asked))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _answer(self, asked: list[tuple[str, asyncio.Future[T]]]) -> None:
        try:
            found = await self._send([text for text, _ in asked])
            pairs = list(zip(asked, found, strict=True))
        except Exception as error:
            pairs = [(one, error) for one in asked]
        except BaseException:  # cancelled, or the process ends: nobody may wait forever
            for _, answer in asked:
                answer.cancel()
            raise
        for (_, answer), said in pairs:
            if answer.done():
                continue
            if isinstance(said, Exception):
                answer.set_exception(said)
            else:
                answer.set_result(said)


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` split in proportion to `weights` (not all zero), in whole numbers that add up to it."""
    ends = [0, *accumulate(weights)]
    return [total * end // ends[-1] - total * start // ends[-1] for start, end in pairwise(ends)]
