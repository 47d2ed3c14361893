"""Proof that a builder gives the same answers everywhere: per key, in batches, and on Spark.

    values = assert_parity(LLMLogic.over(ProductIds), context, spark=spark, merchant="abt", market="US")

Runs each way on a cache of its own, so that no way can read another's answers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from featurekit_spark.builder import Dep, KeySet
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller
from featurekit_spark.errors import UsageError
from featurekit_spark.session import Limits, Session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["Answer", "assert_parity"]

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """What one way of running answered for one key; errors by their text, so that they must agree as well."""

    value: Any
    value_hash: str
    error: str | None


def assert_parity(
    target: Dep,
    context: Any,
    *,
    spark: SparkSession | Callable[[], SparkSession] | None = None,
    configs: Mapping[Any, Any] | None = None,
    batch_rows: int = 3,
    **group: Any,
) -> dict[Key, Any]:
    """Values by key, after checking that every way of running gives the same values, hashes and errors.

    The ways: `controller.get` key by key, the local engine, the local engine in batches of `batch_rows`,
    and where a session is given, Spark with every stage on its workers, and, where the key set offers a
    scan, table by table as for a large catalog. Raises AssertionError with the first keys that differ.
    """
    keyset = target.keyset
    if keyset is None:
        raise UsageError(f"parity is checked for all keys of a group: {target.builder.name}.over(SomeKeySet)")
    ways = {
        "controller": _per_key(target, keyset, context, configs, group),
        "local": _run(target, context, configs, group, "local", Limits()),
        f"local, {batch_rows} rows": _run(
            target, context, configs, group, "local", Limits(batch_rows=batch_rows)
        ),
    }
    if spark is not None:
        limits = Limits(in_process_keys=0, batch_rows=batch_rows, partitions=2)
        ways["spark"] = _run(target, context, configs, group, "spark", limits, spark)
        if keyset.scan is not None:
            limits = replace(limits, collect_mb=0)
            ways["tables"] = _run_by_tables(target, context, configs, group, limits, spark)
    first, *others = ways
    for other in others:
        _compare(target.builder.name, first, ways[first], other, ways[other])
    return {key: answer.value for key, answer in ways["local"].items()}


def _per_key(
    target: Dep,
    keyset: type[KeySet],
    context: Any,
    configs: Mapping[Any, Any] | None,
    group: Mapping[str, Any],
) -> dict[Key, Answer]:
    controller = Controller(context, MemoryCache())
    prefix = tuple(group[field] for field in keyset.key)
    answers = {}
    for member in controller.get(keyset, prefix).require() or []:
        key = (*prefix, member)
        own = tuple(key[keyset.member_key().index(field)] for field in target.builder.key)
        feature = controller.get(target.builder, own, configs, gather=True)
        failed = feature.error is not None
        answers[key] = Answer(
            None if failed else feature.value, "" if failed else feature.value_hash, feature.error
        )
    return answers


def _run(
    target: Dep,
    context: Any,
    configs: Mapping[Any, Any] | None,
    group: Mapping[str, Any],
    engine: Any,
    limits: Limits,
    spark: Any = None,
) -> dict[Key, Answer]:
    session = Session(context, MemoryCache(), engine=engine, limits=limits, spark=spark)
    result = session.run(target, configs=configs, **group)
    found = result.execution.results_of(target.builder.name)
    return {key: Answer(r.value, r.value_hash or "", r.error) for key, r in found.items()}


def _run_by_tables(
    target: Dep,
    context: Any,
    configs: Mapping[Any, Any] | None,
    group: Mapping[str, Any],
    limits: Limits,
    spark: Any,
) -> dict[Key, Answer]:
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        session = Session(context, DeltaCache(folder), engine="spark", limits=limits, spark=spark)
        result = session.run(target, configs=configs, **group)
        rows = result.table(target.builder)
        rows = rows.toArrow() if hasattr(rows, "toArrow") else rows
        answers = {tuple(json.loads(key)): Answer(None, "", error) for key, error in result.errors.items()}
        for row in rows.to_pylist():
            key = tuple(row[field] for field in target.builder.key)
            answers.setdefault(key, Answer(row["value"], row["value_hash"] or "", None))
        return answers


def _compare(
    name: str, one: str, ones: Mapping[Key, Answer], other: str, others: Mapping[Key, Answer]
) -> None:
    if set(ones) != set(others):
        raise AssertionError(f"{name}: {one} has the keys {sorted(ones)}, {other} has {sorted(others)}")
    differing = [
        f"  {key}: {one} gives {ones[key]}, {other} gives {others[key]}"
        for key in ones
        if (ones[key].value_hash, ones[key].error) != (others[key].value_hash, others[key].error)
    ]
    if differing:
        shown = "\n".join(differing[:5])
        raise AssertionError(f"{name} differs for {len(differing)} of {len(ones)} keys:\n{shown}")
