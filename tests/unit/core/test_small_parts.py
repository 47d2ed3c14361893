"""Freshness, errors, the background loop."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from featurekit_spark import aio, errors
from featurekit_spark.errors import DefinitionError, FeaturekitError, known_names
from featurekit_spark.freshness import NO_FALLBACK, Freshness, duration

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("6h", 21600), ("30d", 2592000), ("2w", 1209600), ("1 h", 3600)],
)
def test_durations(text: str, seconds: int) -> None:
    assert duration(text) == timedelta(seconds=seconds)
    assert duration(duration(text)) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "h", "1.5h", "-1h", "1 day", "1h30m", "6H"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(DefinitionError, match="is no duration; write a whole number and a unit"):
        duration(text)


def test_expiry() -> None:
    assert Freshness().expiry(NOON) is None
    assert Freshness(ttl="1h").expiry(NOON) == NOON + timedelta(hours=1)
    assert Freshness(ttl=timedelta(days=1)).expiry(NOON) == NOON + timedelta(days=1)
    assert Freshness().fallback is NO_FALLBACK
    assert Freshness(fallback=None).fallback is None
    with pytest.raises(DefinitionError):
        Freshness(ttl="soon")


def test_names_in_messages() -> None:
    assert known_names("tilte", ["title", "brand"]) == "Known: brand, title. Did you mean 'title'?"
    assert known_names("xyz", []) == "Known: none."


def test_one_root_and_where_a_retry_is_worth_it() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, FeaturekitError) for kind in kinds)
    assert {kind.__name__ for kind in kinds if kind.retryable} == {
        *("AnswersPendingError", "BudgetReachedError", "LockedError", "ServiceError"),
    }


def test_the_background_loop_is_one_for_all_threads() -> None:
    async def where() -> Any:
        return asyncio.get_running_loop(), threading.current_thread()

    found = [aio.run(where())]
    threads = [threading.Thread(target=lambda: found.append(aio.run(where()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(loop) for loop, _ in found}) == 1
    assert found[0][1] is not threading.current_thread()


def test_an_error_in_the_background_is_raised_here() -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        aio.run(fail())
