"""What may be published."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from featurekit_spark.errors import UsageError
from featurekit_spark.sinks import DeltaSink, Publication, RedisSink, Sink

ROWS = pa.table({"product_id": ["1"], "logic_builder": ["L"], "recs": [["2"]], "scores": [[1.0]]})
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_what_a_publication_needs() -> None:
    Publication("abt", "US", "r", NOW, ("L",), ROWS)
    with pytest.raises(UsageError, match="lack recs; found product_id, logic_builder, scores"):
        Publication("abt", "US", "r", NOW, ("L",), ROWS.drop(["recs"]))
    with pytest.raises(UsageError, match="no time zone"):
        Publication("abt", "US", "r", NOW.replace(tzinfo=None), ("L",), ROWS)
    with pytest.raises(UsageError, match="no logic builder"):
        Publication("abt", "US", "r", NOW, (), ROWS)


def test_the_sinks_fit_the_protocol() -> None:
    sinks: list[Sink] = [DeltaSink("x"), RedisSink("redis://:secret@h/0")]
    assert all(isinstance(sink, Sink) for sink in sinks)
    assert "secret" not in repr(sinks)


def test_a_redis_sink_is_written_to_again_where_its_keys_expire_or_are_named_otherwise() -> None:
    sink = RedisSink("redis://127.0.0.1:1/0")
    assert sink.layout == RedisSink("redis://127.0.0.1:1/0", name="redis-2", batch=7).layout
    assert sink.layout != RedisSink("redis://127.0.0.1:1/0", key_template="{product_id}").layout
    assert sink.layout != RedisSink("redis://127.0.0.1:1/0", publish_as="versioned").layout
    assert RedisSink("redis://127.0.0.1:1/0", ttl_s=60).layout is None
