"""A shop that writes to people: a model is asked by prompts that name them, and answers in a way that does, too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.base import LATER_COLUMNS
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import BuildError
from featurekit_spark.session import RunResult, Session
from tests.shop import Scan

NAMES = ("Ada", "Grace", "Edsger")


@dataclass
class Desk:
    """A context: who there is, and what was asked."""

    names: dict[str, str] = field(default_factory=lambda: {f"p{i}": name for i, name in enumerate(NAMES)})
    asked: list[str] = field(default_factory=list)
    refused: frozenset[str] = frozenset()

    @property
    def desk(self) -> Desk:
        return self


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("desk",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return sorted(context.desk.names)

    def scan(self, group: Any, config: Any, context: Any) -> Scan:
        return Scan(pa.table({"member": pa.array(sorted(context.desk.names), pa.string())}))


class Name(Source[str]):
    key, value, needs = ("shop", "id"), pa.string(), ("desk",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(context.desk.names[inputs["id"]])

    def scan(self, group: Any, config: Any, context: Any) -> Scan:
        names = context.desk.names
        values = pa.array(names.values(), pa.string())
        return Scan(pa.table({"member": pa.array(names, pa.string()), "value": values}))


class Letter(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (Name,), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"write to {inputs['Name']}"


class Ask(FeatureBuilder[str]):
    key, value, needs, paid, version = ("prompt",), pa.string(), ("desk",), True, "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        prompt = inputs["prompt"]
        context.desk.asked.append(prompt)
        if prompt in context.desk.refused:
            refused = BuildError(f"the model does not like {prompt!r}").with_cost(3, 0.5, 2)
            refused.attempts = 2
            raise refused
        return Metered(
            f"Dear {prompt.split()[-1]} of old",
            tokens=7,
            usd=0.25,
            estimated_tokens=7 * prompt.endswith("Ada"),
            attempts=3 if prompt.endswith("Ada") else 1,
        )


class Length(FeatureBuilder[int]):
    key, deps, value, version = ("shop", "id"), (Ask.on(prompt=Letter),), pa.int64(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> int:
        return len(inputs["Ask"])


class Initial(FeatureBuilder[str]):
    """Another feature of the same answers."""

    key, deps, value, version = ("shop", "id"), (Ask.on(prompt=Letter),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"][5])


def run(cache: DeltaCache, desk: Desk, target: Any = Length, **session: Any) -> RunResult:
    return Session(desk, cache, **{"engine": "local", **session}).run(target.over(Ids), shop="a")


def older(cache: DeltaCache) -> None:
    """Make the entries table one of before it had these columns."""
    path = cache.table_path("entries")
    rows = DeltaTable(path).to_pyarrow_table().drop(list(LATER_COLUMNS))
    write_deltalake(path, rows, mode="overwrite", schema_mode="overwrite", partition_by=["builder"])
    DeltaTable(path).vacuum(0, dry_run=False, enforce_retention_duration=False)
