"""The main job: run the logic builders of one merchant and market, then publish what they say.

Compute, gate, publish: nothing reaches a sink before everything is computed and every sink's gate is passed,
and a sink that already holds exactly this answer is left alone. Takes a session and sinks; builds neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.errors import DefinitionError
from featurekit_spark.failures import RetryErrors
from featurekit_spark.fingerprint import key_json
from featurekit_spark.session import RunResult, Session
from featurekit_spark.sinks.base import Publication, PublishedState, Sink
from featurekit_spark.sinks.gate import check_gate

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["Gate", "LogicOutcome", "publication_rows", "published_group", "run_logic"]

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
class Gate:
    """By how much rows, and the share of them with recommendations, may fall below what is published."""

    max_row_drop: float | None = None
    max_coverage_drop: float | None = None


@dataclass(frozen=True)
class LogicOutcome:
    """A run and what became of its answers. `sinks`: by name, `status` published or unchanged, and figures.

    `quality`: what the catalog's reader counted; `kept`, answers kept from before because this run failed for
    their keys; `without_recommendations`, rows with an empty list.
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
    gate: Gate | None = None,
    run_id: str | None = None,
    configs: Mapping[Any, Any] | None = None,
    quality: Callable[[], Mapping[str, int]] = dict,
    on_computed: Callable[[RunResult], None] = lambda result: None,
    republish: bool = False,
    budget: Budget | None = None,
    retry_errors: RetryErrors | None = None,
    retry_builders: Sequence[str] | None = None,
) -> LogicOutcome:
    """Recommendations of every product, by every logic builder, in every sink.

    `on_computed` is called before anything is published, so that a run can be told of whose publication
    fails. `republish` writes to sinks that hold these very answers as well. `retry_errors` and `retry_builders` as in
    `Session.run`. Raises DefinitionError for a
    class that is no logic builder, PublishGateError before any sink is written to.
    """
    start = time.perf_counter()
    for builder in logic_builders:
        _score_field(builder, keyset)
    for sink in sinks:
        sink.check()
    targets = [builder.over(keyset) for builder in logic_builders]
    result = session.run(
        *targets,
        run_id=run_id,
        configs=configs,
        budget=budget,
        retry_errors=retry_errors,
        retry_builders=retry_builders,
        merchant=merchant,
        market=market,
    )
    try:
        on_computed(result)
        published, counts = _publish(
            session, result, logic_builders, keyset, sinks, gate or Gate(), quality, republish
        )
    finally:
        result.execution.close()
    return LogicOutcome(result, published, counts, time.perf_counter() - start)


def _publish(
    session: Session,
    result: RunResult,
    logic_builders: Sequence[type[FeatureBuilder[Any]]],
    keyset: type[KeySet],
    sinks: Sequence[Sink],
    gate: Gate,
    quality: Callable[[], Mapping[str, int]],
    republish: bool,
) -> tuple[dict[str, Mapping[str, Any]], dict[str, int]]:
    """(what became of each sink, counts of data and answers). A sink that holds these answers is not written to."""
    merchant, market = result.group["merchant"], result.group["market"]
    names = [builder.name for builder in logic_builders]
    fingerprint = result.execution.fingerprint(names)
    counts = {"kept": result.execution.kept(names)}
    group = key_json((merchant, market, "published"))
    last = session.cache.mark(group)
    if last is None and (before := session.cache.last_run(group)) is not None:
        last = before.record
    marks = dict(last["sinks"]) if last is not None else {}
    same = getattr(result.execution, "read_nothing", False)  # of the same data: not read again
    told = last.get("quality") if last is not None and same else None
    counts = {**(quality() if told is None else told), **counts}

    outcome: dict[str, Mapping[str, Any]] = {}
    behind: list[tuple[Sink, PublishedState | None]] = []
    for sink in sinks:
        state = sink.state(merchant, market)
        holds = state and sink.layout and marks.get(sink.name) == _mark(sink, fingerprint, state.run_id)
        if state and holds and not republish:
            outcome[sink.name] = {"status": "unchanged", "rows": state.rows, "run_id": state.run_id}
            counts["without_recommendations"] = state.rows - state.covered
        else:
            behind.append((sink, state))
    if not behind:
        session.cache.put_mark(group, {"sinks": marks, "quality": counts})
        return outcome, counts

    rows = publication_rows(result, logic_builders, keyset)
    total, covered = _size(rows)
    counts["without_recommendations"] = total - covered
    for _, state in behind:
        check_gate(
            state,
            total,
            covered,
            max_row_drop=gate.max_row_drop,
            max_coverage_drop=gate.max_coverage_drop,
        )
    publication = Publication(merchant, market, result.run_id, result.ts, tuple(names), rows)
    for sink, _ in behind:
        done = sink.publish(publication)
        figures = {"rows": done.rows, "seconds": round(done.seconds, 3), **done.detail}
        outcome[sink.name] = {"status": "published", **figures}
        # After each sink: where the next one fails, a later run leaves this one alone.
        marks[sink.name] = _mark(sink, fingerprint, result.run_id)
        facts = {"sinks": dict(marks), "quality": counts}
        session.cache.record_run(RunRecord(result.run_id, group, result.ts, result.status, facts))
        session.cache.put_mark(group, facts)
    return {sink.name: outcome[sink.name] for sink in sinks}, counts


def published_group(merchant: str, market: str) -> str:
    """The group under which the cache's runs table keeps the marks of what each sink was given."""
    return key_json((merchant, market, "published"))


def _mark(sink: Sink, fingerprint: str, run_id: str) -> dict[str, Any]:
    """What a sink was given: the answers, how they were written, and the run by which it knows them."""
    return {"fingerprint": fingerprint, "layout": sink.layout, "run_id": run_id}


def publication_rows(
    result: RunResult, logic_builders: Sequence[type[FeatureBuilder[Any]]], keyset: type[KeySet]
) -> Rows:
    """One row per product and logic builder: product_id, logic_builder, recs (best first), scores (or null).

    A pyarrow Table, or a DataFrame where the run kept its results in Spark.
    """
    parts = [
        _rows_of(builder, _score_field(builder, keyset), result.execution.answers(builder.name))
        for builder in logic_builders
    ]
    if isinstance(parts[0], pa.Table):
        return pa.concat_tables(parts)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.unionByName(part)
    # Stored first: a sink may look at its rows twice, and each look would compute them again.
    return result.execution.stored(whole, "publication")


def _rows_of(builder: type[FeatureBuilder[Any]], score: str | None, answers: Any) -> Any:
    if isinstance(answers, pa.Table):
        values = [value or [] for value in answers["value"].to_pylist()]
        columns = {
            "product_id": answers["product_id"].cast(pa.string()),
            "logic_builder": [builder.name] * len(answers),
            "recs": [[hit["product_id"] for hit in value] for value in values] if score else values,
            "scores": [[hit[score] for hit in value] if score else None for value in values],
        }
        return pa.table(columns, schema=_PUBLICATION)
    from pyspark.sql import functions as F

    recs = F.col("value.product_id" if score else "value")
    scores = F.coalesce(F.col(f"value.{score}"), F.array()) if score else F.lit(None)
    return answers.select(
        F.col("product_id").cast("string").alias("product_id"),
        F.lit(builder.name).alias("logic_builder"),
        F.coalesce(recs, F.array()).cast("array<string>").alias("recs"),
        scores.cast("array<float>").alias("scores"),
    )


def _size(rows: Rows) -> tuple[int, int]:
    """(rows, rows with at least one recommendation)."""
    if isinstance(rows, pa.Table):
        return len(rows), sum(bool(recs) for recs in rows["recs"].to_pylist())
    total, covered = rows.selectExpr("count(*)", "count_if(size(recs) > 0)").collect()[0]
    return int(total), int(covered)


def _score_field(builder: type[FeatureBuilder[Any]], keyset: type[KeySet]) -> str | None:
    """The field of a logic builder's list items that is the score; None where items are bare ids."""
    key, kind = keyset.member_key(), builder.value
    if builder.key != key or "product_id" not in key:
        raise DefinitionError(
            f"{builder.name} is no logic builder over {keyset.name}: its key must be {key!r}, product_id "
            f"among them; found {builder.key!r}."
        )
    if isinstance(kind, pa.ListType):
        item = kind.value_type
        if pa.types.is_string(item):
            return None
        if pa.types.is_struct(item) and {"product_id", "score"} <= {field.name for field in item}:
            return "score"
    raise DefinitionError(
        f"{builder.name} is no logic builder: its value must be pa.list_(pa.string()), product ids best "
        f"first, or pa.list_ of structs with product_id and score; found {kind}."
    )
