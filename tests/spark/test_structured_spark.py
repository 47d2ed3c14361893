"""Answers with fields on Spark's workers: the same values, repairs, costs and kept texts as in-process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pytest
from pydantic import BaseModel, Field

from featurekit_spark import Context, FeatureBuilder, KeySet, MemoryCache, Session
from featurekit_spark.llm import OpenAIChat, StructuredCompletion
from featurekit_spark.session import Limits
from featurekit_spark.testing.chat import chat_server

pytestmark = pytest.mark.spark


class Reason(BaseModel):
    text: str
    weight: float = 1.0


class Verdict(BaseModel):
    mood: Literal["calm", "loud"]
    reasons: list[Reason] = Field(max_length=3)


class ProductVerdict(StructuredCompletion):
    response = Verdict
    system = "You judge products."


class Ids(KeySet):
    key, of, value = ("shop",), "id", pa.list_(pa.string())

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"{kind} {number}" for kind in ("lamp", "slip", "wall") for number in range(20)]


class Question(FeatureBuilder[str]):
    key, value, inline = ("shop", "id"), pa.string(), True

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"judge the {inputs['id']}"


class Mood(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (ProductVerdict.on(prompt=Question),), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        verdict = Verdict.model_validate(inputs["ProductVerdict"])
        return f"{verdict.mood}: {verdict.reasons[0].text} ({verdict.reasons[0].weight})"


GOOD = '{"mood": "calm", "reasons": [{"text": "soft", "weight": 2.5}]}'


def answer(prompt: str) -> str:
    """A slip is repaired, a wall is not."""
    first = prompt.splitlines()[0]
    if "wall" in first or "angry" in first:
        return '{"mood": "angry", "reasons": [{"text": "\u00fcber", "weight": 1}]}'
    return '{"mood": "calm"}' if "slip" in first else GOOD


@pytest.fixture(params=["imported", "sent along"])
def module(request: Any) -> Iterator[None]:
    """Classes of a module that workers import, and of one that they do not have, as those of a notebook."""
    from pyspark import cloudpickle

    own = sys.modules[__name__]
    if request.param == "sent along":
        cloudpickle.register_pickle_by_value(own)
    yield
    if request.param == "sent along":
        cloudpickle.unregister_pickle_by_value(own)


@pytest.mark.usefixtures("module")
def test_workers_answer_as_this_process_does(spark: Any) -> None:
    with chat_server(answer) as server:
        found = {}
        for engine in ("spark", "local"):
            server.requests.clear()
            cache = MemoryCache()
            # The workers may have been started before a variable was set: PATH is in every environment.
            own = Session(
                Context(llm=OpenAIChat(server.url, "m", api_key_env="PATH")),
                cache,
                engine=engine,  # type: ignore[arg-type]
                spark=spark,
                limits=Limits(in_process_keys=0, batch_rows=10, partitions=2),
            )
            result = own.run(Mood.over(Ids), shop="a")
            rows = {row["key"]: row for row in cache.history("ProductVerdict").to_pylist()}
            kept = ("status", "value", "value_hash", "error", "tokens", "usd", "config_hash", "entry_id")
            counts = {name: {**vars(own), "seconds": 0} for name, own in result.builders.items()}
            found[engine] = {
                "entries": {key: [row[name] for name in kept] for key, row in rows.items()},
                "moods": result.values(Mood),
                "errors": result.errors,
                "counts": counts,
                "asked": sorted(server.prompts),
            }
    there, here = found["spark"], found["local"]
    assert there == here
    assert there["moods"]["a", "slip 3"] == there["moods"]["a", "lamp 3"] == "calm: soft (2.5)"
    assert len(there["errors"]) == 20
    assert "two answers did not fit Verdict" in there["errors"]['["a","wall 7"]']
    counts = there["counts"]["ProductVerdict"]
    assert (counts["computed"], counts["error"]) == (40, 20)
    assert len(there["asked"]) == 20 + 2 * 20 + 2 * 20
    assert counts["tokens"] == 10 * len(there["asked"])  # repairs and failures are paid for
    status, text, *_ = there["entries"]['["judge the wall 7"]']
    assert (status, text.decode()) == ("error", answer("wall"))
