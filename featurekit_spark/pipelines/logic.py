"""The main job: run the logic builders of one merchant and market, then publish what they say.

Compute, gate, publish: nothing reaches a sink before everything is computed, and a sink that already holds exactly
this answer is left alone. Takes a session and sinks; builds neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.base import RunRecord
from featurekit_spark.errors import DefinitionError
from featurekit_spark.fingerprint import digest, group_hash, key_json
from featurekit_spark.results import Result
from featurekit_spark.session import RunResult, Session
from featurekit_spark.sinks.base import Publication, Sink
from featurekit_spark.sinks.gate import check_gate

__all__ = ["LogicOutcome", "run_logic"]

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
    hashes = {builder.name: result.execution.answers(builder.name) for builder in logic_builders}
    fingerprint = _fingerprint({name: found for name, (found, _) in hashes.items()})
    counts = {"kept": sum(kept for _, kept in hashes.values())}
    group = key_json((merchant, market, "published"))
    before = session.cache.last_run(group)
    known = dict(before.record["sinks"]) if before is not None else {}
    rows: pa.Table | None = None
    outcome: dict[str, Mapping[str, Any]] = {}
    try:
        for sink in sinks:
            state = sink.state(merchant, market)
            mark = known.get(sink.name)
            if mark and state and mark == {"fingerprint": fingerprint, "run_id": state.run_id}:
                outcome[sink.name] = {"status": "unchanged", "rows": state.rows}
                continue
            if rows is None:
                answers = {b.name: result.execution.last_good(b.name) for b in logic_builders}
                rows = publication_rows(answers, logic_builders)
                covered = sum(bool(recs) for recs in rows["recs"].to_pylist())
                counts["without_recommendations"] = len(rows) - covered
            check_gate(
                state, len(rows), covered, max_row_drop=max_row_drop, max_coverage_drop=max_coverage_drop
            )
            published = sink.publish(
                Publication(
                    merchant, market, result.run_id, result.ts, tuple(b.name for b in logic_builders), rows
                )
            )
            known[sink.name] = {"fingerprint": fingerprint, "run_id": result.run_id}
            outcome[sink.name] = {
                "status": "published",
                "rows": published.rows,
                "seconds": round(published.seconds, 3),
                **published.detail,
            }
    finally:
        if rows is not None:
            record = RunRecord(result.run_id, group, result.ts, result.status, {"sinks": known})
            session.cache.record_run(record)
    return LogicOutcome(result, outcome, {**quality(), **counts}, time.perf_counter() - start)


def publication_rows(
    answers: Mapping[str, Mapping[tuple[Any, ...], Result]], logic_builders: Sequence[type[FeatureBuilder[Any]]]
) -> pa.Table:
    """One row per product and logic builder: product_id, logic_builder, recs (best first), scores (null if none)."""
    columns: dict[str, list[Any]] = {name: [] for name in _PUBLICATION.names}
    for builder in logic_builders:
        field = _ids_and_scores(builder)
        at = builder.key.index("product_id")
        for key, result in answers[builder.name].items():
            value = result.value or []
            columns["product_id"].append(key[at])
            columns["logic_builder"].append(builder.name)
            columns["recs"].append(value if field is None else [item["product_id"] for item in value])
            columns["scores"].append(None if field is None else [item[field] for item in value])
    return pa.table(columns, schema=_PUBLICATION)


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


def _fingerprint(hashes: Mapping[str, Mapping[tuple[Any, ...], str]]) -> str:
    parts = []
    for name, found in hashes.items():
        parts += [name, group_hash((key_json(key), value_hash) for key, value_hash in found.items())]
    return digest("published", *parts)
