"""Traces of paid calls for people who watch prompts: what each micro-batch took, and a masked sample of its texts.

Runs in the driver's process when a run is over; nothing here can fail a run, or hold it up for longer than a limit.
Where traces go is a sink's affair.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.cache.journal import MicroBatch, MicroBatches
from featurekit_spark.failures import failure_in
from featurekit_spark.paid.masking import Masking

__all__ = ["CallTrace", "CallTracer", "SampledCall", "TraceSink", "is_sampled", "traces_in"]

_log = logging.getLogger(__name__)
MOST_TRACES: Final = 50
"""Of one run and builder, about: beyond it neighbouring micro-batches share a trace, as each takes a sink a while."""
MOST_SAMPLED: Final = 20
"""Sampled calls of one trace."""
LONGEST_TEXT: Final = 8_000
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class SampledCall:
    """One call whose texts are shown, masked. `entry_id`: by which the cache knows it; `answer` None: it failed, or its
    value is no text."""

    entry_id: str
    prompt: str | None
    answer: str | None
    error: str | None
    seconds: float
    tokens: int | None
    usd: float | None


@dataclass(frozen=True)
class CallTrace:
    """Calls of one builder and config that became durable together. `errors`: how many failed, by kind; `seconds`: of
    waiting for answers, shared among calls that waited together; `usd`: None where a call has no price."""

    builder: str
    run_id: str
    model: str | None
    started: datetime
    ended: datetime
    micro_batches: int
    calls: int
    errors: Mapping[str, int]
    tokens: int
    usd: float | None
    seconds: float
    sampled: tuple[SampledCall, ...] = ()


class TraceSink(Protocol):
    """Where traces go."""

    def open(self) -> AbstractContextManager[Callable[[CallTrace], None]]:
        """Made ready: what takes one trace after the other. Both raise what they like."""


def is_sampled(entry_id: str, share: float) -> bool:
    """The same calls on every run and machine: an entry_id is a hash."""
    return int(entry_id[:12], 16) < share * 16**12


@dataclass(frozen=True)
class CallTracer:
    """Sends the traces of a run's micro-batches to a sink, for at most `timeout_s`. An `Observer` of journals."""

    sink: TraceSink
    sample: float = 0.01
    masking: Masking = field(default_factory=Masking)
    timeout_s: float = 30.0

    def __call__(self, batches: MicroBatches, models: Mapping[str, str]) -> None:
        state = _State()
        # A sink that hangs is left behind: a daemon thread does not keep the process.
        thread = threading.Thread(
            target=self._send, args=(batches, dict(models), state), name="featurekit-tracing", daemon=True
        )
        thread.start()
        thread.join(self.timeout_s)
        state.stop.set()
        why = f"not done after {self.timeout_s:g} s" if thread.is_alive() else state.failed
        if why is not None:
            _log.warning(
                "not all calls of run %s are traced (%d traces were sent): %s. The run is not affected.",
                batches.run_id,
                state.sent,
                self.masking.text(why),
            )

    def _send(self, batches: MicroBatches, models: Mapping[str, str], state: _State) -> None:
        try:
            with self.sink.open() as send:
                for trace in traces_in(batches, models, self.sample, self.masking):
                    if state.stop.is_set():
                        return
                    send(trace)
                    state.sent += 1
        except Exception as error:  # a sink may raise anything
            state.failed = f"{type(error).__name__}: {error}"


@dataclass
class _State:
    stop: threading.Event = field(default_factory=threading.Event)
    sent: int = 0
    failed: str | None = None


def traces_in(
    batches: MicroBatches, models: Mapping[str, str], share: float, masking: Masking
) -> Iterator[CallTrace]:
    """One trace per micro-batch and builder, or per few neighbouring ones where there are very many."""
    together = max(1, math.ceil(len(batches) / MOST_TRACES))
    rest = iter(batches)
    while some := list(islice(rest, together)):
        rows = pa.concat_tables([batch.rows for batch in some], promote_options="default")
        for name in sorted(rows["builder"].unique().to_pylist()):
            of_builder = rows.filter(pc.equal(rows["builder"], name))
            for config in sorted(of_builder["config_hash"].unique().to_pylist()):
                own = of_builder.filter(pc.equal(of_builder["config_hash"], config))
                yield _trace(some, own, models.get(config), share, masking)


def _trace(
    some: list[MicroBatch], rows: pa.Table, model: str | None, share: float, masking: Masking
) -> CallTrace:
    seconds = pc.sum(rows["seconds"]).as_py() or 0.0
    failed = rows.filter(pc.equal(rows["status"], "error"))
    answered = rows.filter(pc.not_equal(rows["status"], "error"))
    kinds = Counter(_kind(text) for text in failed["error"].to_pylist())
    unpriced = answered["usd"].null_count
    ended = max(batch.written for batch in some)
    waited = min(seconds, 86_400.0)
    return CallTrace(
        rows["builder"][0].as_py(),
        some[0].run_id,
        None if model is None else masking.text(model),
        min(min(batch.written for batch in some), ended - timedelta(seconds=waited)),
        ended,
        len(some),
        len(rows),
        dict(sorted(kinds.items())),
        pc.sum(rows["tokens"]).as_py() or 0,
        None if unpriced else float(pc.sum(rows["usd"]).as_py() or 0.0),
        float(seconds),
        tuple(_sampled(rows, share, masking)),
    )


def _kind(error: str | None) -> str:
    told = failure_in(error)
    return "unknown" if told is None else told.kind.value


def _sampled(rows: pa.Table, share: float, masking: Masking) -> Iterator[SampledCall]:
    ids = rows["entry_id"].to_pylist()
    picked = sorted((i for i, entry in enumerate(ids) if is_sampled(entry, share)), key=lambda i: ids[i])
    for row in rows.take(pa.array(picked[:MOST_SAMPLED], pa.int64())).to_pylist():
        prompt, answer = masking.call(_prompt(row["key"]), _text(row["value"]))
        error = failure_in(row["error"])  # without the key, which is the prompt
        yield SampledCall(
            row["entry_id"],
            _short(prompt),
            _short(answer),
            None
            if row["status"] != "error"
            else "failed"
            if error is None
            else _short(_why(error.message, masking)),
            row["seconds"] or 0.0,
            row["tokens"],
            row["usd"],
        )


def _why(message: str, masking: Masking) -> str | None:
    """A failure's message may quote the prompt."""
    if masking.fields is not None and masking.fields.names:
        return None
    return masking.text(message)


def _prompt(key: str) -> str:
    """The text that a key is; of several fields, as JSON."""
    fields = json.loads(key)
    return fields[0] if len(fields) == 1 and isinstance(fields[0], str) else key


def _text(value: Any) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:  # an embedding
        return None


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."
