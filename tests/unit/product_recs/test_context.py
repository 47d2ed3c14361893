from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import cloudpickle
import pytest

from featurekit_spark import Context, FixedClock
from featurekit_spark.context import utc_now
from featurekit_spark.errors import ContextError
from featurekit_spark.testing.fakes import ProductDBFake


@dataclass(frozen=True)
class ShopContext(Context):
    currency: str = "EUR"


def test_everything_has_a_default() -> None:
    context = Context()
    assert context.product_db is None and context.merchant_config == {}
    assert "offline" in context.llm.identity and context.embedder.dim == 384
    assert abs(context.clock() - datetime.now(UTC)) < timedelta(seconds=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.llm = None  # type: ignore[misc, assignment]


def test_it_travels() -> None:
    instant = datetime(2026, 1, 31, tzinfo=UTC)
    context = ShopContext(
        product_db=ProductDBFake({"a": {"title": "Lamp"}}),
        merchant_config={"top_k": 3},
        clock=FixedClock(instant),
        currency="SEK",
    )
    for dump in (pickle.dumps(context), cloudpickle.dumps(context)):
        again = pickle.loads(dump)
        assert (again.currency, again.clock(), again.merchant_config) == ("SEK", instant, {"top_k": 3})
        assert again.embedder.identity == context.embedder.identity
        assert again.matrices.path == context.matrices.path
    assert pickle.loads(pickle.dumps(Context())).clock is utc_now


def test_a_clock_needs_a_zone() -> None:
    with pytest.raises(ContextError, match="no time zone"):
        FixedClock(datetime(2026, 1, 31))
