"""A server that answers nobody is left alone, and one that answers somebody never is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.paid.redis_outage import Outage


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_hang_costs_two_timeouts_and_not_one_for_each_who_asks() -> None:
    clock = Hand()
    outage = Outage(10.0, 10.0, clock)
    waited = 0.0
    for _ in range(1000):
        if outage.may_ask():
            began = clock.now
            clock.now += 5.0
            waited += 5.0
            outage.unanswered(began, "no answer")
    assert waited == 10.0
    clock.now += 10.0
    assert outage.may_ask() and not outage.may_ask(), "one asks for all"
    outage.undecided()
    assert outage.may_ask()
    outage.answered()
    assert all(outage.may_ask() for _ in range(5))


def test_one_connection_that_is_lost_stops_nobody() -> None:
    clock = Hand()
    outage = Outage(10.0, 10.0, clock)
    for _ in range(20):
        began = clock.now
        clock.now += 4.0
        outage.answered()
        clock.now += 1.0
        outage.unanswered(began, "lost")
        assert outage.may_ask()


@given(st.lists(st.tuples(st.sampled_from(["ask", "wait"]), st.booleans(), st.floats(0.01, 30.0))))
def test_who_is_answered_is_never_followed_by_a_pause(steps: list[tuple[str, bool, float]]) -> None:
    """And nobody is sent away unless the server was silent for as long as it may be."""
    clock = Hand()
    outage = Outage(2.0, 3.0, clock)
    silent_since: float | None = None
    for step, answers, seconds in steps:
        if step == "wait":
            clock.now += seconds
            continue
        if not outage.may_ask():
            assert silent_since is not None and clock.now - silent_since >= 2.0
            continue
        began = clock.now
        clock.now += seconds
        if answers:
            outage.answered()
            silent_since = None
            assert outage.may_ask()
        else:
            silent_since = began if silent_since is None else silent_since
            outage.unanswered(began, "")
            assert outage.may_ask() == (clock.now - silent_since < 2.0)
