"""Failures of paid keys: what entries tell of them, which are asked again, and what runs say of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.bindings import Bindings
from featurekit_spark.budget import Budget
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller
from featurekit_spark.errors import (
    BudgetError,
    BudgetReachedError,
    BuildError,
    FeaturekitError,
    ServiceError,
    UsageError,
    ValueMismatchError,
)
from featurekit_spark.failures import FailedKeys, Failure, FailureKind, Failures, failure_in, kind_of, tagged
from featurekit_spark.fingerprint import key_json
from featurekit_spark.freshness import Freshness
from featurekit_spark.graph import Graph
from featurekit_spark.results import count, count_rows, to_rows
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from featurekit_spark.why import why
from tests import shop

ABT = {"merchant": "abt", "market": "US"}
SOFA, LAMP = "hello: sofa", "hello: red lamp"


@dataclass
class Place:
    """A shop with one product for each of two prompts, and a cache of either kind."""

    cache: Any
    world: shop.World = field(
        default_factory=lambda: shop.World(
            products={
                ("abt", "US", "p1"): shop.Product("red lamp"),
                ("abt", "US", "p2"): shop.Product("sofa"),
            }
        )
    )
    clock: MovingClock = field(default_factory=MovingClock)

    @property
    def session(self) -> Session:
        return Session(shop.ShopContext(self.world, self.clock), self.cache, engine="local")

    def run(self, **kwargs: Any) -> Any:
        return self.session.run(shop.Suggestions.over(shop.ProductIds), **ABT, **kwargs)

    def asked(self, prompt: str) -> int:
        return self.world.refused[prompt] + self.world.built["Answer", prompt]


@pytest.fixture(params=[MemoryCache, DeltaCache])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(MemoryCache() if request.param is MemoryCache else DeltaCache(str(tmp_path)))


# -- what an error tells -------------------------------------------------------------------------------------


def with_attempts(error: FeaturekitError, attempts: int) -> FeaturekitError:
    error.attempts = attempts
    return error


def not_its_fault() -> BuildError:
    error = BuildError("a wrong key")
    error.blames_request = False
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BuildError("refused"), FailureKind.TERMINAL),
        (ValueMismatchError("no text"), FailureKind.TERMINAL),
        (not_its_fault(), FailureKind.RETRYABLE),
        (ServiceError("down"), FailureKind.RETRYABLE),
        (BudgetError("no quota"), FailureKind.QUOTA),
        (BudgetReachedError("enough"), FailureKind.RETRYABLE),
        (ValueError("who knows"), FailureKind.RETRYABLE),
    ],
)
def test_the_kind_of_an_error(error: Exception, kind: FailureKind) -> None:
    assert kind_of(error) is kind


@given(
    st.lists(st.one_of(st.text(), st.integers(), st.booleans()), min_size=1),
    st.sampled_from([BuildError, ServiceError, BudgetError]),
    st.integers(0, 10**6),
    st.text(),
)
def test_kind_and_attempts_are_told_whatever_key_and_message(
    key: list[Any], error: type[FeaturekitError], attempts: int, message: str
) -> None:
    raised = with_attempts(error(message), attempts)
    text = f"Answer{key_json(key)}: {tagged(message, raised)}"
    assert failure_in(text) == Failure(kind_of(raised), attempts, message)


@given(st.lists(st.text(), min_size=1), st.text())
def test_what_was_written_before_kinds_were_tells_none(key: list[str], message: str) -> None:
    assert failure_in(f"Answer{key_json(key)}: it failed: {message}") is None
    assert failure_in(message.replace("[", "")) is None


def test_no_key_passes_for_a_kind() -> None:
    assert failure_in(f"Answer{key_json(['x]: [terminal, 1 attempt] y'])}: it failed") is None


# -- what is remembered --------------------------------------------------------------------------------------


def test_a_refused_prompt_is_asked_once_and_the_others_go_on(place: Place) -> None:
    place.world.refusing.add(SOFA)
    first = place.run()
    answers = first.builders["Answer"]
    assert (first.status, answers.computed, answers.error, answers.calls) == ("partial", 1, 1, 2)
    assert (answers.terminal, answers.retryable, answers.remembered) == (1, 0, 0)
    told = f'Answer["{SOFA}"]: [terminal, 1 attempt] the model refused'
    assert dict(first.errors) == {'["abt","US","p2"]': told}

    rows = place.cache.history("Suggestions").num_rows
    again = place.run()
    answers = again.builders["Answer"]
    assert dict(again.errors) == dict(first.errors)
    assert (again.status, answers.error, answers.terminal, answers.remembered) == ("partial", 1, 1, 1)
    assert (answers.calls, answers.usd, again.builders["Suggestions"].error) == (0, 0.0, 1)
    assert place.asked(SOFA) == 1
    assert place.cache.history("Answer").num_rows == 2
    assert place.cache.history("Suggestions").num_rows == rows


def test_what_may_pass_is_asked_by_every_run(place: Place) -> None:
    place.world.failing.add(SOFA)
    for _ in range(2):
        counts = place.run().builders["Answer"]
        assert (counts.error, counts.retryable, counts.remembered, counts.calls) == (
            1,
            1,
            0,
            2 if _ == 0 else 1,
        )
    place.world.failing.clear()
    assert place.run().status == "ok"


def test_it_is_asked_again_where_that_is_wanted(place: Place) -> None:
    place.world.refusing = {SOFA, LAMP}
    place.run()
    place.world.refusing = {LAMP}
    assert place.run(retry_errors="retryable").builders["Answer"].remembered == 2
    assert place.run(retry_errors="terminal", retry_builders=[shop.Answer]).builders["Answer"].computed == 1
    assert (place.asked(SOFA), place.asked(LAMP)) == (2, 2)
    place.world.refusing.clear()
    assert place.run().status == "partial"
    healed = place.run(retry_errors="all")
    assert (healed.status, healed.builders["Answer"].hit) == (
        "ok",
        0 if healed.builders["Answer"].computed else 1,
    )
    assert place.run().unchanged


def test_words_and_builders_that_mean_nothing(place: Place) -> None:
    with pytest.raises(UsageError, match="retryable, terminal, quota, all; found 'every'"):
        place.run(retry_errors="every")
    with pytest.raises(UsageError, match=r"'Prompt' is no paid builder .* Known: Answer"):
        place.run(retry_errors="all", retry_builders=[shop.Prompt])


def test_an_error_of_before_kinds_were_kept_is_asked_again(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.run()
    rows = place.cache.history("Answer").to_pylist()
    old = (
        type(place.cache)() if isinstance(place.cache, MemoryCache) else DeltaCache(place.cache.path + "/old")
    )
    for row in rows:
        row["error"] = row["error"] and row["error"].replace("[terminal, 1 attempt] ", "BuildError: ")
    table = pa.Table.from_pylist(rows, schema=place.cache.history("Answer").schema)
    old.append(table.drop(["recorded"]))
    place.cache = old
    assert place.session.failed(shop.Suggestions.over(shop.ProductIds), **ABT) == [
        FailedKeys("Answer", FailureKind.RETRYABLE, 1, 1, f'Answer["{SOFA}"]: BuildError: the model refused')
    ]
    assert place.run().builders["Answer"].calls == 1


def test_a_request_for_one_key_does_not_ask_again(place: Place) -> None:
    place.world.refusing.add(SOFA)
    controller = Controller(shop.ShopContext(place.world, place.clock), place.cache)
    told = [controller.get(shop.Answer, (SOFA,)) for _ in range(2)]
    assert [feature.status for feature in told] == ["error", "error"]
    assert [feature.origin for feature in told] == ["error", "remembered"]
    assert place.asked(SOFA) == 1


class Brief(FeatureBuilder[str]):
    """Its answers stand for an hour, and so does what it refused."""

    key, value, needs, paid = ("prompt",), pa.string(), ("world",), True
    freshness = Freshness(ttl="1h")

    def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
        context.world.refused[inputs["prompt"]] += 1
        if inputs["prompt"] in context.world.refusing:
            raise BuildError("the model refused")
        return str(inputs["prompt"])


def test_a_failure_stands_as_long_as_an_answer_would(place: Place) -> None:
    controller = Controller(shop.ShopContext(place.world, place.clock), place.cache)
    ask: Callable[[], str] = lambda: controller.get(Brief, ("x",)).status  # noqa: E731
    place.world.refusing.add("x")
    assert (ask(), ask(), place.world.refused["x"]) == ("error", "error", 1)
    place.clock.advance(minutes=61)
    place.world.refusing.clear()
    assert (ask(), ask(), place.world.refused["x"]) == ("fresh", "fresh", 2)
    place.clock.advance(minutes=61)
    place.world.refusing.add("x")
    assert (ask(), ask(), place.world.refused["x"]) == ("error", "error", 3)


def test_a_key_that_a_spent_quota_left_unasked_has_no_entry() -> None:
    class Quota(FeatureBuilder[str]):
        key, value, paid = ("prompt",), pa.string(), True

        def build_one(self, inputs: dict[str, Any], config: Any, context: Any) -> str:
            if inputs["prompt"] == "b":
                raise BudgetError("no quota left").with_cost(3, None)
            return str(inputs["prompt"])

    cache = MemoryCache()
    with pytest.raises(BudgetError, match="no quota left"):
        Controller(object(), cache).get_many(Quota, [(text,) for text in "abcd"])
    rows = [(row["key"], row["status"], row["tokens"]) for row in cache.history("Quota").to_pylist()]
    assert rows == [('["a"]', "ok", None), ('["b"]', "error", 3)]


# -- what is told --------------------------------------------------------------------------------------------


def test_a_plan_pays_nothing_for_what_is_remembered(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.world.failing.add(LAMP)
    for _ in range(2):
        place.run()
    plan = place.session.estimate(shop.Suggestions.over(shop.ProductIds), **ABT)
    assert (plan.calls, plan["Answer"].error, plan["Answer"].miss) == (1, 2, 0)
    kinds = {line.kind: (line.builder, line.keys, line.attempts) for line in plan.failed}
    assert kinds == {FailureKind.RETRYABLE: ("Answer", 1, 2), FailureKind.TERMINAL: ("Answer", 1, 1)}
    assert list(plan.failed) == place.session.failed(shop.Suggestions.over(shop.ProductIds), **ABT)
    assert plan.failed[1].example == f'Answer["{SOFA}"]: [terminal, 1 attempt] the model refused'


def test_of_other_groups_a_plan_tells_nothing(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.run()
    place.world.products["buy", "US", "p1"] = shop.Product("chair")
    target = shop.Suggestions.over(shop.ProductIds)
    assert place.session.estimate(target, merchant="buy", market="US").failed == ()
    assert len(place.session.failed(target, merchant="buy", market="US")) == 1


def test_no_new_calls_are_needed_for_what_is_remembered(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.run()
    result = place.run(budget=Budget(no_new_calls=True))
    assert (result.status, result.builders["Answer"].remembered) == ("partial", 1)


def test_why_a_remembered_key_has_no_answer(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.run()
    told = why(shop.Answer, (SOFA,), context=shop.ShopContext(place.world, place.clock), cache=place.cache)
    assert told.step.state == "error"
    assert told.step.cause == (
        "[terminal, 1 attempt] the model refused; it is not asked again, unless a run retries terminal errors"
    )


def test_results_and_rows_are_counted_alike(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.world.failing.add(LAMP)
    place.run()
    result = place.run()
    results = result.execution.evaluator.results["Answer"]
    pairs = [(key_json(key), found) for key, found in results.items()]
    rows = to_rows("Answer", "", pairs)
    assert count_rows(rows, paid=True) == count(list(results.values()), paid=True)
    assert (count_rows(rows, paid=True).terminal, count_rows(rows, paid=True).retryable) == (1, 1)


def test_failures_travel_with_what_they_have_read(place: Place) -> None:
    place.world.refusing.add(SOFA)
    place.run()
    bound = Bindings(shop.ShopContext(place.world, place.clock)).bind_all(Graph([shop.Answer]))[shop.Answer]
    there = pickle.loads(pickle.dumps(Failures(place.cache).read([bound])))
    assert [f.kind for f in there.standing(bound, place.clock()).values()] == [FailureKind.TERMINAL]
    unread = pickle.loads(pickle.dumps(Failures(place.cache)))
    assert unread.standing(bound, place.clock() + timedelta(days=1)) == {}


def test_errors_of_the_library_speak_for_themselves() -> None:
    class Away(FeatureBuilder[str]):
        key, value, version = ("id",), pa.string(), "1"

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            raise ServiceError("the server is away") if inputs["id"] == "a" else KeyError("title")

    found = Controller(SimpleNamespace(), MemoryCache()).get_many(Away, [("a",), ("b",)])
    assert found[0].error == 'Away["a"]: the server is away'
    assert "KeyError: 'title' (build_one, line " in (found[1].error or "")
