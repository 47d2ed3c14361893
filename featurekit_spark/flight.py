"""One call for equal requests of runs that go on at the same time: the one that has the lease asks, the others take its
answer when it is durable.

Knows leases as a protocol, and where answers are found; what is asked, and of whom, it does not.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from featurekit_spark.cache.base import Entry
from featurekit_spark.cache.elsewhere import Elsewhere
from featurekit_spark.errors import FeaturekitError

__all__ = ["Flight", "Held", "Leases", "Refusal", "SingleFlight"]

_log = logging.getLogger(__name__)
_POLL_S: Final = 0.5
_ASKED_AT_ONCE: Final = 500  # that wait; more are asked for less often
_PATIENCE_S: Final = 600.0


@dataclass(frozen=True)
class Refusal:
    """Why `owner` got no answer, and nobody will: `error`, as it is kept with a key. `at`: in seconds since 1970."""

    owner: str
    at: float
    error: str


@dataclass(frozen=True)
class Held:
    """Who has a lease, in the server's words; `answered`: nobody, it is known that the answer is there; `refusal`:
    nobody, it is known that there will be none."""

    mark: str
    answered: bool
    refusal: Refusal | None = None


class Leases(Protocol):
    """Who may ask, by name. A lease ends by itself when it is not renewed in time."""

    @property
    def renew_s(self) -> float:
        """How often a lease has to be renewed."""

    async def check(self) -> None:
        """Raises ServiceError where nobody can be asked, ConfigError where nobody ever will be."""

    async def take(self, name: str, owner: str, *, instead_of: str | None = None) -> Held | None:
        """None where the lease is `owner`'s from now on, or was already. `instead_of`: the mark of one that led to no
        answer. Raises as `check`."""

    async def renew(self, names: Collection[str], owner: str) -> None:
        """Keep leases for another while."""

    async def end(self, name: str, owner: str, *, answered: bool, refused: str | None = None) -> None:
        """Give a lease back; with `answered`, or why nobody is (`refused`), everybody else is told so for a while."""


@dataclass(frozen=True)
class SingleFlight:
    """Of one run. Travels to workers. `place`: what runs that see each other's answers have in common; `patience_s`:
    for how long another's answer is waited for before the call is made all the same; `began`: when the run read what
    had been refused before, in seconds since 1970."""

    leases: Leases
    elsewhere: Elsewhere
    place: str
    run_id: str
    poll_s: float = _POLL_S
    patience_s: float = _PATIENCE_S
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    began: float = field(default_factory=time.time)

    def of(
        self,
        builder: str,
        identities: Sequence[str],
        lives: Callable[[Entry], bool],
        *,
        refusals: bool = True,
    ) -> Flight:
        """For the calls of one batch: the entry_id of each row. `lives`: whether an answer is one still; `refusals`:
        whether what others were refused is not asked here."""
        return Flight(self, builder, list(identities), lives, refusals)

    def stands(self, refusal: Refusal) -> bool:
        """Whether a refusal is another run's that the cache could not tell of: it is younger than this run, or its own
        run goes on. An older one that the cache does not tell of was taken out. One's own is lost with the task that
        asked, and has no entry."""
        run_id = refusal.owner.rpartition("/")[0]
        if run_id == self.run_id:
            return False
        return refusal.at >= self.began or self.elsewhere.goes_on(run_id)


class Flight:
    """The calls of one batch. For each: `take`, and where that gives None, the call and `end`; where it gives who makes
    it, `wait`, and where nobody answered meanwhile, from the beginning. `close` at the end of the batch."""

    def __init__(
        self,
        shared: SingleFlight,
        builder: str,
        identities: list[str],
        lives: Callable[[Entry], bool],
        refusals: bool = True,
    ) -> None:
        self._shared, self._builder, self._identities, self._lives = shared, builder, identities, lives
        self._refusals = refusals
        self._owner = f"{shared.run_id}/{uuid.uuid4().hex}"
        self._since: dict[int, float] = {}  # rows that others had a lease for
        self._fruitless: dict[int, str] = {}
        self._held: set[str] = set()
        self._waiting: dict[int, tuple[Held, asyncio.Future[Entry | None]]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._polls: set[asyncio.Task[None]] = set()
        self._warned = False

    async def take(self, row: int) -> Held | Entry | Refusal | None:
        """None: the call is to be made, here and now. An entry: it is answered; a refusal: it never will be. Else who
        makes it."""
        since = self._since.get(row)
        name = self._name(row)
        held = await self._shared.leases.take(name, self._owner, instead_of=self._fruitless.get(row))
        while held is not None and held.refusal is not None:
            if self._refusals and await asyncio.to_thread(self._shared.stands, held.refusal):
                return held.refusal
            self._fruitless[row] = held.mark
            held = await self._shared.leases.take(name, self._owner, instead_of=held.mark)
        if held is not None:
            if since is None:
                self._since[row] = self._shared.clock()
            elif self._shared.clock() - since > self._shared.patience_s:
                _log.warning(
                    "%s: %s answered nothing in time; it is asked here as well", self._builder, held.mark
                )
                return None
            return held
        self._held.add(name)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew())
        if since is not None:  # its owner may have died after its answer was durable
            found = await self._look([self._identities[row]], [self._identities[row]])
            if found:
                await self.end(row, answered=True)
                return found[self._identities[row]]
        return None

    async def wait(self, row: int, held: Held) -> Entry | None:
        """The answer of whoever has the lease, if it came soon."""
        done = asyncio.get_running_loop().create_future()
        self._waiting[row] = (held, done)
        if len(self._waiting) == 1:
            poll = asyncio.get_running_loop().create_task(self._poll())
            self._polls.add(poll)
            poll.add_done_callback(self._polls.discard)
        found: Entry | None = await done
        if found is None and held.answered:
            self._fruitless[row] = held.mark
        return found

    async def end(self, row: int, *, answered: bool, refused: str | None = None) -> None:
        """The call was made. An answer that is durable is kept whatever becomes of the lease."""
        name = self._name(row)
        if name in self._held:
            self._held.discard(name)
            with self._kept_going():
                await self._shared.leases.end(name, self._owner, answered=answered, refused=refused)

    async def close(self) -> None:
        """Nobody renews or looks any more."""
        tasks = [*self._polls, *([] if self._renewing is None else [self._renewing])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    def _name(self, row: int) -> str:
        return f"{self._shared.place}/{self._identities[row]}"

    async def _renew(self) -> None:
        while self._held:
            await asyncio.sleep(self._shared.leases.renew_s)
            with self._kept_going():
                await self._shared.leases.renew(sorted(self._held), self._owner)

    async def _poll(self) -> None:
        """Look for all that wait at once, and then let those ask again that found nothing."""
        await asyncio.sleep(self._shared.poll_s * max(1.0, len(self._waiting) / _ASKED_AT_ONCE))
        waiting, self._waiting = self._waiting, {}
        ids = {row: self._identities[row] for row in waiting}
        stored = [ids[row] for row, (held, _) in waiting.items() if held.answered]
        try:
            found = await self._look(list(ids.values()), stored)
        except Exception as error:
            for _, done in waiting.values():
                done.set_exception(error)
            return
        for row, (_, done) in waiting.items():
            if not done.done():
                done.set_result(found.get(ids[row]))

    async def _look(self, journaled: Sequence[str], stored: Sequence[str]) -> Mapping[str, Entry]:
        found = await asyncio.to_thread(self._shared.elsewhere.find, self._builder, journaled, stored)
        return {entry_id: entry for entry_id, entry in found.items() if self._lives(entry)}

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        """An error of the server that keeps leases is one warning: others may pay for the same, no answer is lost."""
        try:
            yield
        except FeaturekitError as error:
            if not self._warned:
                self._warned = True
                _log.warning("leases of %s cannot be kept, others may ask the same: %s", self._builder, error)
