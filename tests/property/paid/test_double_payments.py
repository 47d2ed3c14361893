"""However runs overlap, each payment beyond the first is counted once, by somebody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.bindings import Bindings
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.double_payments import DoublePayments, PaidTwice
from featurekit_spark.llm import LLMCompletion
from featurekit_spark.results import Counts
from featurekit_spark.testing.behaviour import entry, rows
from featurekit_spark.testing.fakes import CountingLLM

BOUND = Bindings(type("World", (), {"llm": CountingLLM(), "merchant_config": {}})(), None)[LLMCompletion]


@given(
    appends=st.lists(st.tuples(st.sampled_from("abcd"), st.sets(st.integers(0, 9), min_size=1)), max_size=12)
)
def test_every_payment_but_the_first(appends: list[tuple[str, set[int]]]) -> None:
    cache = MemoryCache()
    looks = {run: DoublePayments(run) for run in "abcd"}
    paid: dict[str, set[int]] = {run: set() for run in "abcd"}
    payers: dict[int, set[str]] = {}
    for run, keys in appends:
        new = keys - paid[run]  # a run asks nothing again
        if new:
            paid[run] |= new
            made = [
                entry(f"k{i}", f"v{i}", builder="LLMCompletion", run_id=run, tokens=i, usd=0.5)
                for i in sorted(new)
            ]
            cache.append(rows(*made))
            for i in new:
                payers.setdefault(i, set()).add(run)
        looks[run].look(cache, [BOUND], {"LLMCompletion": Counts(calls=len(paid[run]))})
    found = sum((look.found for look in looks.values()), PaidTwice())
    twice = {i: len(runs) - 1 for i, runs in payers.items()}
    assert found.calls == sum(twice.values())
    assert found.tokens == sum(i * times for i, times in twice.items())
    assert found.usd == 0.5 * found.calls
