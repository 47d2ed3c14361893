"""What a sink is given, what it answers, and what it must be able to do.

Owns the values that pass between a run and its sinks. It must not know any particular sink, nor how the
rows were computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from featurekit_spark.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

    Rows: TypeAlias = pa.Table | DataFrame

__all__ = ["ROW_COLUMNS", "Publication", "PublishedState", "Sink", "SinkResult"]

ROW_COLUMNS = ("product_id", "logic_builder", "recs", "scores")


@dataclass(frozen=True)
class Publication:
    """The whole result of one merchant and market, to replace what is published.

    `rows` has one row per product and logic builder: product_id and logic_builder (string), recs
    (list<string>, best first, empty where there are none) and scores (list<float32> beside recs, or null). A
    DataFrame should be a stored result: a sink evaluates it once, and again only after a lost commit.
    `logic_builders` are the names in their configured order; the first one is the main one. `ts` is the
    run's time, aware.
    """

    merchant: str
    market: str
    run_id: str
    ts: datetime
    logic_builders: tuple[str, ...]
    rows: Rows

    def __post_init__(self) -> None:
        columns = getattr(self.rows, "column_names", None) or self.rows.columns
        missing = [name for name in ROW_COLUMNS if name not in columns]
        if missing:
            raise UsageError(
                f"Rows to publish lack {', '.join(missing)}; found {', '.join(map(str, columns))}."
            )
        if self.ts.tzinfo is None:
            raise UsageError(
                f"The time of a publication has no time zone: {self.ts}; give an aware datetime."
            )
        if not self.logic_builders:
            raise UsageError("A publication names no logic builder; give their names in order.")


@dataclass(frozen=True)
class SinkResult:
    """What one sink did: rows written, wall seconds, and figures of its own."""

    sink: str
    rows: int
    seconds: float
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedState:
    """What a sink holds for a merchant and market: `covered` counts the rows with at least one rec."""

    run_id: str
    rows: int
    covered: int


@runtime_checkable
class Sink(Protocol):
    """A place to publish to. Every method raises ServiceError (worth a retry) or ConfigError (not)."""

    @property
    def name(self) -> str:
        """What the run's report calls this sink; no two sinks of a run share it."""
        ...

    @property
    def layout(self) -> str | None:
        """Changes when the same rows would be written in another way; None where what is written expires.

        By it a run knows that a sink which holds its rows need not be written to again.
        """
        ...

    def check(self) -> None:
        """Find out before the run starts whether the sink can be reached and written."""
        ...

    def state(self, merchant: str, market: str) -> PublishedState | None:
        """What is published now; None where nothing is, or where the last result had no rows."""
        ...

    def publish(self, publication: Publication) -> SinkResult:
        """Replace what is published for the publication's merchant and market; safe to repeat."""
        ...
