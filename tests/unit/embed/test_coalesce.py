"""Single questions asked together: who gets which answer, and how many go at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.embed.coalesce import Coalescer, shares
from featurekit_spark.errors import BuildError

SHORT = 0.005


class Sender:
    """Answers a text with itself in brackets; refuses those that begin with '!', one by one."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    async def __call__(self, texts: list[str]) -> Sequence[str | Exception]:
        self.batches.append(texts)
        await asyncio.sleep(0)
        return [BuildError(text) if text.startswith("!") else f"[{text}]" for text in texts]


def coalescer(sender: Sender, *, most: int = 4, longest: int = 1000) -> Coalescer[str]:
    return Coalescer(sender, most=most, longest=longest, wait_s=SHORT)


@given(
    texts=st.lists(st.text(max_size=8), max_size=40),
    pauses=st.sets(st.integers(0, 40)),
    most=st.integers(1, 7),
    longest=st.integers(1, 30),
)
def test_each_gets_its_own_answer_and_batches_are_bounded(
    texts: list[str], pauses: set[int], most: int, longest: int
) -> None:
    sender = Sender()

    async def run() -> list[str | BaseException]:
        asking = coalescer(sender, most=most, longest=longest)
        tasks = []
        for number, text in enumerate(texts):
            tasks.append(asyncio.create_task(asking.ask(text)))
            if number in pauses:
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(run())
    for text, answer in zip(texts, answers, strict=True):
        if text.startswith("!"):
            assert isinstance(answer, BuildError) and str(answer) == text
        else:
            assert answer == f"[{text}]"
    assert [text for batch in sender.batches for text in batch] == texts, "nothing twice, in order"
    for batch in sender.batches:
        assert len(batch) <= most
        assert len(batch) == 1 or sum(map(len, batch)) <= longest


def test_what_comes_at_once_goes_together() -> None:
    sender = Sender()

    async def run() -> None:
        asking = coalescer(sender, most=4)
        await asyncio.gather(*(asking.ask(str(i)) for i in range(10)))
        await asking.ask("later")

    asyncio.run(run())
    assert [len(batch) for batch in sender.batches] == [4, 4, 2, 1]


def test_a_batch_that_fails_fails_for_its_own_texts() -> None:
    async def send(texts: list[str]) -> Sequence[str]:
        if "bad" in texts:
            raise BuildError("no")
        return texts

    async def run() -> list[str | BaseException]:
        asking: Coalescer[str] = Coalescer(send, most=2, longest=1000, wait_s=SHORT)
        texts = ["a", "bad", "b", "c"]
        return await asyncio.gather(*map(asking.ask, texts), return_exceptions=True)

    first, second, *others = asyncio.run(run())
    assert isinstance(first, BuildError) and isinstance(second, BuildError) and others == ["b", "c"]


def test_too_few_answers_are_nobodys() -> None:
    async def send(texts: list[str]) -> Sequence[str]:
        return texts[:-1]

    async def run() -> list[str | BaseException]:
        asking: Coalescer[str] = Coalescer(send, most=2, longest=1000, wait_s=SHORT)
        return await asyncio.gather(asking.ask("a"), asking.ask("b"), return_exceptions=True)

    assert all(isinstance(answer, ValueError) for answer in asyncio.run(run()))


def test_who_gives_up_costs_the_others_nothing() -> None:
    sender = Sender()

    async def run() -> None:
        asking = coalescer(sender)
        gone, stays = asyncio.create_task(asking.ask("gone")), asyncio.create_task(asking.ask("stays"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == "[stays]"
        assert gone.cancelled()

    asyncio.run(run())
    assert sender.batches == [["stays"]], "what nobody waits for is not asked"


def test_a_loop_that_ends_leaves_nobody_waiting() -> None:
    async def send(texts: list[str]) -> Sequence[str]:
        await asyncio.sleep(60)
        return texts

    async def run() -> None:
        asking: Coalescer[str] = Coalescer(send, most=1, longest=10, wait_s=SHORT)
        waiting = asyncio.create_task(asking.ask("a"))
        await asyncio.sleep(0.01)
        (under_way,) = asking._under_way
        under_way.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**6), min_size=1).filter(any))
def test_shares_add_up_and_are_fair(total: int, weights: list[int]) -> None:
    parts = shares(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1.001
