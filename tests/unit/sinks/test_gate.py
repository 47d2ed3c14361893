"""The publish gate's comparison and its message."""

from __future__ import annotations

import pytest

from featurekit_spark.errors import PublishGateError
from featurekit_spark.sinks import PublishedState, check_gate

BEFORE = PublishedState("run-1", rows=10, covered=8)


def gate(previous: PublishedState | None, rows: int, covered: int, rows_max: float | None = 0.3) -> None:
    check_gate(previous, rows, covered, max_row_drop=rows_max, max_coverage_drop=0.5)


def test_what_passes() -> None:
    gate(None, 0, 0)
    gate(PublishedState("run-0", 0, 0), 0, 0)
    gate(BEFORE, 10, 8)
    gate(BEFORE, 100, 100)
    gate(BEFORE, 7, 4)  # exactly 30 % fewer
    gate(PublishedState("run-1", 10, 0), 10, 0)


def test_fewer_rows_than_allowed() -> None:
    with pytest.raises(PublishGateError) as caught:
        gate(BEFORE, 6, 6)
    message = str(caught.value)
    assert "6 rows now, 10 published by run 'run-1', 40.0% fewer than the 30.0%" in message
    assert "--set publish_gate.max_row_drop=null" in message


def test_coverage_is_a_share_of_the_rows() -> None:
    gate(BEFORE, 7, 3)  # 43 % where 80 % were: 46 % less
    with pytest.raises(PublishGateError, match=r"30\.0% of the rows have recommendations now, 80\.0% in run"):
        gate(BEFORE, 10, 3)


def test_an_empty_result_does_not_replace_a_full_one() -> None:
    with pytest.raises(PublishGateError, match="max_row_drop"):
        gate(BEFORE, 0, 0)
    with pytest.raises(PublishGateError, match="max_coverage_drop"):
        gate(BEFORE, 0, 0, rows_max=None)


def test_null_turns_a_check_off() -> None:
    check_gate(BEFORE, 0, 0, max_row_drop=None, max_coverage_drop=None)
