"""Two runs at once that share leases: what both need is asked by one, whatever becomes of the other."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark import aio
from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source
from featurekit_spark.cache.base import Entry
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.elsewhere import Elsewhere
from featurekit_spark.cache.folder import Folder
from featurekit_spark.double_payments import PaidTwice
from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.flight import Held, Leases, SingleFlight
from featurekit_spark.paid.leases import LocalLeases
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.session import Limits, RunResult, Session
from featurekit_spark.testing.fakes import MovingClock
from featurekit_spark.testing.redis import redis_server

PROMPTS, AT_ONCE = 120, 4


@pytest.fixture(params=["local", "redis"])
def leases(request: Any) -> Iterator[Callable[..., Any]]:
    """Makes leases that share; `lease_s` as given."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    made: list[Any] = []

    def make(lease_s: float = 30.0) -> Any:
        made.append(LocalLeases(lease_s) if url is None else RedisLeases(url, lease_s))
        return made[-1]

    yield make
    for one in made:
        if isinstance(one, RedisLeases):
            aio.run(one.aclose())


def name(request: pytest.FixtureRequest) -> str:
    return request.node.name


# -- any leases ----------------------------------------------------------------------------------------------


def test_one_of_many_has_it(leases: Any, request: Any) -> None:
    one = leases()

    async def all_ask() -> list[Held | None]:
        return await asyncio.gather(*(one.take(name(request), f"run {i}") for i in range(20)))

    answers = aio.run(all_ask())
    assert answers.count(None) == 1
    (held,) = {answer for answer in answers if answer is not None}
    assert not held.answered


def test_what_it_becomes(leases: Any, request: Any) -> None:
    one, what = leases(), name(request)

    async def main() -> None:
        assert await one.take(what, "a") is None
        await one.end(what, "b", answered=True)
        held = await one.take(what, "b")
        assert held is not None and not held.answered, "only its owner ends it"
        await one.end(what, "a", answered=False)
        assert await one.take(what, "b") is None, "a call that failed is anybody's"
        await one.end(what, "b", answered=True)
        known = await one.take(what, "a")
        assert known is not None and known.answered
        assert await one.take(what, "a", instead_of="something else") == known
        assert await one.take(what, "a", instead_of=known.mark) is None
        assert (await one.take(what, "c", instead_of=known.mark)) not in (None, known), (
            "one asks in its place"
        )

    aio.run(main())


def test_a_reply_that_was_lost_is_asked_for_again(leases: Any, request: Any) -> None:
    one, what = leases(), name(request)

    async def main() -> None:
        assert await one.take(what, "a") is None
        assert await one.take(what, "a") is None, "it has it"
        assert await one.take(what, "b") is not None
        await one.end(what, "a", answered=True)
        told = await one.take(what, "a")
        assert told is not None and told.answered

    aio.run(main())


def test_it_ends_unless_it_is_renewed(leases: Any, request: Any) -> None:
    one, what, other = leases(0.4), name(request), f"{name(request)} renewed"

    async def main() -> None:
        assert await one.take(what, "a") is None
        assert await one.take(other, "a") is None
        for _ in range(6):
            await asyncio.sleep(0.1)
            await one.renew([other], "a")
        assert await one.take(what, "b") is None
        assert await one.take(other, "b") is not None
        await one.renew([what], "a")  # lost it
        await one.end(what, "a", answered=True)
        held = await one.take(what, "c")
        assert held is not None and not held.answered

    aio.run(main())


# -- runs ----------------------------------------------------------------------------------------------------


@dataclass
class World:
    """`asked` counts calls; each takes `delay_s`. `on_call`: what happens at each."""

    delay_s: float = 0.01
    clock: Callable[[], datetime] = field(default_factory=MovingClock)
    asked: Counter[str] = field(default_factory=Counter)
    on_call: Callable[[int], None] = lambda number: None


class Ids(KeySet):
    key, of, value, version = ("shop",), "id", pa.list_(pa.string()), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return [f"p{i}" for i in range(3 * PROMPTS)]


class Name(Source[str]):
    key, value, version = ("shop", "id"), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"prompt {int(inputs['id'][1:]) % PROMPTS}"


class Ask(FeatureBuilder[str]):
    """At most AT_ONCE calls of a run are in flight, as a client sees to."""

    key, value, needs, paid = ("prompt",), pa.string(), ("asked", "delay_s", "on_call"), True
    version = "1"

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        context.asked[inputs["prompt"]] += 1
        context.on_call(sum(context.asked.values()))
        await asyncio.sleep(context.delay_s)
        return Metered(inputs["prompt"].upper(), tokens=2, usd=0.25)


class Use(FeatureBuilder[str]):
    key, deps, value, version = ("shop", "id"), (Ask.on(prompt=Name),), pa.string(), "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Ask"])


def run(cache: DeltaCache, world: World, shop: str, leases: Leases | None) -> RunResult:
    session = Session(world, cache, engine="local", limits=Limits(micro_batch=AT_ONCE), leases=leases)
    return session.run(Use.over(Ids), run_id=f"run-{shop}", shop=shop)


def test_equal_prompts_of_two_runs_are_one_call(leases: Any, tmp_path: Path) -> None:
    cache, shared, one, other = DeltaCache(str(tmp_path / "c")), leases(), World(), World()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, cache, world, shop, shared) for world, shop in ((one, "a"), (other, "b"))]
        results = [done.result(120) for done in runs]
    assert [result.status for result in results] == ["ok", "ok"]
    asked = one.asked + other.asked
    assert len(asked) == PROMPTS and set(asked.values()) == {1}
    assert one.asked and other.asked, "they share the work"
    for result, world in zip(results, (one, other), strict=True):
        counts = result.builders["Ask"]
        assert counts.calls == len(world.asked) and counts.hit == PROMPTS - len(world.asked)
        assert counts.usd == 0.25 * len(world.asked)
        assert result.paid_twice == PaidTwice()
        assert {k[1]: v for k, v in result.values(Use).items()} == {
            f"p{i}": f"PROMPT {i % PROMPTS}" for i in range(3 * PROMPTS)
        }
    assert len(set(cache.history("Ask")["entry_id"].to_pylist())) == PROMPTS
    again = run(cache, World(), "a", shared)
    assert again.unchanged


def test_without_leases_they_are_counted(tmp_path: Path) -> None:
    cache, one, other = DeltaCache(str(tmp_path / "c")), World(), World()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, cache, world, shop, None) for world, shop in ((one, "a"), (other, "b"))]
        results = [done.result(120) for done in runs]
    assert sum(one.asked.values()) + sum(other.asked.values()) == 2 * PROMPTS
    assert sum(result.paid_twice.calls for result in results) >= PROMPTS


def identity_of(cache: DeltaCache, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The entries that a run makes, by prompt."""
    other = DeltaCache(str(tmp_path / "other"))
    run(other, World(), "a", None)
    return {row["key"]: row for row in other.history("Ask").to_pylist()}


def test_an_owner_that_died_is_waited_for_no_longer_than_its_lease(leases: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "c"))
    known = identity_of(cache, tmp_path)
    journal = cache.journal("dead", size=4)
    assert journal is not None
    shared = leases(1.0)
    dying = [known[f'["prompt {i}"]'] for i in range(8)]
    for row in dying:
        assert aio.run(shared.take(f"{journal.place}/{row['entry_id']}", "dead")) is None
    # The last thing it did: four answers were made durable, and nobody was told.
    begun = threading.Event()

    def leave(number: int) -> None:
        if number == 1 and not begun.is_set():
            begun.set()
            journal.begin()
            journal.add(pa.Table.from_pylist([{**row, "run_id": "dead"} for row in dying[:4]]))

    world, start = World(on_call=leave), time.monotonic()
    result = run(cache, world, "a", shared)
    assert result.status == "ok"
    assert time.monotonic() - start < 20
    assert set(world.asked.values()) == {1}
    assert {f"prompt {i}" for i in range(PROMPTS)} - set(world.asked) == {f"prompt {i}" for i in range(4)}
    assert result.values(Use)["a", "p0"] == "PROMPT 0"


def test_an_answer_that_is_told_of_and_not_there_is_asked_for(leases: Any, tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "c"))
    known = identity_of(cache, tmp_path)
    journal = cache.journal("x", size=4)
    assert journal is not None
    shared = leases()
    for i in range(5):
        entry = known[f'["prompt {i}"]']
        what = f"{journal.place}/{entry['entry_id']}"
        assert aio.run(shared.take(what, "gone")) is None
        aio.run(shared.end(what, "gone", answered=True))
    world = World()
    assert run(cache, world, "a", shared).status == "ok"
    assert len(world.asked) == PROMPTS and set(world.asked.values()) == {1}


def test_an_answer_that_came_meanwhile_is_found_in_the_cache(leases: Any, tmp_path: Path) -> None:
    """The other run was over, and its journal gone, before this one came to ask."""
    cache, shared = DeltaCache(str(tmp_path / "c")), leases()
    quick = World(delay_s=0.0)

    def meanwhile(number: int) -> None:
        if number == 1:
            thread.start()

    thread = threading.Thread(target=run, args=(cache, quick, "b", shared))
    slow = World(delay_s=0.2, on_call=meanwhile)
    result = run(cache, slow, "a", shared)
    thread.join(60)
    assert result.status == "ok"
    asked = slow.asked + quick.asked
    assert len(asked) == PROMPTS and set(asked.values()) == {1}
    assert len(quick.asked) > PROMPTS / 2


def test_a_call_that_takes_longer_than_a_lease_keeps_it(leases: Any, tmp_path: Path) -> None:
    cache, shared, one, other = DeltaCache(str(tmp_path / "c")), leases(0.6), World(1.5), World(1.5)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, cache, world, shop, shared) for world, shop in ((one, "a"), (other, "b"))]
        assert [done.result(120).status for done in runs] == ["ok", "ok"]
    asked = one.asked + other.asked
    assert len(asked) == PROMPTS and set(asked.values()) == {1}


def test_patience_ends(tmp_path: Path, caplog: Any) -> None:
    """Whoever keeps a lease and answers nothing is not waited for for ever."""
    shared = LocalLeases()
    elsewhere = Elsewhere(Folder(str(tmp_path / "journal")), DeltaCache(str(tmp_path / "c")))
    single = SingleFlight(shared, elsewhere, "here", "run", poll_s=0.05, patience_s=0.3)

    async def main() -> int:
        flight = single.of("Ask", ["id"], lambda entry: True)
        assert await shared.take("here/id", "stuck") is None
        rounds = 0
        while (held := await flight.take(0)) is not None:
            assert isinstance(held, Held) and await flight.wait(0, held) is None
            rounds += 1
        await flight.end(0, answered=True)
        await flight.close()
        assert await shared.take("here/id", "other") == Held("stuck", False), "the lease is not ours"
        return rounds

    assert 3 < aio.run(main()) < 8
    assert "answered nothing in time" in caplog.text


def test_an_answer_that_has_expired_is_none(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path / "c"))
    rows = identity_of(cache, tmp_path)
    elsewhere, shared = (
        Elsewhere(Folder(str(tmp_path / "other/journal")), DeltaCache(str(tmp_path / "other"))),
        LocalLeases(),
    )
    known = rows['["prompt 1"]']["entry_id"]

    async def ask(lives: bool) -> Entry | None:
        single = SingleFlight(shared, elsewhere, "here", "run", poll_s=0.01)
        flight = single.of("Ask", [known], lambda entry: lives)
        held = await flight.take(0)
        assert isinstance(held, Held) and held.answered
        found = await flight.wait(0, held)
        if found is None:
            assert await flight.take(0) is None, "what led to no answer is taken over"
            await flight.end(0, answered=True)
        await flight.close()
        return found

    assert aio.run(shared.take(f"here/{known}", "gone")) is None
    aio.run(shared.end(f"here/{known}", "gone", answered=True))
    found = aio.run(ask(True))
    assert found is not None and found.key == '["prompt 1"]'
    assert aio.run(ask(False)) is None


def test_a_lease_that_ended_is_no_reason_to_ask_again(tmp_path: Path) -> None:
    """Its owner died after its answer was durable, and before it could tell."""
    cache = DeltaCache(str(tmp_path / "c"))
    rows = identity_of(cache, tmp_path)
    other = DeltaCache(str(tmp_path / "other"))
    shared = LocalLeases(0.2)
    single = SingleFlight(shared, Elsewhere(other.journals, other), "here", "run")
    known = rows['["prompt 1"]']["entry_id"]

    async def main() -> Held | Entry | None:
        flight = single.of("Ask", [known], lambda entry: True)
        assert await shared.take(f"here/{known}", "dead") is None
        assert isinstance(await flight.take(0), Held)
        await asyncio.sleep(0.3)
        found = await flight.take(0)
        await flight.close()
        return found

    found = aio.run(main())
    assert isinstance(found, Entry) and found.key == '["prompt 1"]'
    told = aio.run(shared.take(f"here/{known}", "another"))
    assert told is not None and told.answered


# -- the server ----------------------------------------------------------------------------------------------


@pytest.mark.redis
def test_a_server_that_does_not_answer_ends_the_run_before_any_call(tmp_path: Path) -> None:
    with redis_server() as url:
        cache, first = DeltaCache(str(tmp_path)), RedisLeases(url)
        assert run(cache, World(), "a", first).status == "ok"
        aio.run(first.aclose())
    world, shared = World(), RedisLeases(url, timeout_s=0.2)
    with pytest.raises(ServiceError, match="leases of paid calls in Redis at 127.0.0.1.*Is it running"):
        run(cache, world, "b", shared)
    assert not world.asked
    assert "error" not in set(cache.history("Ask")["status"].to_pylist())
    with pytest.raises(ServiceError, match="Is it running"):
        aio.run(shared.take("x", "y"))
    aio.run(shared.aclose())
    assert run(cache, World(), "a", shared).unchanged, "nobody has to be asked"


@pytest.mark.redis
def test_a_server_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    """It takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        world = World()
        shared = RedisLeases(f"redis://127.0.0.1:{server.getsockname()[1]}/0", timeout_s=0.5)
        start = time.monotonic()
        with pytest.raises(ServiceError, match="leases of paid calls"):
            run(DeltaCache(str(tmp_path)), world, "a", shared)
    assert not world.asked and time.monotonic() - start < 10


@pytest.mark.redis
def test_a_user_who_is_refused_is_told_before_any_call(redis_url: str, tmp_path: Path) -> None:
    world, shared = World(), RedisLeases(redis_url.replace("redis://", "redis://nobody:wrong@"))
    with pytest.raises(ConfigError, match="refused the user"):
        run(DeltaCache(str(tmp_path)), world, "a", shared)
    assert not world.asked


@pytest.mark.redis
def test_no_answer_is_lost_with_the_server(tmp_path: Path, caplog: Any) -> None:
    stop = threading.Event()
    world = World(on_call=lambda number: stop.set() if number == 30 else None, delay_s=0.1)
    cache = DeltaCache(str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        with redis_server() as url:
            shared = RedisLeases(url, timeout_s=0.2)
            running = pool.submit(run, cache, world, "a", shared)
            assert stop.wait(30)
        result = running.result(120)
    aio.run(shared.aclose())
    assert result.status == "partial"
    assert "leases of Ask cannot be kept" in caplog.text
    answers = [row for row in cache.history("Ask").to_pylist() if row["status"] == "ok"]
    assert len(answers) == sum(world.asked.values())
    failed = [row["error"] for row in cache.history("Ask").to_pylist() if row["status"] == "error"]
    assert failed and all("[retryable, 0 attempts]" in error for error in failed)


def test_leases_travel_without_their_connections(redis_url: str) -> None:
    shared = RedisLeases(redis_url)
    assert aio.run(shared.take("travels", "a")) is None
    copy = pickle.loads(pickle.dumps(shared))
    assert aio.run(copy.take("travels", "b")) == Held("asked by a", False)
    for one in (shared, copy):
        aio.run(one.aclose())
    assert redis_url not in repr(shared)
