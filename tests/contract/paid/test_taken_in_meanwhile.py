"""Two runs at once over one cache: the second takes in what the journal of the first has, and the first goes on. Each
answer is one call, in the sums and in the first one's record, whatever comes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import BuildError, ContextError
from featurekit_spark.report.cost import paid_lots, summed
from featurekit_spark.session import Limits, RunResult, Session

SHOPS = {"a": [f"prompt {number}" for number in range(8)], "b": ["another"]}


@dataclass
class World:
    """`late`: prompts that are answered once `go` is set, or fail then."""

    late: dict[str, Exception | None] = field(default_factory=dict)
    go: threading.Event = field(default_factory=threading.Event)

    @property
    def world(self) -> World:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("it stays here")


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return SHOPS[inputs["shop"]]


class Prompt(Source[str]):
    key, value = ("shop", "id"), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["id"])


class Ask(FeatureBuilder[str]):
    key, value, needs, paid, version = ("prompt",), pa.string(), ("world",), True, "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        prompt, world = inputs["prompt"], context.world
        if prompt == "prompt 0":
            raise BuildError("refused")
        while prompt in world.late and not world.go.is_set():
            await asyncio.sleep(0.01)
        if (error := world.late.get(prompt)) is not None:
            raise error
        return Metered(prompt.upper(), tokens=2, usd=0.25)


class Use(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Ask.on(prompt=Prompt),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"])


def run(path: Path, world: World, shop: str) -> RunResult:
    """As a process of its own would, that knows what the cache has from nobody."""
    session = Session(world, DeltaCache(str(path)), engine="local", limits=Limits(micro_batch=1))
    return session.run(Use.over(Ids), shop=shop, run_id=f"run-{shop}")


def answers(path: Path) -> int:
    """In the first one's journal; each has a file of its own."""
    return sum(file.name not in ("begun.arrow", "observed") for file in path.glob("journal/run-a/[!.]*"))


def both(path: Path, late: dict[str, Exception | None]) -> RunResult:
    """The first one's result; the second run begins and ends when five answers of the first are in its journal."""
    world = World(late)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, path, world, "a")
        try:
            until = time.monotonic() + 60
            while answers(path) < 5 and time.monotonic() < until:
                time.sleep(0.02)
            assert run(path, World(), "b").builders["Ask"].calls == 1
            taken = DeltaCache(str(path)).history("Ask")["run_id"].to_pylist()
            assert taken.count("run-a") == 5, "what the second takes in has the first one's name"
        finally:
            world.go.set()
        return first.result()


def told(cache: DeltaCache) -> tuple[Any, ...]:
    """Of the first run's record."""
    (found,) = cache.runs('["a"]')
    facts = found.record["builders"]["Ask"]
    return (found.status, *(facts[name] for name in ("calls", "tokens", "usd", "attempts")))


def test_an_answer_is_one_call_in_the_sums(tmp_path: Path) -> None:
    both(tmp_path, {"prompt 6": None, "prompt 7": None})
    cache = DeltaCache(str(tmp_path))
    assert told(cache) == ("partial", 8, 14, 1.75, 8)
    by_merchant = {sums.merchant: sums for sums in summed(paid_lots(cache), ("merchant",))}
    assert (by_merchant["a"].calls, by_merchant["a"].tokens, float(by_merchant["a"].usd or 0)) == (
        8,
        14,
        1.75,
    )
    assert (by_merchant["a"].failed, by_merchant["a"].removed) == (1, 0)
    assert (by_merchant["b"].calls, by_merchant["b"].tokens, float(by_merchant["b"].usd or 0)) == (1, 2, 0.25)


def test_a_run_that_fails_afterwards_records_what_it_paid(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="no llm"):
        both(tmp_path, {"prompt 7": ContextError("no llm today"), "prompt 6": BuildError("refused")})
    cache = DeltaCache(str(tmp_path))
    status, calls, tokens, usd, attempts = told(cache)
    assert (status, tokens, usd) == ("failed", 10, 1.25)
    assert calls == attempts == 5, (
        "of calls that failed nobody was told, as their stage did not come to its end"
    )
    (total,) = summed(paid_lots(cache), ("builder",))
    assert (total.calls, total.tokens, float(total.usd or 0), total.removed) == (6, 12, 1.5, 0)
