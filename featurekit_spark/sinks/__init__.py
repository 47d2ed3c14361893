"""Where results are published: a Delta table, Redis, and the gate before them."""

from __future__ import annotations

from featurekit_spark.sinks.base import Publication, PublishedState, Sink, SinkResult
from featurekit_spark.sinks.delta import DeltaSink
from featurekit_spark.sinks.gate import check_gate
from featurekit_spark.sinks.redis import RedisSink, read_recs

__all__ = [
    "DeltaSink",
    "Publication",
    "PublishedState",
    "RedisSink",
    "Sink",
    "SinkResult",
    "check_gate",
    "read_recs",
]
