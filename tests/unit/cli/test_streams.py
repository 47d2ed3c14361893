"""stderr under spark-submit; the real thing is in tests/jobs."""

from __future__ import annotations

import sys

import pytest

from featurekit_spark.cli.streams import stderr_apart


def test_without_spark_submit_nothing_changes() -> None:
    before = sys.stderr
    with stderr_apart():
        assert sys.stderr is before


def test_without_its_jvm_the_merged_stream_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")
    monkeypatch.setenv("PYSPARK_GATEWAY_SECRET", "x")
    before = sys.stderr
    with stderr_apart():
        print("caf\u00e9", file=sys.stderr)
    assert sys.stderr is before
    assert capsys.readouterr().err == "caf\u00e9\n"
