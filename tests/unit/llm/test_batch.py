"""Parts of calls by batch that need no run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from featurekit_spark import aio
from featurekit_spark.errors import CacheError, ContextError
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.llm.batch_lines import Line
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import BatchClient, BatchState, Progress
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.retry import FailureKind

ONE = Submission("t1", "m", "run", Stage.INTENDED, 5.0)
REQUESTS = b'{"custom_id": "a", "method": "POST", "url": "/u", "body": {"text": "\xe2\x80\xa8\\u0085"}}\n'


def test_records_tell_how_far_each_submission_is(tmp_path: Path) -> None:
    records = BatchRecords(str(tmp_path / "batches"))
    assert records.all() == []
    records.intend(ONE, REQUESTS)
    assert records.all() == [ONE]
    assert dict(records.requests("t1")) == {"a": {"text": "\u2028\x85"}}, (
        "separators inside a text end no line"
    )
    done = records.answered(replace(ONE, batch_id="b"), ["one", "two"], 6.0)
    assert records.all() == [done] == [replace(ONE, batch_id="b", stage=Stage.ANSWERED, at=6.0)]
    assert records.answers("t1") == ["one", "two"]
    records.forget("t1")
    assert list((tmp_path / "batches").iterdir()) == []


def test_what_a_killed_run_left_without_a_name_is_removed(tmp_path: Path) -> None:
    records = BatchRecords(str(tmp_path))
    records.intend(ONE, REQUESTS)
    (tmp_path / "t1.json").unlink()
    assert records.all() == []
    assert len(list(tmp_path.iterdir())) == 1, "another run may be about to name it"
    records.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_an_error_and_not_a_second_payment(tmp_path: Path) -> None:
    records = BatchRecords(str(tmp_path))
    records.put(ONE)
    (tmp_path / "t1.json").write_text('{"stage": "sub')
    with pytest.raises(CacheError, match=r"t1\.json is damaged"):
        records.all()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "batches").write_text("a file")
    with pytest.raises(CacheError, match="Nothing is handed in that is not written down first"):
        BatchRecords(str(tmp_path / "batches")).intend(ONE, REQUESTS)


@pytest.mark.parametrize("kind", [None, *FailureKind])
def test_a_line_survives_its_file(kind: FailureKind | None) -> None:
    for blames in (True, False):
        line = Line("id", "\u2028 b\u00f6dy", kind, "why", blames)
        assert Line.from_json(line.to_json()) == line
    assert Line.from_json('{"custom_id": "a", "body": null, "kind": null, "message": ""}') == Line("a")


def test_a_batch_that_is_refused_for_its_model_blames_no_request() -> None:
    client = BatchClient(OpenAIChat("http://127.0.0.1:1/v1", "m"))
    faults = (
        (1, "model_not_found", "no such model"),
        (2, "invalid_request", "too long"),
        (3, "billing_hard_limit_reached", "pay"),
    )
    lines = aio.run(client.lines(BatchState("b", Progress.FAILED, faults=faults), ["a", "b", "c"]))
    assert [(line.kind, line.blames_request) for line in lines] == [
        (FailureKind.TERMINAL, False),
        (FailureKind.TERMINAL, True),
        (FailureKind.QUOTA, True),
    ]


def test_a_worker_makes_no_calls(tmp_path: Path) -> None:
    model = OpenAIBatch(OpenAIChat("http://127.0.0.1:1/v1", "m"), str(tmp_path), wait_s=3.0)
    away = pickle.loads(pickle.dumps(model))
    assert (away.identity, away.wait_s, away.folder) == (model.identity, 3.0, str(tmp_path))
    with pytest.raises(ContextError, match="made by the driver"):
        aio.run(away.complete("p"))


def test_what_a_call_by_batch_will_cost(tmp_path: Path) -> None:
    chat = OpenAIChat("http://127.0.0.1:1/v1", "m", price=Price.of(2, 4, 1))
    half, fifth = (OpenAIBatch(chat, str(tmp_path), share=share) for share in (0.5, 0.2))
    assert half.price == Price.of(1, 2, 0.5)
    assert half.expected_cost("p", max_tokens=100).usd == pytest.approx(
        chat.expected_cost("p", max_tokens=100).usd / 2
    )
    assert fifth.price == Price.of(0.4, 0.8, 0.2)
    assert OpenAIBatch(OpenAIChat("http://127.0.0.1:1/v1", "m"), str(tmp_path)).price is None
