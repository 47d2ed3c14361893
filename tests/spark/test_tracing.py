"""What workers paid for is traced by the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.paid.tracing import CallTrace, CallTracer
from featurekit_spark.session import Limits, Session
from tests.letter_shop import Desk, Ids, Length

pytestmark = [pytest.mark.spark, pytest.mark.slow]


class Listed:
    """A sink that keeps what it is sent."""

    def __init__(self) -> None:
        self.traces: list[CallTrace] = []

    @contextmanager
    def open(self) -> Iterator[Callable[[CallTrace], None]]:
        yield self.traces.append


@pytest.mark.parametrize("collect_mb", [256, 0], ids=["stages", "tables"])
def test_calls_of_workers_are_traced(spark: Any, tmp_path: Path, collect_mb: int) -> None:
    sink = Listed()
    session = Session(
        Desk(refused=frozenset({"write to Grace"})),
        DeltaCache(str(tmp_path / "cache")),
        spark=spark,
        limits=Limits(in_process_keys=0, collect_mb=collect_mb, partitions=1),
        observer=CallTracer(sink, sample=1.0),
    )
    assert session.run(Length.over(Ids), run_id="r", shop="a").builders["Ask"].calls == 3
    answered = [trace for trace in sink.traces if not trace.errors]
    assert sum(trace.calls for trace in answered) == 2
    assert {call.answer for trace in answered for call in trace.sampled} == {
        "Dear Ada of old",
        "Dear Edsger of old",
    }
    failed = [dict(trace.errors) for trace in sink.traces if trace.errors]
    assert failed == ([{"terminal": 1}] if collect_mb else []), "failures of tables are not on the driver"
