"""Hits of a stage on workers go back without values: these came from the driver, and are many and long."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from featurekit_spark.bindings import Bindings
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.engines.lookup import as_table, stage_candidates
from featurekit_spark.engines.spark import _pack, stage_work
from featurekit_spark.engines.tasks import ChunkTask, opened
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage
from featurekit_spark.results import results_by_key
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests.unit.core.test_unchanged import Ids, Loud, Shop, ShopContext, Title


def test_a_hit_comes_back_without_its_value() -> None:
    context, cache = ShopContext(Shop({"a": "lamp" * 100, "b": "sofa"}), MovingClock()), MemoryCache()
    session = Session(context, cache, engine="local")
    session.run(Loud.over(Ids), shop="s")
    (stage,) = [s for s in session.plan(Loud.over(Ids), shop="s").stages if isinstance(s, KeyedStage)]
    bindings = Bindings(context, None).bind_all(Graph([Loud, Ids]))
    job = Job(bindings, context, cache, context.clock(), "r", 10)
    evaluator = Evaluator(bindings, context, cache, now=job.now)
    keys: list[tuple[Any, ...]] = [("s", "a"), ("s", "b"), ("s", "c")]
    context.shop.titles["c"] = "rug"
    evaluator.resolve(Title, keys)
    found = stage_candidates(stage, keys, job)
    data = _pack(stage, keys, evaluator, as_table(found), job)
    batch = pa.record_batch({"chunk": pa.array([data], pa.binary()), "file": pa.array([None], pa.string())})
    (answer,) = ChunkTask(stage_work(stage, evaluator, job))(iter([batch]))
    rows = opened(answer["rows"][0].as_py())
    told = dict(zip(rows["key"].to_pylist(), rows["value"].to_pylist(), strict=True))
    assert told == {'["s","a"]': None, '["s","b"]': None, '["s","c"]': b"RUG!"}
    assert rows["value"].nbytes < len(b"RUG!") + 64  # nor are its bytes there
    known = {hit.entry.entry_id: hit.entry.value for hit in found}
    results = results_by_key(rows, bindings[Loud].type, known)
    assert [results[key].value for key in keys] == ["LAMP" * 100 + "!", "SOFA!", "RUG!"]
