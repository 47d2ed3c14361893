"""A rate limit shared by all processes of one machine, through a small file.

Owns that file. Its lock is held for microseconds and ends with its process; a turn that was given to a process that
died is lost, and nothing else.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import random
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from featurekit_spark.errors import ConfigError
from featurekit_spark.paid.limits import LocalLimiter, Rates, Timetable, Turn, wait_for_turn

__all__ = ["HostLimiter", "limits_folder"]

_FORMAT = struct.Struct("<8s4d")
_MAGIC = b"fklimit1"
_HORIZON_S = 86_400.0


def limits_folder() -> str:
    """Where this user's limits are on this machine."""
    return str(Path(tempfile.gettempdir()) / f"featurekit-limits-{os.getuid()}")


@dataclass(frozen=True)
class HostLimiter:
    """Shared by who gives the same `folder` and `name`. `now` must be one clock for all of them, as the monotonic
    clock of a machine is."""

    folder: str
    name: str
    rates: Rates
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    @property
    def path(self) -> Path:
        """The file; another one after a restart of the machine, whose clock begins anew."""
        return Path(self.folder) / f"{sha256(f'{self.name}|{_boot()}'.encode()).hexdigest()[:32]}.limit"

    async def acquire(self, requests: int = 1, tokens: int = 0) -> None:
        async def take() -> Turn:
            at, now = 0.0, 0.0

            def change(timetable: Timetable) -> Timetable:
                nonlocal at, now
                now = self.now()
                timetable = timetable.next(self.rates, now, requests, tokens)
                at = timetable.turn
                return timetable

            await self._changed(change)
            return Turn(at, at - now)

        async def resume() -> float:
            return (await self._changed(None)).resume

        await wait_for_turn(take, resume, self.sleep)

    async def correct(self, tokens: int) -> None:
        if self.rates.tokens_per_minute is not None and tokens:
            await self._changed(lambda timetable: timetable.corrected(self.rates, tokens))

    async def pause(self, seconds: float) -> None:
        await self._changed(lambda timetable: timetable.paused(self.rates, self.now(), seconds))

    def divided(self, n: int, *, one_host: bool = False) -> HostLimiter | LocalLimiter:
        """Itself on one machine: there the file is the division. On a cluster a share for each task."""
        return self if one_host else LocalLimiter(self.rates.divided(n), self.now, self.sleep)

    async def aclose(self) -> None:
        """The file is open only while it is read or written."""

    async def _changed(self, change: Callable[[Timetable], Timetable] | None) -> Timetable:
        """What the file holds, changed. Opened each time: a lock does not keep apart those who share a descriptor,
        as forked processes do."""
        try:
            file = self._open()
            try:
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        # Not a blocking wait: the holder may be a process that was stopped, and calls go on here.
                        await self.sleep(random.uniform(0.0005, 0.003))
                timetable = self._read(file)
                if change is not None:
                    timetable = change(timetable)
                    values = (timetable.turn, timetable.requests, timetable.tokens, timetable.resume)
                    os.pwrite(file, _FORMAT.pack(_MAGIC, *values), 0)
                return timetable
            finally:
                os.close(file)
        except OSError as error:
            raise ConfigError(
                f"The rate limit's file {str(self.path)!r} cannot be used ({error.strerror}): make its folder "
                "writable and its file system not full, or share the limit through Redis."
            ) from error

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            Path(self.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self.path, flags, 0o600)

    def _read(self, file: int) -> Timetable:
        """What is kept; of a new file, or one that holds something else, that nothing may go at once."""
        now = self.now()
        data = os.pread(file, _FORMAT.size + 1, 0)
        if len(data) == _FORMAT.size:
            magic, *values = _FORMAT.unpack(data)
            sound = all(math.isfinite(value) and 0 <= value < now + _HORIZON_S for value in values)
            if magic == _MAGIC and sound:
                return Timetable(*values)
        os.ftruncate(file, 0)
        return Timetable() if not data else Timetable().paused(self.rates, now, 0.0)


@cache
def _boot() -> str:
    """Which start of the machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
