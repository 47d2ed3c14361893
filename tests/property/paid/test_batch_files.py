"""Requests are cut into files that a provider takes; nothing is lost, doubled or put in another order. What is written
of a line is read as it was."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.llm.batch_desk import BatchLimits, parts_of
from featurekit_spark.llm.batch_lines import Line
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.paid.retry import FailureKind

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
REQUESTS = st.dictionaries(st.text("abcdef", min_size=1), st.fixed_dictionaries({"text": TEXTS}), max_size=30)


@given(requests=REQUESTS, lines=st.integers(1, 9), size=st.integers(1, 500))
def test_files_hold_what_was_asked_in_order_and_within_limits(
    requests: dict[str, Any], lines: int, size: int
) -> None:
    parts = list(parts_of(requests, BatchLimits(requests=lines, bytes=size)))
    assert [item for part in parts for item in part.items()] == list(requests.items())
    for part in parts:
        assert 0 < len(part) <= lines
        assert len(part) == 1 or _size(part) <= size, "only what is too long alone is over"
    for one, other in pairwise(parts):
        first = dict([next(iter(other.items()))])
        assert len(one) == lines or _size({**one, **first}) > size, "no file ends early"


def _size(part: dict[str, Any]) -> int:
    fixed = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [{"custom_id": own, **fixed, "body": body} for own, body in part.items()]
    return sum(len(json.dumps(line, ensure_ascii=False).encode()) + 1 for line in lines)


@given(
    custom_id=TEXTS,
    body=st.none() | TEXTS,
    kind=st.none() | st.sampled_from(FailureKind),
    message=TEXTS,
)
def test_lines_are_read_as_they_were_written(
    tmp_path_factory: Any, custom_id: str, body: str | None, kind: FailureKind | None, message: str
) -> None:
    records = BatchRecords(str(tmp_path_factory.mktemp("batches")))
    line = Line(custom_id, body, kind, message)
    records.answered(Submission("t", "m", "r", Stage.SUBMITTED, 0.0), [line.to_json(), line.to_json()], 1.0)
    assert [Line.from_json(text) for text in records.answers("t")] == [line, line]
