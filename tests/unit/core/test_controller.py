"""One feature in-process: what a build is given, how failures are told, what an answer carries."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet, Metered, Source, each
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.controller import Controller, Feature
from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ContextError,
    NotBuiltError,
    UnknownBuilderError,
    UsageError,
    ValueMismatchError,
)
from featurekit_spark.freshness import Freshness
from featurekit_spark.testing.fakes import MovingClock


@dataclass(frozen=True)
class Ctx:
    words: dict[str, Any] = field(default_factory=dict)
    calls: Counter[Any] = field(default_factory=Counter)
    clock: Callable[[], datetime] = field(default_factory=MovingClock)
    secret: str = "hidden"


class Word(Source[str]):
    key, value, needs = ("id",), pa.string(), ("words",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> Any:
        word = context.words.get(inputs["id"])
        if isinstance(word, Exception):
            raise word
        return word


class Length(FeatureBuilder[int]):
    key, deps, value, needs = ("id",), (Word,), pa.int64(), ("calls",)

    @dataclass(frozen=True)
    class Config:
        times: int = 1

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> pd.Series[int]:
        context.calls["Length"] += 1
        context.calls["rows"] += len(inputs)
        if (inputs["Word"] == "bad").any():
            raise ValueError("a bad word")
        return inputs["Word"].str.len() * config.times


class Twice(FeatureBuilder[int]):
    key, deps, value = ("id",), (Length,), pa.int64()

    def build_one(self, inputs: Any, config: Any, context: Any) -> int:
        return 2 * int(inputs["Length"])


def controller(**words: Any) -> Controller:
    return Controller(Ctx(words), MemoryCache())


def test_an_answer_carries_its_origin() -> None:
    own = controller(a="lamp")
    first = own.get(Twice, ("a",))
    assert (first.value, first.status, first.origin, first.age) == (8, "fresh", "computed", timedelta(0))
    assert first.ts == own.context.clock()
    own.context.clock.advance(hours=1)
    again = own.get(Twice, {"id": "a"})
    assert (again.value, again.origin, again.ts, again.age) == (8, "hit", first.ts, timedelta(hours=1))
    assert again.value_hash == first.value_hash
    assert own.context.calls["Length"] == 1


def test_a_changed_input_is_seen_and_an_equal_one_stops_there() -> None:
    own = controller(a="lamp")
    own.get(Twice, ("a",))
    own.context.words["a"] = "sofa"  # as long as before
    assert own.get(Twice, ("a",)).origin == "hit"
    own.context.words["a"] = "chair"
    assert own.get(Twice, ("a",)).value == 10
    own.context.words["a"] = "lamp"
    assert own.get(Twice, ("a",)).origin == "hit"
    assert own.context.calls["Length"] == 3


def test_a_batch_is_one_call_in_the_callers_order() -> None:
    own = controller(a="lamp", b="chair", c="x")
    features = own.get_many(Twice, [("b",), ("a",), ("c",), ("b",)])
    assert [f.value for f in features] == [10, 8, 2, 10]
    assert own.context.calls == {"Length": 1, "rows": 3}
    assert own.get_many(Twice, []) == []


def test_keys_are_checked() -> None:
    with pytest.raises(UsageError, match=r"has the key fields \('id',\) \(1\), found 2"):
        controller().get(Twice, ("a", "b"))


# -- nulls and failures --------------------------------------------------------------------------------------


def test_a_null_input_gives_null_without_a_build() -> None:
    own = controller(a=None)
    feature = own.get(Twice, ("a",))
    assert (feature.value, feature.status, feature.require()) == (None, "fresh", None)
    assert not own.context.calls


def test_a_builder_that_accepts_nulls_is_asked() -> None:
    class Or(FeatureBuilder[str]):
        key, deps, value, accepts_null = ("id",), (Word,), pa.string(), True

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return inputs["Word"] or "nothing"

    assert controller(a=None).get(Or, ("a",)).value == "nothing"


def test_a_failure_names_its_root() -> None:
    own = controller(a=OSError("disk on fire"))
    feature = own.get(Twice, ("a",))
    assert feature.status == "error"
    assert feature.value is None
    assert feature.error is not None
    assert feature.error.startswith('Word["a"]: OSError: disk on fire (build_one, line ')
    with pytest.raises(BuildError, match="disk on fire"):
        feature.require()


def test_one_bad_key_costs_the_others_nothing() -> None:
    own = controller(**{f"w{i}": "bad" if i in (3, 11) else "lamp" for i in range(16)})
    features = own.get_many(Twice, [(f"w{i}",) for i in range(16)])
    assert [i for i, f in enumerate(features) if f.status == "error"] == [3, 11]
    assert all(f.value == 8 for i, f in enumerate(features) if i not in (3, 11))
    assert 'Length["w3"]: ValueError: a bad word' in (features[3].error or "")
    before = own.context.calls["rows"]
    own.get_many(Twice, [(f"w{i}",) for i in range(16)])
    assert own.context.calls["rows"] - before <= 2 * 2  # only what failed is tried again


def test_a_fault_of_the_builder_is_not_hunted_for_key_by_key() -> None:
    own = controller(**{f"w{i}": "bad" for i in range(1_000)})
    features = own.get_many(Length, [(f"w{i}",) for i in range(1_000)])
    assert {f.status for f in features} == {"error"}
    assert own.context.calls["Length"] < 100


def test_an_error_recovers() -> None:
    own = controller(a="bad")
    assert own.get(Twice, ("a",)).status == "error"
    own.context.words["a"] = "lamp"
    assert own.get(Twice, ("a",)).value == 8


def test_a_value_that_does_not_fit_is_an_error_of_its_key() -> None:
    class Wrong(FeatureBuilder[int]):
        key, value = ("id",), pa.int64()

        def build_one(self, inputs: Any, config: Any, context: Any) -> Any:
            return "seven" if inputs["id"] == "a" else 7

    one, other = controller().get_many(Wrong, [("a",), ("b",)])
    assert "Wrong[\"a\"]: 'seven' (str) is not a int64" in (one.error or "")
    assert other.value == 7


@pytest.mark.parametrize("answer", [[1, 2], [], pd.Series([1, 2])])
def test_a_build_returns_one_value_for_each_row(answer: Any) -> None:
    class Short(FeatureBuilder[int]):
        key, value = ("id",), pa.int64()

        def build(self, inputs: Any, config: Any, context: Any) -> Any:
            return answer

    feature = controller().get(Short, ("a",))
    assert f"build returned {len(answer)} values for 1 keys" in (feature.error or "")


@pytest.mark.parametrize("error", [BudgetError("spent"), ContextError("no llm")])
def test_some_errors_are_the_runs_and_not_a_keys(error: Exception) -> None:
    own = controller(a=error)
    with pytest.raises(type(error)):
        own.get(Twice, ("a",))


def test_a_stand_in_is_served_and_never_stored() -> None:
    class Safe(FeatureBuilder[int]):
        key, deps, value, freshness = ("id",), (Length,), pa.int64(), Freshness(fallback=0)

        def build_one(self, inputs: Any, config: Any, context: Any) -> int:
            return int(inputs["Length"])

    own = controller(a="bad")
    feature = own.get(Safe, ("a",))
    assert (feature.value, feature.status, feature.origin, feature.ts) == (0, "fallback", "fallback", None)
    assert "a bad word" in (feature.error or "")
    assert feature.require() == 0
    assert own.cache.ids("Safe").to_pylist() == []


def test_what_was_built_before_a_stop_is_kept() -> None:
    class Paid(FeatureBuilder[str]):
        key, value, paid, needs = ("prompt",), pa.string(), True, ("calls",)

        def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
            context.calls[inputs["prompt"]] += 1
            return Metered(inputs["prompt"].upper(), tokens=5, usd=0.25)

    class Stopped(FeatureBuilder[str]):
        key, deps, value = ("prompt",), (Paid,), pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            raise BudgetError("spent")

    own = controller()
    with pytest.raises(BudgetError):
        own.get(Stopped, ("hi",))
    row = own.cache.newest("Paid").to_pylist()[0]
    assert (row["value"], row["tokens"], row["usd"]) == (b"HI", 5, 0.25)
    assert own.get(Paid, ("hi",)).value == "HI"
    assert own.context.calls["hi"] == 1


def test_a_spent_quota_keeps_what_the_same_batch_paid_for() -> None:
    class Quota(FeatureBuilder[str]):
        key, value, paid, needs = ("prompt",), pa.string(), True, ("calls",)

        async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
            context.calls[inputs["prompt"]] += 1
            if inputs["prompt"] == "b":
                raise BudgetError("spent")
            return Metered(inputs["prompt"].upper(), tokens=5, usd=0.25)

    own = controller()
    with pytest.raises(BudgetError, match="spent"):
        own.get_many(Quota, [("a",), ("b",), ("c",)])
    assert sorted(own.cache.newest("Quota")["key"].to_pylist()) == ['["a"]', '["c"]']
    assert [f.value for f in own.get_many(Quota, [("a",), ("c",)])] == ["A", "C"]
    assert dict(own.context.calls) == {"a": 1, "b": 1, "c": 1}


# -- deps of other keys --------------------------------------------------------------------------------------


class Parts(FeatureBuilder[list[str]]):
    key, deps, value = ("id",), (Word,), pa.list_(pa.string())

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str | None]:
        return [part if part != "-" else None for part in inputs["Word"].split()]


class Shout(FeatureBuilder[str]):
    key, value, needs = ("text",), pa.string(), ("calls",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        context.calls[inputs["text"]] += 1
        if inputs["text"] == "bad":
            raise ValueError("a bad text")
        return str(inputs["text"]).upper()


class Shouts(FeatureBuilder[str]):
    key, value = ("id",), pa.string()
    deps = (Shout.on(text=each(Parts)), Shout.on(text=Word).named("whole"))

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"{inputs['Shout']} {inputs['whole']}"


def test_keys_from_values_and_fan_out() -> None:
    own = controller(a="red lamp red", b="red", c="- x")
    features = own.get_many(Shouts, [("a",), ("b",), ("c",)])
    assert features[0].value == "['RED', 'LAMP', 'RED'] RED LAMP RED"
    assert features[1].value == "['RED'] RED"
    assert features[2].value == "[None, 'X'] - X"
    assert own.context.calls["red"] == 1  # equal texts share one entry


def test_an_empty_list_and_a_null_one() -> None:
    own = controller(a="   ", b=None)
    assert own.get(Shouts, ("a",)).value == "[]    "
    assert own.get(Shouts, ("b",)).value is None


def test_a_failing_item_fails_the_reader() -> None:
    feature = controller(a="red bad").get(Shouts, ("a",))
    assert 'Shout["bad"]: ValueError: a bad text' in (feature.error or "")


def test_the_order_of_a_fan_out_counts() -> None:
    own = controller(a="x y", b="y x")
    one, other = own.get_many(Shouts, [("a",), ("b",)])
    assert (one.value, other.value) == ("['X', 'Y'] X Y", "['Y', 'X'] Y X")


class Ids(KeySet):
    key, of, value, needs = ("shop",), "id", pa.list_(pa.string()), ("words",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return list(context.words)


class Everything(FeatureBuilder[str]):
    key, deps, value, needs = ("shop",), (Length.over(Ids),), pa.string(), ("calls",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        context.calls["Everything"] += 1
        gathered = inputs["Length"]
        return f"{gathered.keys} {list(gathered.values)} {gathered.failed}"


class Rank(FeatureBuilder[str]):
    key, deps, value = ("shop", "id"), (Everything, Word), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return f"{inputs['Word']} of {inputs['Everything']}"


def test_a_group_is_not_gathered_by_accident() -> None:
    own = controller(b="lamp", a="chair", n=None, x="bad")
    with pytest.raises(NotBuiltError, match=r"Everything was never built for {'shop': 's'} .* gather=True"):
        own.get(Rank, ("s", "a"))
    asked = own.get(Rank, ("s", "a"), gather=True)
    assert asked.value == "chair of ('a', 'b', 'n') [5, 4, None] ('x',)"
    own.context.words["c"] = "new"
    assert own.get(Rank, ("s", "a")).value == asked.value  # the group's current entry
    assert "('a', 'b', 'c', 'n')" in (own.get(Rank, ("s", "a"), gather=True).value or "")


def test_a_group_does_not_depend_on_the_order_of_its_members() -> None:
    one, other = controller(a="x", b="yy"), controller(b="yy", a="x")
    assert one.get(Everything, ("s",), gather=True).value == other.get(Everything, ("s",), gather=True).value


def test_a_failed_member_is_no_missing_member() -> None:
    own = controller(a="x", b="bad")
    assert own.get(Everything, ("s",), gather=True).value == "('a',) [1] ('b',)"
    del own.context.words["b"]
    assert own.get(Everything, ("s",), gather=True).value == "('a',) [1] ()"


# -- time ----------------------------------------------------------------------------------------------------


class Rate(FeatureBuilder[int]):
    key, value, needs, freshness = ("id",), pa.int64(), ("calls",), Freshness(ttl="1h")

    def build_one(self, inputs: Any, config: Any, context: Any) -> int:
        context.calls["Rate"] += 1
        return int(context.calls["Rate"])


def test_an_entry_answers_until_its_ttl_has_passed() -> None:
    own = controller()
    first = own.get(Rate, ("a",))
    own.context.clock.advance(minutes=59)
    assert own.get(Rate, ("a",)).value == 1
    own.context.clock.advance(minutes=1)
    later = own.get(Rate, ("a",))
    assert (later.value, later.origin) == (2, "computed")
    assert first.ts is not None
    assert later.ts == first.ts + timedelta(hours=1)
    own.context.clock.advance(minutes=59)
    assert own.get(Rate, ("a",)).value == 2


def test_a_source_with_a_ttl_is_not_read_before() -> None:
    class Slow(Source[str]):
        key, value, needs, freshness = ("id",), pa.string(), ("words",), Freshness(ttl="1h")

        def build_one(self, inputs: Any, config: Any, context: Any) -> Any:
            return context.words[inputs["id"]]

    own = controller(a="old")
    own.get(Slow, ("a",))
    for value, minutes in (("new", 30), ("new", 29), ("newer", 2)):
        own.context.words["a"] = value
        own.context.clock.advance(minutes=minutes)
    assert own.get(Slow, ("a",)).value == "newer"
    own.context.words["a"] = "old"
    own.context.clock.advance(minutes=59)
    assert own.get(Slow, ("a",)).value == "newer"
    own.context.clock.advance(minutes=1)
    assert own.get(Slow, ("a",)).value == "old"  # read before, but long ago
    own.context.words["a"] = "newer"
    own.context.clock.advance(minutes=59)
    assert own.get(Slow, ("a",)).value == "old"


def test_a_clock_without_a_zone_is_refused() -> None:
    context = Ctx(clock=lambda: datetime(2026, 1, 31))
    with pytest.raises(ContextError, match="without a zone; return an aware datetime"):
        Controller(context, MemoryCache()).get(Rate, ("a",))


def test_a_context_without_a_clock_has_the_wall_clock() -> None:
    before = datetime.now(UTC)
    feature = Controller(None, MemoryCache()).get(define_constant(), ("a",))
    assert feature.ts is not None
    assert before <= feature.ts <= datetime.now(UTC)


def define_constant() -> type[FeatureBuilder[str]]:
    class Constant(FeatureBuilder[str]):
        key, value = ("id",), pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return "x"

    return Constant


# -- configs and context -------------------------------------------------------------------------------------


def test_configs_of_any_builder_for_one_request() -> None:
    own = controller(a="lamp")
    assert own.get(Twice, ("a",), {Length: Length.Config(times=10)}).value == 80
    assert own.get(Twice, ("a",), {"Length": {"times": 3}}).value == 24
    assert own.get(Twice, ("a",)).value == 8
    assert own.get(Twice, ("a",), {"Length": {"times": 10}}).origin == "hit"
    with pytest.raises(UnknownBuilderError, match="no builder 'Lenght' in this graph.*Did you mean 'Length'"):
        own.get(Twice, ("a",), {"Lenght": {"times": 3}})
    with pytest.raises(UnknownBuilderError, match="no builder 'Rate' in this graph"):
        own.get(Twice, ("a",), {Rate: Rate.Config()})


def test_an_undeclared_attribute_is_told_and_nothing_is_stored() -> None:
    class Nosy(FeatureBuilder[str]):
        key, value = ("id",), pa.string()

        def build_one(self, inputs: Any, config: Any, context: Any) -> str:
            return str(context.secret)

    own = controller()
    with pytest.raises(
        ContextError, match=r"Nosy reads context.secret, which it does not declare; add it: needs"
    ):
        own.get(Nosy, ("a",))
    assert len(own.cache.history("Nosy")) == 0


# -- async ---------------------------------------------------------------------------------------------------


class Slowly(FeatureBuilder[str]):
    key, value = ("id",), pa.string()

    async def build_one(self, inputs: Any, config: Any, context: Any) -> Metered[str]:
        await asyncio.sleep(0.001)
        if inputs["id"] == "bad":
            raise TimeoutError("no answer")
        return Metered(inputs["id"], tokens=2)


class Batched(FeatureBuilder[str]):
    key, value = ("id",), pa.string()

    async def build(self, inputs: Any, config: Any, context: Any) -> list[str]:
        await asyncio.sleep(0.001)
        return [text.upper() for text in inputs["id"]]


def test_async_builders() -> None:
    own = controller()
    features = own.get_many(Slowly, [("a",), ("bad",), ("c",)])
    assert [f.value for f in features] == ["a", None, "c"]
    assert "TimeoutError: no answer" in (features[1].error or "")
    assert own.cache.newest("Slowly")["tokens"].to_pylist() == [2, 2]
    assert own.get(Batched, ("a",)).value == "A"


def test_sync_get_works_inside_a_running_loop() -> None:
    async def handler() -> Any:
        return controller().get(Slowly, ("a",)).value

    assert asyncio.run(handler()) == "a"


def test_async_get_leaves_the_loop_free() -> None:
    async def handler() -> list[Feature[str]]:
        own = controller()
        return list(await asyncio.gather(own.aget(Slowly, ("a",)), own.aget(Batched, ("b",))))

    assert [f.value for f in asyncio.run(handler())] == ["a", "B"]


def test_a_sync_get_inside_an_async_builder_is_an_error_and_no_deadlock() -> None:
    own = controller()

    class Nested(FeatureBuilder[str]):
        key, value = ("id",), pa.string()

        async def build_one(self, inputs: Any, config: Any, context: Any) -> Any:
            return own.get(Slowly, ("a",)).value

    assert "called inside an async builder; await the async client instead" in (
        own.get(Nested, ("x",)).error or ""
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sync_get_works_in_a_forked_process() -> None:
    """The parent's background loop has no thread in the child."""
    own = controller()
    assert own.get(Slowly, ("a",)).value == "a"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, (own.get(Slowly, ("b",)).value or "").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        assert answers.read() == b"b"
    os.waitpid(child, 0)


# -- by hand -------------------------------------------------------------------------------------------------


class ByHand(FeatureBuilder[str]):
    key, value = ("id",), pa.string()

    def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
        context.calls["ByHand"] += 1
        word = controller.get(Word, key).require()
        other = controller.get(Word, (word,)).require() if word else None
        return self.hashed(f"{word} {other}")


def test_by_hand_runs_again_only_when_something_it_read_changed() -> None:
    own = controller(a="b", b="c", c="d")
    assert own.get(ByHand, ("a",)).value == "b c"
    assert own.get(ByHand, ("a",)).origin == "hit"
    own.context.words["c"] = "not read"
    assert own.get(ByHand, ("a",)).origin == "hit"
    own.context.words["b"] = "e"
    assert own.get(ByHand, ("a",)).value == "b e"
    own.context.words["b"] = "c"
    assert own.get(ByHand, ("a",)).value == "b c"
    assert own.get(ByHand, ("a",)).origin == "hit"


def test_by_hand_failures_are_told_and_tried_again() -> None:
    own = controller(a=OSError("disk on fire"))
    assert 'Word["a"]: OSError: disk on fire' in (own.get(ByHand, ("a",)).error or "")
    own.context.words.update(a="b", b="c")
    assert own.get(ByHand, ("a",)).value == "b c"


def test_by_hand_reads_through_other_features() -> None:
    class Sum(FeatureBuilder[int]):
        key, value = ("id",), pa.int64()

        def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[int | None, str]:
            values = [f.require() for f in controller.get_many(Twice, [key, ("b",)])]
            return self.hashed(sum(value or 0 for value in values))

    own = controller(a="lamp", b="chair")
    assert own.get(Sum, ("a",)).value == 18
    own.context.words["b"] = "x"
    assert own.get(Sum, ("a",)).value == 10


def test_by_hand_with_a_config_of_its_own_always_runs() -> None:
    class Own(FeatureBuilder[int]):
        key, value = ("id",), pa.int64()

        def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[int | None, str]:
            return self.hashed(controller.get(Twice, key, {Length: {"times": 10}}).require())

    own = controller(a="lamp")
    assert own.get(Own, ("a",)).value == 80
    own.context.words["a"] = "x"
    assert own.get(Own, ("a",)).value == 20


def test_by_hand_sees_what_it_declares_if_it_declares() -> None:
    class Strict(FeatureBuilder[str]):
        key, value, needs = ("id",), pa.string(), ("words",)

        def get(self, key: Any, config: Any, context: Any, controller: Any) -> tuple[str | None, str]:
            return self.hashed(context.secret)

    with pytest.raises(ContextError, match="Strict reads context.secret"):
        controller().get(Strict, ("a",))


def test_by_hand_of_a_wrong_type() -> None:
    class Wrong(FeatureBuilder[int]):
        key, value = ("id",), pa.int64()

        def get(self, key: Any, config: Any, context: Any, controller: Any) -> Any:
            return self.hashed("seven")  # type: ignore[arg-type]

    assert "'seven' (str) is not a int64" in (controller().get(Wrong, ("a",)).error or "")


# -- the two short forms -------------------------------------------------------------------------------------


def test_the_builders_own_get() -> None:
    own = controller(a="lamp")
    value, value_hash = Twice().get(("a",), Twice.Config(), own.context, own)
    assert (value, value_hash) == (8, own.get(Twice, ("a",)).value_hash)


def test_a_builder_bound_to_a_cache() -> None:
    context, cache = Ctx({"a": "lamp", "x": "bad"}), MemoryCache()
    assert cache(Length).get(key=("a",), context=context, cache=cache) == 4
    assert cache(Length).get(key={"id": "a"}, context=context, config=Length.Config(times=2)) == 8
    with pytest.raises(BuildError, match="a bad word"):
        cache(Length).get(key=("x",), context=context)


def test_hashed_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueMismatchError):
        Twice().hashed("x")  # type: ignore[arg-type]
