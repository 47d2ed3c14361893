"""A run that an error ends leaves a record of what it paid, and is nobody's last run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.base import FeatureCache, RunRecord
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.errors import BudgetError, CacheError, ContextError
from featurekit_spark.report.cost import paid_lots, summed
from featurekit_spark.session import Limits, Session

GROUP = '["a"]'


@dataclass
class World:
    """`breaks`: what happens to prompts, by prompt; `after`: what the builder above the model raises."""

    prompts: list[str] = field(default_factory=lambda: [f"prompt {i}" for i in range(6)])
    breaks: dict[str, BaseException] = field(default_factory=dict)
    after: BaseException | None = None
    asked: list[str] = field(default_factory=list)

    @property
    def world(self) -> World:
        return self


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("world",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return list(context.world.prompts)


class Prompt(Source[str]):
    key, value = ("shop", "id"), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["id"])


class Ask(FeatureBuilder[str]):
    key, value, needs, paid, version = ("prompt",), pa.string(), ("world",), True, "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        await asyncio.sleep(0)
        context.world.asked.append(inputs["prompt"])
        if inputs["prompt"] in context.world.breaks:
            await asyncio.sleep(0.5)  # after the others are durable
            raise context.world.breaks[inputs["prompt"]]
        return Metered(inputs["prompt"].upper(), tokens=2, usd=0.25, attempts=2)


class Use(FeatureBuilder[str]):
    key, deps, value, needs = ("shop", "id"), (Ask.on(prompt=Prompt),), pa.string(), ("world",)
    version = "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        if context.world.after is not None:
            raise context.world.after
        return str(inputs["Ask"])


def run(cache: FeatureCache, world: World, **options: Any) -> Any:
    limits = Limits(micro_batch=1)
    return Session(world, cache, engine="local", limits=limits).run(Use.over(Ids), shop="a", **options)


@pytest.fixture(params=["delta", "memory"])
def cache(request: Any, tmp_path: Path) -> FeatureCache:
    return DeltaCache(str(tmp_path / "cache")) if request.param == "delta" else MemoryCache()


def test_what_was_paid_is_in_the_record(cache: FeatureCache) -> None:
    with pytest.raises(ContextError, match="no llm today"):
        run(cache, World(after=ContextError("no llm today")), run_id="r1")
    (record,) = cache.runs(GROUP)
    assert (record.run_id, record.status, record.finished) == ("r1", "failed", False)
    assert record.record["error"] == "no llm today"
    told = record.record["builders"]["Ask"]
    assert (told["calls"], told["usd"], told["attempts"], told["failed_attempts"]) == (6, 1.5, 12, 6)
    assert record.record["paid_twice"]["calls"] == 0
    assert cache.last_run(GROUP) is None and cache.mark(GROUP) is None

    done = run(cache, World())
    assert (done.status, done.builders["Ask"].calls) == ("ok", 0)
    assert [kept.status for kept in cache.runs(GROUP)] == ["ok", "failed"]


def test_a_bug_and_an_interrupt_leave_one_too(cache: FeatureCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(cache, World(after=KeyboardInterrupt()))
    (record,) = cache.runs(GROUP)
    assert (record.status, record.record["error"]) == ("failed", "KeyboardInterrupt")


def test_a_quota_leaves_one_too(cache: FeatureCache) -> None:
    world = World(breaks={"prompt 3": BudgetError("no quota left")})
    with pytest.raises(BudgetError):
        run(cache, world)
    (record,) = cache.runs(GROUP)
    told = record.record["builders"]["Ask"]
    assert (record.status, told["calls"], told["quota"]) == ("failed", 6, 1)


def test_answers_that_only_the_journal_has_are_counted_once(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    with pytest.raises(ContextError):
        run(cache, World(breaks={"prompt 3": ContextError("no llm today")}), run_id="r1")
    assert len(cache.history("Ask")) == 0, "the stage did not come to its end"
    (record,) = cache.runs(GROUP)
    assert (record.record["builders"]["Ask"]["calls"], record.record["builders"]["Ask"]["usd"]) == (5, 1.25)
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.attempts, total.tokens, float(total.usd or 0)) == (5, 10, 10, 1.25)

    world = World()
    assert run(cache, world).builders["Ask"].calls == 1 and world.asked == ["prompt 3"]
    (total,) = summed(paid_lots(cache), ())
    assert (total.calls, total.attempts, total.tokens, total.removed) == (6, 12, 12, 0)


def test_secrets_stay_out_of_it(cache: FeatureCache) -> None:
    error = ContextError("redis://user:hush@host said: bearer abcdefgh12345678")
    with pytest.raises(ContextError):
        run(cache, World(after=error))
    (record,) = cache.runs(GROUP)
    assert "hush" not in str(record.record) and "abcdefgh" not in str(record.record)


class Unwritable(MemoryCache):
    def record_run(self, record: RunRecord) -> None:
        raise CacheError("the disk is full")


def test_a_record_that_cannot_be_kept_hides_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ContextError, match="no llm today"):
        run(Unwritable(), World(after=ContextError("no llm today")))
    assert "the disk is full" in caplog.text


def test_a_run_that_begins_nothing_leaves_none(cache: FeatureCache) -> None:
    session = Session(World(), cache, engine="local")
    with pytest.raises(Exception, match="group fields"):
        session.run(Use.over(Ids), market="US")
    assert cache.runs(GROUP) == [] and session.ended_early is None


def test_the_session_says_what_the_run_came_to(cache: FeatureCache) -> None:
    session = Session(World(after=ContextError("no llm today")), cache, engine="local")
    with pytest.raises(ContextError):
        session.run(Use.over(Ids), shop="a")
    assert session.ended_early is not None
    assert session.ended_early.builders["Ask"].calls == 6
