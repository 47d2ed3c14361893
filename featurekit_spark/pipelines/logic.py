"""The main job: run the logic builders of one merchant and market, then publish what they say.

Compute, gate, publish: nothing reaches a sink before everything is computed, and a sink that already holds exactly
this answer is left alone. Takes a session and sinks; builds neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.errors import DefinitionError
from featurekit_spark.fingerprint import key_json
from featurekit_spark.session import RunResult, Session
from featurekit_spark.sinks.base import Publication, Sink
from featurekit_spark.sinks.gate import check_gate

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["LogicOutcome", "publication_rows", "run_logic"]

Rows: TypeAlias = "pa.Table | DataFrame"

_PUBLICATION = pa.schema(
    [
        ("product_id", pa.string()),
        ("logic_builder", pa.string()),
        ("recs", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class LogicOutcome:
    """A run and what became of its answers. `sinks`: by sink name, `status` published or unchanged, and figures.

    `quality`: what the catalog's reader counted, rows that keep an earlier answer because this run failed, and, where
    something was published, rows without recommendations.
    """

    result: RunResult
    sinks: Mapping[str, Mapping[str, Any]]
    quality: Mapping[str, int]
    wall_seconds: float


def run_logic(
    session: Session,
    logic_builders: Sequence[type[FeatureBuilder[Any]]],
    keyset: type[KeySet],
    *,
    merchant: str,
    market: str,
    sinks: Sequence[Sink],
    max_row_drop: float | None = None,
    max_coverage_drop: float | None = None,
    run_id: str | None = None,
    configs: Mapping[Any, Any] | None = None,
    quality: Callable[[], Mapping[str, int]] = dict,
) -> LogicOutcome:
    """Recommendations of every product, by every logic builder, in every sink.

    Raises PublishGateError before any sink is touched, DefinitionError for a logic builder whose value is no list
    of product ids.
    """
    start = time.perf_counter()
    for builder in logic_builders:
        _ids_and_scores(builder)
    for sink in sinks:
        sink.check()
    targets = [builder.over(keyset) for builder in logic_builders]
    result = session.run(*targets, run_id=run_id, configs=configs, merchant=merchant, market=market)
    names = [builder.name for builder in logic_builders]
    fingerprint = result.execution.fingerprint(names)
    counts = {"kept": result.execution.kept(names)}
    group = key_json((merchant, market, "published"))
    before = session.cache.last_run(group)
    marks = dict(before.record["sinks"]) if before is not None else {}
    outcome: dict[str, Mapping[str, Any]] = {}
    behind: list[Sink] = []
    states = {sink.name: sink.state(merchant, market) for sink in sinks}
    for sink in sinks:
        state = states[sink.name]
        if state and marks.get(sink.name) == {"fingerprint": fingerprint, "run_id": state.run_id}:
            outcome[sink.name] = {"status": "unchanged", "rows": state.rows}
        else:
            behind.append(sink)
    try:
        if behind:
            rows = publication_rows(result, logic_builders)
            total, covered = _size(rows)
            counts["without_recommendations"] = total - covered
            for sink in behind:
                limits = {"max_row_drop": max_row_drop, "max_coverage_drop": max_coverage_drop}
                check_gate(states[sink.name], total, covered, **limits)
            publication = Publication(merchant, market, result.run_id, result.ts, tuple(names), rows)
            for sink in behind:
                outcome[sink.name] = _published(sink, publication)
                marks[sink.name] = {"fingerprint": fingerprint, "run_id": result.run_id}
                record = RunRecord(result.run_id, group, result.ts, result.status, {"sinks": marks})
                session.cache.record_run(record)
        return LogicOutcome(result, outcome, {**quality(), **counts}, time.perf_counter() - start)
    finally:
        result.execution.close()


def publication_rows(result: RunResult, logic_builders: Sequence[type[FeatureBuilder[Any]]]) -> Rows:
    """One row per product and logic builder: product_id, logic_builder, recs (best first), scores (null if none).

    A pyarrow Table, or a DataFrame where the run kept its results in Spark.
    """
    parts = [_rows_of(builder, result.execution.answers(builder.name)) for builder in logic_builders]
    if isinstance(parts[0], pa.Table):
        return pa.concat_tables(parts)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.unionByName(part)
    # Stored first: a sink may look at its rows twice, and each look would compute them again.
    return result.execution.stored(whole, "publication")


def _rows_of(builder: type[FeatureBuilder[Any]], answers: Any) -> Any:
    score = _ids_and_scores(builder)
    if not isinstance(answers, pa.Table):
        recs, scores = ("value", "CAST(NULL AS array<float>)")
        if score is not None:
            recs, scores = "value.product_id", f"CAST(value.{score} AS array<float>)"
        nothing = "CAST(array() AS array<string>)"
        return answers.selectExpr(
            "product_id",
            f"'{builder.name}' AS logic_builder",
            f"coalesce({recs}, {nothing}) AS recs",
            f"{scores} AS scores",
        )
    values = [value or [] for value in answers["value"].to_pylist()]
    columns = {
        "product_id": answers["product_id"],
        "logic_builder": [builder.name] * len(answers),
        "recs": values if score is None else [[hit["product_id"] for hit in value] for value in values],
        "scores": [None if score is None else [hit[score] for hit in value] for value in values],
    }
    return pa.table(columns, schema=_PUBLICATION)


def _size(rows: Rows) -> tuple[int, int]:
    """(rows, rows with at least one recommendation)."""
    if isinstance(rows, pa.Table):
        return len(rows), sum(bool(recs) for recs in rows["recs"].to_pylist())
    total, covered = rows.selectExpr("count(*)", "count_if(size(recs) > 0)").collect()[0]
    return int(total), int(covered)


def _published(sink: Sink, publication: Publication) -> dict[str, Any]:
    done = sink.publish(publication)
    return {"status": "published", "rows": done.rows, "seconds": round(done.seconds, 3), **done.detail}


def _ids_and_scores(builder: type[FeatureBuilder[Any]]) -> str | None:
    """The field of a logic builder's list items that is the score; None where items are bare ids."""
    kind = builder.value
    if isinstance(kind, pa.ListType) and "product_id" in builder.key:
        if pa.types.is_string(kind.value_type):
            return None
        if pa.types.is_struct(kind.value_type):
            names = {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}
            if {"product_id", "score"} <= names:
                return "score"
    raise DefinitionError(
        f"{builder.name} is no logic builder: its key needs product_id (found {builder.key!r}) and its value must be "
        f"list<string> of product ids, or list<struct<product_id: string, score: double>>; found {kind}"
    )
