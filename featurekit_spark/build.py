"""Calling a builder's code: a batch in, a checked value or an error per key out.

The library lifts `build_one` to batches and coroutines to the background loop, and finds the key that broke a batch.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from featurekit_spark import aio
from featurekit_spark.asking import asking, asking_in_task
from featurekit_spark.builder import Bound, FeatureBuilder, Metered
from featurekit_spark.cache.base import Entry
from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
)
from featurekit_spark.failures import FailureKind, kind_of, of_others, tagged
from featurekit_spark.fingerprint import digest, entry_id, key_json
from featurekit_spark.flight import Flight, Refusal
from featurekit_spark.results import Origin, Read, Result

__all__ = ["Built", "Keep", "build_values", "finish", "update_values"]

# A batch that fails is halved to find the keys at fault; after this many failures in a row with no success between,
# the fault is the builder's and not a key's, and the rest fails with it.
_SYSTEMIC = 16
_ERROR_TEXT = 500
_LINGER = 0.2  # seconds after which answers are written, however few


@dataclass(slots=True)
class Built:
    """What a builder returned for one key: a value, or the exception that stands for it."""

    value: Any = None
    seconds: float = 0.0
    error: Exception | None = None
    tokens: int | None = None
    usd: float | None = None
    estimated_tokens: int = 0
    attempts: int | None = None
    found: Entry | None = None  # what another run was answered meanwhile
    refused: str | None = None  # why another run was not, and nobody will be

    @property
    def elsewhere(self) -> bool:
        """Whether another run asked."""
        return self.found is not None or self.refused is not None

    def result(
        self,
        bound: Bound,
        key: tuple[Any, ...],
        now: datetime,
        *,
        inputs_hash: str | None = None,
        entry_id: str | None = None,
        until: datetime | None = None,
        reads: tuple[Read, ...] = (),
        origin: Origin = Origin.COMPUTED,
    ) -> Result:
        """Check, encode and hash the value; an error is told with builder and key."""
        own = bound.builder.freshness.expiry(now)
        until = own if until is None else min(until, own) if own is not None else until
        error = self.error
        if error is None:
            try:
                value = bound.type.checked(self.value)
                payload = None if value is None else bound.type.encode(value)
                return Result(
                    origin,
                    bound.type.hash(value, payload),
                    value=value,
                    payload=payload,
                    kind=bound.type,
                    ts=now,
                    entry_id=entry_id,
                    inputs_hash=inputs_hash,
                    until=until,
                    reads=reads,
                    seconds=self.seconds,
                    tokens=self.tokens,
                    usd=self.usd,
                    estimated_tokens=self.estimated_tokens,
                    attempts=self.attempts,
                )
            except Exception as mismatch:  # a user's codec may raise anything
                error = mismatch
        return _failure(bound, key, error, now, inputs_hash, self)


def finish(
    bound: Bound,
    keys: Sequence[tuple[Any, ...]],
    built: Sequence[Built],
    now: datetime,
    identities: Sequence[tuple[str, str]],
    lineage: Sequence[tuple[datetime | None, tuple[Read, ...]]],
    *,
    origin: Origin = Origin.COMPUTED,
) -> list[Result]:
    """Results of a batch: (inputs_hash, entry_id) and (until, reads) per key. All at once where every value fits;
    one by one where that is not so, to find which does not."""
    values = None
    if all(item.error is None for item in built):
        values = bound.type.checked_many([item.value for item in built])
    if values is None:
        return [
            item.result(
                bound, key, now, inputs_hash=inputs, entry_id=entry, until=until, reads=reads, origin=origin
            )
            for item, key, (inputs, entry), (until, reads) in zip(
                built, keys, identities, lineage, strict=True
            )
        ]
    payloads = [bound.type.encode(value) for value in values]
    hashes = bound.type.hash_many(values, payloads)
    own = bound.builder.freshness.expiry(now)
    results = []
    for i, item in enumerate(built):
        until, reads = lineage[i]
        results.append(
            Result(
                origin,
                hashes[i],
                value=values[i],
                payload=payloads[i],
                kind=bound.type,
                ts=now,
                entry_id=identities[i][1],
                inputs_hash=identities[i][0],
                until=own if until is None else min(until, own) if own is not None else until,
                reads=reads,
                seconds=item.seconds,
                tokens=item.tokens,
                usd=item.usd,
                estimated_tokens=item.estimated_tokens,
                attempts=item.attempts,
            )
        )
    return results


def _failure(
    bound: Bound, key: tuple[Any, ...], error: Exception, now: datetime, inputs: str | None, built: Built
) -> Result:
    text = key_json(key)
    inputs = inputs or digest("unread")
    answer = getattr(error, "answer", None)
    failed = Result(
        Origin.ERROR,
        None,
        payload=None if answer is None else answer.encode("utf-8", "replace"),
        error=f"{bound.name}{text}: {tagged(_told(error), error) if bound.builder.paid else _told(error)}",
        ts=now,
        inputs_hash=inputs,
        entry_id=entry_id(bound.name, bound.config_hash, text, inputs),
        seconds=built.seconds,
        tokens=built.tokens,
        usd=built.usd,
        estimated_tokens=built.estimated_tokens,
        attempts=built.attempts,
    )
    failed.cause = error
    return failed


def _told(error: Exception) -> str:
    """The error in one line; one that is not the library's own, with the line of the user's code that raised it."""
    message = str(error).strip() or "no message"
    if not isinstance(error, FeaturekitError):
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
        message = f"{type(error).__name__}: {message}{where}"
    message = message.encode("utf-8", "replace").decode()  # what others say may hold half of a character
    return message if len(message) <= _ERROR_TEXT else f"{message[: _ERROR_TEXT - 3]}..."


@dataclass(frozen=True)
class Keep:
    """Makes answers durable while a batch is still being built. `write` gets up to `size` rows and what was built for
    them, in any thread; an answer counts as lost until it returns. `flight`: where others may be asking the same."""

    size: int
    write: Callable[[list[int], list[Built]], None]
    flight: Flight | None = None


def build_values(
    bound: Bound, inputs: Mapping[str, Sequence[Any]], context: Any, keep: Keep | None = None
) -> list[Built]:
    """Values of one batch, one per row of `inputs` (columns by name, all of one length).

    An error of one key never costs the others theirs, and never repeats a paid call. A missing context attribute is
    the run's error, not a key's: it is raised. A spent budget stands for the keys it hit, and whoever called stops.
    """
    rows = len(next(iter(inputs.values())))
    view = bound.view(context)
    start = time.perf_counter()
    if type(bound.builder).build_one is not FeatureBuilder.build_one:
        built = _one_by_one(bound, inputs, view, rows, keep)
    else:
        built = _whole_batch(bound, inputs, view, rows)
    return _timed(built, start)


def update_values(
    bound: Bound, inputs: Mapping[str, Sequence[Any]], before: Mapping[str, Sequence[Any]], context: Any
) -> list[Built]:
    """As `build_values`, by the builder's `update`; a value may be an `Update`."""
    rows = len(before["value"])
    start = time.perf_counter()
    return _timed(_whole_batch(bound, inputs, bound.view(context), rows, before), start)


def _timed(built: list[Built], start: float) -> list[Built]:
    share = (time.perf_counter() - start) / max(len(built), 1)
    for item in built:
        item.seconds = share
    return built


def _one_by_one(
    bound: Bound, inputs: Mapping[str, Sequence[Any]], view: Any, rows: int, keep: Keep | None
) -> list[Built]:
    names = list(inputs)
    one = bound.builder.build_one
    keys = [dict(zip(names, values, strict=True)) for values in zip(*inputs.values(), strict=True)]
    if inspect.iscoroutinefunction(one):
        return aio.run(_all(one, keys, bound, view, keep))
    built: list[Built] = []
    kept = 0
    for number, key in enumerate(keys):
        try:
            with asking(bound.name, _key_of(bound, key)):
                value = one(key, bound.config, view)
            built.append(_built(value))
        except ContextError:
            raise
        except BudgetError as error:  # nobody is asked any more
            built.append(_built(error))
            built += [Built(error=of_others(error)) for _ in keys[number + 1 :]]
            break
        except Exception as error:
            built.append(_built(error))
        if keep is not None and len(built) - kept >= keep.size:
            keep.write(list(range(kept, len(built))), built[kept:])
            kept = len(built)
    if keep is not None and kept < len(built):
        keep.write(list(range(kept, len(built))), built[kept:])
    return built


async def _all(
    one: Any, keys: list[dict[str, Any]], bound: Bound, view: Any, keep: Keep | None
) -> list[Built]:
    """All keys of a batch at once; how many calls are really in flight is the client's affair."""
    calls = [
        asking_in_task(bound.name, _key_of(bound, key), partial(one, key, bound.config, view)) for key in keys
    ]
    batches = None if keep is None else _MicroBatches(keep)
    if batches is not None:
        calls = [batches.kept(row, call) for row, call in enumerate(calls)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    if keep is not None and keep.flight is not None:
        await keep.flight.close()
    if batches is not None and batches.failed is not None:
        raise batches.failed
    built = []
    for answer in answers:
        match answer:
            case ContextError():
                raise answer
            case Exception():
                built.append(_built(answer))
            case BaseException():
                raise answer
            case Built():
                built.append(answer)
            case _:
                built.append(_built(answer))
    return built


def _key_of(bound: Bound, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(inputs.get(field) for field in bound.key)


class _MicroBatches:
    """Answers on their way into durable files of `keep.size`. A call holds its place until its answer is in one, so
    that no more than twice that many are ever in flight or unwritten. `failed`: why one could not be written; after it
    no call is made."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._places = asyncio.Semaphore(2 * keep.size)
        self._waiting: list[tuple[int, Built, asyncio.Future[None]]] = []
        self._writes: set[asyncio.Task[None]] = set()
        self.failed: Exception | None = None

    async def kept(self, row: int, call: Coroutine[Any, Any, Any]) -> Built:
        flight = self._keep.flight
        if flight is None:
            async with self._places:
                return await self._called(row, call)
        while True:
            async with self._places:
                if self.failed is not None:
                    call.close()
                    raise self.failed
                try:
                    held = await flight.take(row)
                except Exception as error:  # nobody knows who else asks: no call is made
                    call.close()
                    if isinstance(error, FeaturekitError):
                        error.attempts = 0
                    return _built(error)
                if held is None:
                    answered, refused = False, None
                    try:
                        built = await self._called(row, call)
                        answered, refused = built.error is None, _refusal(built.error)
                        return built
                    except Exception as error:
                        refused = _refusal(error)
                        raise
                    finally:
                        await flight.end(row, answered=answered, refused=refused)
            if isinstance(held, Refusal):
                call.close()
                return Built(refused=held.error)
            # not in a place that a call could have
            found = held if isinstance(held, Entry) else await flight.wait(row, held)
            if found is not None:
                call.close()
                return Built(found=found)

    async def _called(self, row: int, call: Coroutine[Any, Any, Any]) -> Built:
        if self.failed is not None:
            call.close()
            raise self.failed
        start = time.perf_counter()
        built = _built(await call)
        built.seconds = (time.perf_counter() - start) / self._keep.size  # as many wait at the same time
        if built.error is None:
            done = asyncio.get_running_loop().create_future()
            self._waiting.append((row, built, done))
            if len(self._waiting) >= self._keep.size:
                self._write()
            elif len(self._waiting) == 1:
                asyncio.get_running_loop().call_later(_LINGER, self._write)
            await done
        return built

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            task = asyncio.get_running_loop().create_task(self._written(waiting))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _written(self, waiting: list[tuple[int, Built, asyncio.Future[None]]]) -> None:
        try:
            await asyncio.to_thread(
                self._keep.write, [row for row, _, _ in waiting], [built for _, built, _ in waiting]
            )
        except Exception as error:
            self.failed = error
            for _, _, done in waiting:
                done.set_exception(error)
        else:
            for _, _, done in waiting:
                done.set_result(None)


def _refusal(error: Exception | None) -> str | None:
    """Why nobody will be answered, as it is kept with the key; None where somebody may."""
    if error is None or kind_of(error) is not FailureKind.TERMINAL:
        return None
    return tagged(_told(error), error)


def _whole_batch(
    bound: Bound,
    inputs: Mapping[str, Sequence[Any]],
    view: Any,
    rows: int,
    before: Mapping[str, Sequence[Any]] | None = None,
) -> list[Built]:
    frames = [_frame(columns) for columns in (inputs, before) if columns is not None]
    in_a_row = 0

    def attempt(start: int, stop: int) -> list[Built]:
        nonlocal in_a_row
        parts = [frame.iloc[start:stop].reset_index(drop=True) for frame in frames]
        try:
            values = _called(bound, parts, view)
        except (BudgetError, ContextError):
            raise
        except Exception as error:
            if stop - start == 1:
                in_a_row += 1
                return [Built(error=error)]
            if in_a_row >= _SYSTEMIC:
                return [Built(error=error) for _ in range(start, stop)]
            middle = (start + stop) // 2
            return attempt(start, middle) + attempt(middle, stop)
        in_a_row = 0
        return [_built(value) for value in values]

    return attempt(0, rows)


def _called(bound: Bound, frames: list[Any], view: Any) -> list[Any]:
    """What `build` returns for one frame, `update` for two."""
    name = "build" if len(frames) == 1 else "update"
    answer = getattr(bound.builder, name)(*frames, bound.config, view)
    if isinstance(answer, Coroutine):
        answer = aio.run(answer)
    values: list[Any] = answer.to_pylist() if hasattr(answer, "to_pylist") else list(answer)
    if len(values) != len(frames[0]):
        raise BuildError(
            f"{name} returned {len(values)} values for {len(frames[0])} keys; it must return one per row"
        )
    return values


def _built(value: Any) -> Built:
    if isinstance(value, FeaturekitError):
        return Built(
            error=value,
            tokens=value.tokens,
            usd=value.usd,
            estimated_tokens=value.estimated_tokens,
            attempts=value.attempts,
        )
    if isinstance(value, Exception):
        return Built(error=value)
    if isinstance(value, Metered):
        return Built(
            value.value,
            tokens=value.tokens,
            usd=value.usd,
            estimated_tokens=value.estimated_tokens,
            attempts=value.attempts,
        )
    return Built(value)


def _frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    import pandas as pd

    return pd.DataFrame({name: _object_column(values) for name, values in columns.items()})


def _object_column(values: Sequence[Any]) -> Any:
    """Values as they are: pandas must neither spread a vector over a column nor turn None into NaN."""
    import numpy as np

    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column
