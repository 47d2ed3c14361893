"""A run that pays by the prompt and may be killed in the middle, or run out of room:
`python -m tests.paid_shop CACHE LOG PROMPTS KILL_AT [ROOM]`.

Every call leaves a line in LOG when it is made. At the call number KILL_AT the process kills itself; 0 is never. With
ROOM no file may have more bytes, and the answer at a third of the prompts has as many. The variable SHOP_OPTIONS may
hold what opens CACHE, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.session import Limits, RunResult, Session

MICRO_BATCH = 4


class Counter:
    """Where calls are counted: lines of a file, which outlive a process; and what happens at the fatal one."""

    def __init__(self, log: Path, prompts: int, kill_at: int = 0, room: int = 0) -> None:
        self.log, self.prompts, self.kill_at, self.calls, self.room = log, prompts, kill_at, 0, room

    def call(self, prompt: str) -> str:
        """The answer."""
        with self.log.open("a") as file:
            file.write(f"{prompt}\n")
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return prompt.upper() + "!" * self.room * (self.calls == self.prompts // 3)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


class World:
    """A context."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("counter",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"p{i}" for i in range(context.counter.prompts)]


class Name(Source[str]):
    key, value = ("shop", "id"), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["id"])


class Ask(FeatureBuilder[str]):
    """At most MICRO_BATCH calls are in flight, as a client sees to."""

    key, value, needs, paid = ("prompt",), pa.string(), ("counter",), True
    _line: asyncio.Semaphore | None = None

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        if Ask._line is None:
            Ask._line = asyncio.Semaphore(MICRO_BATCH)
        async with Ask._line:
            answer = context.counter.call(inputs["prompt"])
            await asyncio.sleep(0.001)
        return Metered(answer, tokens=2, usd=0.25)


class Use(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (Ask.on(prompt=Name),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"])


def run(cache: DeltaCache, counter: Counter) -> RunResult:
    session = Session(World(counter), cache, engine="local", limits=Limits(micro_batch=MICRO_BATCH))
    return session.run(Use.over(Ids), shop="a")


if __name__ == "__main__":
    cache, log, prompts, kill_at, *room = sys.argv[1:]
    for size in map(int, room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    options = json.loads(os.environ.get("SHOP_OPTIONS", "{}"))
    run(
        DeltaCache(cache, storage_options=options),
        Counter(Path(log), int(prompts), int(kill_at), *map(int, room)),
    )
