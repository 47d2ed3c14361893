"""An estimate says of every builder whose keys it knows exactly what the run after it does, and never too few calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.session import Limits, Session
from featurekit_spark.unchanged import Unchanged
from tests import shop
from tests.property.core.test_histories import CATALOGS, SOME_EDITS, TARGETS, Histories


@pytest.fixture(autouse=True, scope="module", params=[True, False])
def _light(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where prompts are light, what is paid for is known; else it is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shop.Prompt, "light", request.param)
        yield


@settings(max_examples=60, deadline=None)
@given(CATALOGS, st.lists(st.tuples(SOME_EDITS, TARGETS), max_size=5))
def test_an_estimate_is_what_the_run_does(products: Any, steps: Any) -> None:
    shopkeeper = Histories()
    shopkeeper.start(products, None)
    cache = MemoryCache()
    session = Session(shopkeeper.context, cache, engine="local", limits=Limits(batch_rows=2))
    for edits, targets in steps:
        shopkeeper.edit(edits)
        wanted = [target.over(shop.ProductIds) for target in targets]
        built = shopkeeper.world.built.copy()
        said = session.estimate(*wanted, merchant="abt", market="US")
        assert shopkeeper.world.built == built
        did = session.run(*wanted, merchant="abt", market="US")
        for builder in said.builders:
            counts = did.builders[builder.name]
            to_build = builder.stale + builder.miss + builder.error
            if isinstance(did.execution, Unchanged):  # which looked at no key
                assert to_build == builder.calls == 0, builder
                continue
            if builder.estimated:
                assert counts.calls <= builder.calls, builder  # never told too few
                continue
            assert (builder.hit, builder.empty, to_build) == (
                counts.hit,
                counts.empty,
                counts.computed + counts.error,
            ), builder
            assert builder.calls == counts.calls, builder
        assert said.keys == did.keys
