"""What is told of a run's paid calls, and that nobody pays for the telling: not a run, and not twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from featurekit_spark.budget import Budget
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import BudgetReachedError, BuildError
from featurekit_spark.paid.masking import Masking
from featurekit_spark.paid.tracing import MOST_SAMPLED, MOST_TRACES, CallTrace, CallTracer
from featurekit_spark.session import Limits, Session
from featurekit_spark.settings import mask_password
from tests.paid_shop import MICRO_BATCH, Counter, Ids, Use, World

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Listed:
    """A sink that keeps what it is sent."""

    traces: list[CallTrace] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[Callable[[CallTrace], None]]:
        yield self.traces.append


class Broken:
    def __init__(self, hold: threading.Event | None = None, after: int = 0) -> None:
        self.hold, self.after, self.sent = hold, after, 0

    @contextmanager
    def open(self) -> Iterator[Callable[[CallTrace], None]]:
        def send(trace: CallTrace) -> None:
            self.sent += 1
            if self.sent > self.after:
                if self.hold is not None:
                    self.hold.wait(60)
                raise OSError("no route to traces://me:hunter22@host")

        yield send


def watched(cache: DeltaCache, counter: Counter, tracer: CallTracer) -> Session:
    return Session(
        World(counter), cache, engine="local", limits=Limits(micro_batch=MICRO_BATCH), observer=tracer
    )


def cache_in(folder: Path) -> DeltaCache:
    return DeltaCache(str(folder / "cache"))


def test_every_call_is_in_one_trace(tmp_path: Path) -> None:
    sink, counter = Listed(), Counter(tmp_path / "calls", 30)
    session = watched(cache_in(tmp_path), counter, CallTracer(sink, sample=1.0))
    session.run(Use.over(Ids), run_id="r1", shop="a")
    assert sum(trace.calls for trace in sink.traces) == 30 == len(counter.asked())
    assert sum(trace.micro_batches for trace in sink.traces) == len(sink.traces) >= 30 / MICRO_BATCH
    assert sum(trace.usd or 0 for trace in sink.traces) == 30 * 0.25
    assert sum(trace.tokens for trace in sink.traces) == 60
    assert {(trace.builder, trace.run_id, *trace.errors) for trace in sink.traces} == {("Ask", "r1")}
    assert all(trace.started <= trace.ended for trace in sink.traces)
    shown = {call.prompt: call.answer for trace in sink.traces for call in trace.sampled}
    assert shown == {f"p{i}": f"P{i}" for i in range(30)}
    sink.traces.clear()
    session.run(Use.over(Ids), shop="a")
    assert not sink.traces, "nothing was asked"


def test_no_text_is_shown_without_a_sample(tmp_path: Path) -> None:
    sink = Listed()
    tracer = CallTracer(sink, sample=0.0)
    watched(cache_in(tmp_path), Counter(tmp_path / "calls", 9), tracer).run(Use.over(Ids), shop="a")
    assert sum(trace.calls for trace in sink.traces) == 9
    assert not any(trace.sampled for trace in sink.traces)


def test_very_many_micro_batches_share_traces_and_samples_are_few(tmp_path: Path) -> None:
    sink = Listed()
    tracer = CallTracer(sink, sample=1.0)
    prompts = 2 * MICRO_BATCH * MOST_TRACES + 50
    watched(cache_in(tmp_path), Counter(tmp_path / "calls", prompts), tracer).run(Use.over(Ids), shop="a")
    assert sum(trace.calls for trace in sink.traces) == prompts
    assert len(sink.traces) <= MOST_TRACES
    assert max(len(trace.sampled) for trace in sink.traces) <= MOST_SAMPLED


def test_failed_calls_are_told_by_kind(tmp_path: Path) -> None:
    sink = Listed()

    class Refusing(Counter):
        def call(self, prompt: str) -> None:
            super().call(prompt)
            if prompt == "p3":
                raise BuildError("the model refused p3")
            if prompt in ("p4", "p5"):
                raise OSError("connection reset")

    counter = Refusing(tmp_path / "calls", 8)
    result = watched(cache_in(tmp_path), counter, CallTracer(sink, sample=1.0)).run(Use.over(Ids), shop="a")
    assert result.status == "partial"
    failed = [trace for trace in sink.traces if trace.errors]
    assert [dict(trace.errors) for trace in failed] == [{"retryable": 2, "terminal": 1}]
    assert failed[0].calls == 3 and failed[0].usd == 0.0
    told = {call.prompt: call.error for call in failed[0].sampled}
    assert told["p3"] == "the model refused p3" and "connection reset" in str(told["p4"])
    assert sum(trace.calls for trace in sink.traces) == 8


@pytest.mark.parametrize("after", [0, 1])
def test_a_sink_that_fails_costs_a_warning(
    tmp_path: Path, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Broken(after=after)
    tracer = CallTracer(sink, masking=Masking(also=mask_password))
    session = watched(cache_in(tmp_path), Counter(tmp_path / "calls", 9), tracer)
    assert session.run(Use.over(Ids), shop="a").status == "ok"
    (warning,) = caplog.records
    assert f"({after} traces were sent)" in warning.getMessage() and "no route" in warning.getMessage()
    assert "hunter22" not in warning.getMessage()
    assert sink.sent == after + 1, "it is not tried again and again"


def test_a_sink_that_hangs_does_not_hold_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hold = threading.Event()
    try:
        tracer = CallTracer(Broken(hold), timeout_s=0.3)
        session = watched(cache_in(tmp_path), Counter(tmp_path / "calls", 9), tracer)
        assert session.run(Use.over(Ids), shop="a").status == "ok"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "not done after 0.3 s" in caplog.text
    finally:
        hold.set()


def test_a_run_that_stops_tells_once(tmp_path: Path) -> None:
    cache, counter, sink = cache_in(tmp_path), Counter(tmp_path / "calls", 20), Listed()
    session = watched(cache, counter, CallTracer(sink))
    with pytest.raises(BudgetReachedError):
        session.run(Use.over(Ids), run_id="first", budget=Budget(max_calls=8), shop="a")
    assert sum(trace.calls for trace in sink.traces) == 8
    session.run(Use.over(Ids), run_id="second", shop="a")
    per_run = {run: sum(t.calls for t in sink.traces if t.run_id == run) for run in ("first", "second")}
    assert per_run == {"first": 8, "second": 12}


def test_what_a_killed_run_paid_for_is_told_by_the_next(tmp_path: Path) -> None:
    cache, log, sink = cache_in(tmp_path), tmp_path / "calls", Listed()
    command = [sys.executable, "-m", "tests.paid_shop", cache.path, str(log), "40", "21"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = Counter(tmp_path / "again", 40)
    watched(cache, again, CallTracer(sink)).run(Use.over(Ids), run_id="next", shop="a")
    per_run = {trace.run_id: 0 for trace in sink.traces}
    for trace in sink.traces:
        per_run[trace.run_id] += trace.calls
    assert per_run.pop("next") == len(again.asked())
    (told,) = per_run.values()
    assert told == 40 - len(again.asked()), "what was durable, each call once"


def test_a_cache_without_a_journal_tells_nothing(tmp_path: Path) -> None:
    sink, counter = Listed(), Counter(tmp_path / "calls", 5)
    session = Session(World(counter), MemoryCache(), engine="local", observer=CallTracer(sink, sample=1.0))
    assert session.run(Use.over(Ids), shop="a").builders["Ask"].calls == 5
    assert not sink.traces
