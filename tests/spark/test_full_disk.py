"""Workers whose answers cannot be kept: the run ends once, and the next one asks for no more than what was lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.builder import FeatureBuilder, Metered
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import CacheError
from featurekit_spark.session import Limits, Session
from tests import paid_shop
from tests.paid_shop import MICRO_BATCH, Ask, Counter, Ids, Name, World

pytestmark = pytest.mark.spark

LOSE_AT = 30  # the call, of each process, at which the journal's folder becomes a file


class AskAndLose(Ask):
    """While `kill_at` says so: what is in the journal by then is put aside, and no file can be added."""

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        counter = context.counter
        if counter.kill_at and counter.calls == LOSE_AT:
            for journal in (counter.log.parent / "cache/journal").glob("[!.]*"):
                if journal.is_dir():
                    journal.rename(counter.log.parent / "kept")
                    journal.write_text("a file where the folder should be")
        return await super().build_one(inputs, config, context)


class UseLost(FeatureBuilder[str]):
    key, deps, value = paid_shop.Use.key, (AskAndLose.on(prompt=Name),), paid_shop.Use.value

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["AskAndLose"])


def test_a_task_that_cannot_keep_answers_is_not_tried_again(spark: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "cache"))
    # Several chunks in each task: those after the one that failed are not begun.
    limits = Limits(in_process_keys=0, batch_rows=50, partitions=2, micro_batch=MICRO_BATCH)

    def run(counter: Counter) -> Any:
        own = Session(World(counter), cache, engine="spark", spark=spark, limits=limits)
        return own.run(UseLost.over(Ids), shop="a")

    first = Counter(tmp_path / "calls", 400, kill_at=10**9)
    with pytest.raises(CacheError, match="No further calls are made"):
        run(first)
    before = first.asked()
    assert len(before) == len(set(before)) < 400  # no task asked again
    (lost,) = (path for path in (tmp_path / "cache/journal").iterdir() if path.is_file())
    lost.unlink()
    shutil.move(tmp_path / "kept", lost)
    second = Counter(tmp_path / "calls again", 400)
    result = run(second)
    assert (result.status, len(result.values(UseLost))) == ("ok", 400)
    after = second.asked()
    assert set(before) | set(after) == {f"p{i}" for i in range(400)}
    assert len(set(before) & set(after)) <= 2 * MICRO_BATCH
