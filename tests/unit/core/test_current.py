"""What is current: after inputs or configs went there and back, after null, after an answer in between, every
reader says what the last run said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller
from featurekit_spark.fingerprint import key_json
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop

P1, P2 = ("abt", "US", "p1"), ("abt", "US", "p2")
Cache = MemoryCache | DeltaCache

PAGE = Path(__file__).resolve().parents[3] / "docs" / "design" / "cache.md"
CURRENT = PAGE.read_text().split("```sql\n")[1].split("```")[0]
"""The query that the page gives to SQL users."""


class Shop:
    """A small shop over a cache, its runs, and what each reader says of it."""

    def __init__(self, cache: Cache) -> None:
        self.world = shop.World(
            products={P1: shop.Product("red lamp"), P2: shop.Product("sofa")}, slogans={"acme": "it works"}
        )
        self.cache, self.clock = cache, MovingClock()
        self.context = shop.ShopContext(self.world, self.clock)

    def run(self, *targets: Any, configs: Any = None) -> dict[Any, Any]:
        session = Session(self.context, self.cache, engine="local")
        over = [target.over(shop.ProductIds) for target in targets]
        return session.run(*over, configs=configs, merchant="abt", market="US").values(targets[0])

    def get(self, builder: Any, key: Any, configs: Any = None) -> Any:
        return Controller(self.context, self.cache).get(builder, key, configs).value

    def retitle(self, title: str | None) -> None:
        self.world.products[P1].title = title

    def read_by_key(self, builder: Any) -> dict[Any, Any]:
        """What each reader that knows no context says, all of them the same."""
        rows = self.cache.read(builder).to_pylist()
        found = {tuple(row[name] for name in builder.key): row["value"] for row in rows}
        newest = {
            tuple(json.loads(row["key"])): (row["value_hash"], row["config_hash"])
            for row in self.cache.newest(builder.name).to_pylist()
        }
        assert set(newest) == set(found)
        for key, (value_hash, config_hash) in newest.items():
            current = self.cache.current(builder.name, config_hash, [key_json(key)])
            assert current[key_json(key)].entry.value_hash == value_hash
        if isinstance(self.cache, DeltaCache):
            assert {tuple(json.loads(row["key"])): row["value_hash"] for row in self.by_sql(builder)} == {
                key: value_hash for key, (value_hash, _) in newest.items()
            }
        return found

    def by_sql(self, builder: Any) -> list[dict[str, Any]]:
        assert isinstance(self.cache, DeltaCache)
        query = QueryBuilder()
        for name in ("entries", "traces"):
            self.cache.ensure(name)
            query = query.register(name, DeltaTable(self.cache.table_path(name)))
        answer = query.execute(CURRENT.replace("LLMLogic", builder.name))
        return pa.table(pa.RecordBatchReader.from_stream(answer)).to_pylist()


@pytest.fixture(params=[MemoryCache, DeltaCache])
def abt(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    make: Callable[..., Cache] = request.param
    return Shop(make(str(tmp_path / "cache")) if make is DeltaCache else make())


def test_inputs_there_and_back(abt: Shop) -> None:
    before = abt.run(shop.Logic)
    abt.retitle("settee")
    assert abt.run(shop.Logic) != before
    assert abt.read_by_key(shop.Prompt)[P1] == "hello: settee"
    abt.retitle("red lamp")
    built = abt.world.built.copy()
    assert abt.run(shop.Logic) == before
    assert abt.world.built == built
    assert abt.read_by_key(shop.Logic) == before
    assert abt.read_by_key(shop.Title)[P1] == "red lamp"
    assert abt.read_by_key(shop.Prompt) == {P1: "hello: red lamp", P2: "hello: sofa"}
    assert abt.read_by_key(shop.Matrix)["abt", "US"][0] == "p1|8|2"
    assert {key: abt.get(shop.Logic, key) for key in before} == before


def test_configs_there_and_back(abt: Shop) -> None:
    other = {shop.Prompt: {"template": "{title}?"}}
    before = abt.run(shop.Label)
    there = abt.run(shop.Label, configs=other)
    assert abt.read_by_key(shop.Label) == there
    assert abt.run(shop.Label) == before
    assert abt.read_by_key(shop.Label) == before
    assert abt.get(shop.Label, P1) == before[P1]
    assert abt.get(shop.Label, P1, other) == there[P1]


def test_null_there_and_back(abt: Shop) -> None:
    before = abt.run(shop.Label)
    abt.retitle(None)
    assert abt.run(shop.Label)[P1] is None
    assert abt.read_by_key(shop.Label) == {P2: before[P2]}
    assert abt.read_by_key(shop.Prompt) == {P2: "hello: sofa"}, "an intermediate feature too"
    assert abt.read_by_key(shop.Title) == {P1: None, P2: "sofa"}, "a source's null is an entry"
    appended = len(abt.cache.history("Title"))
    abt.run(shop.Label)
    assert abt.get(shop.Prompt, P1) is None
    assert len(abt.cache.history("Title")) == appended
    abt.retitle("red lamp")
    built = abt.world.built.copy()
    assert abt.run(shop.Label) == before
    assert abt.world.built == built
    assert abt.read_by_key(shop.Label) == before
    assert abt.read_by_key(shop.Prompt) == {P1: "hello: red lamp", P2: "hello: sofa"}


def test_null_seen_by_a_single_get(abt: Shop) -> None:
    before = abt.run(shop.Label)
    abt.retitle(None)
    assert abt.get(shop.Label, P1) is None
    assert abt.read_by_key(shop.Label) == {P2: before[P2]}
    abt.retitle("red lamp")
    assert abt.run(shop.Label) == before
    assert abt.read_by_key(shop.Label) == before


def test_a_pointer_to_nothing_is_written_once(abt: Shop) -> None:
    abt.run(shop.Label)
    abt.retitle(None)
    abt.get(shop.Label, P1)
    appended: list[Any] = []
    abt.cache.append = lambda *rows: appended.append(rows)  # type: ignore[method-assign]
    assert abt.get(shop.Label, P1) is None
    assert appended == []


def test_what_failed_keeps_what_was_current(abt: Shop) -> None:
    before = abt.run(shop.Label)
    abt.world.broken.add(P1)
    abt.run(shop.Label)
    assert abt.read_by_key(shop.Label) == before


def test_nothing_older_than_null_is_kept_for_a_key_that_fails(abt: Shop) -> None:
    abt.run(shop.Label)
    abt.retitle(None)
    abt.run(shop.Label)
    abt.world.broken.add(P1)
    session = Session(abt.context, abt.cache, engine="local")
    result = session.run(shop.Label.over(shop.ProductIds), merchant="abt", market="US")
    assert result.execution.kept(["Label"]) == 0


def test_an_answer_between_two_runs(abt: Shop) -> None:
    """A get made another entry current; the next run finds everything as the last one did, and says so."""
    before = abt.run(shop.Label)
    abt.retitle("settee")
    assert abt.get(shop.Label, P1) == "hello: settee / it works"
    assert abt.read_by_key(shop.Label)[P1] == "hello: settee / it works"
    abt.retitle("red lamp")
    built = abt.world.built.copy()
    assert abt.run(shop.Label) == before
    assert abt.world.built == built
    assert abt.read_by_key(shop.Label) == before
    assert abt.read_by_key(shop.Prompt)[P1] == "hello: red lamp"


def test_a_matrix_between_two_runs(abt: Shop) -> None:
    """Another run gathered other titles; what single requests search in is what the last run searched in."""
    before = abt.run(shop.Logic)
    abt.retitle("settee")
    Controller(abt.context, abt.cache).get(shop.Matrix, ("abt", "US"), gather=True)
    abt.retitle("red lamp")
    assert abt.run(shop.Logic) == before
    assert abt.read_by_key(shop.Matrix)["abt", "US"][0] == "p1|8|2"


def test_versions_there_and_back_with_a_broken_off_run_between(abt: Shop) -> None:
    abt.world.version = 1
    before = abt.run(shop.Label)
    abt.retitle("settee")
    abt.world.version = 2
    append = abt.cache.append

    def ends(entries: Any = None, traces: Any = ()) -> None:
        append(entries, ())
        if "Label" in entries["builder"].to_pylist():
            raise shop.Crash

    abt.cache.append = ends  # type: ignore[method-assign]
    with pytest.raises(shop.Crash):
        abt.run(shop.Label)
    abt.cache.append = append  # type: ignore[method-assign]
    abt.retitle("red lamp")
    abt.world.version = 1
    session = Session(abt.context, abt.cache, engine="local")
    session.run(shop.Label.over(shop.ProductIds), merchant="abt", market="US")
    assert abt.read_by_key(shop.Label) == before
