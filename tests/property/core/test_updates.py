"""Values that follow from earlier ones equal those built anew, over any sequence of catalogs."""

from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.session import Session
from featurekit_spark.testing.fakes import MovingClock
from tests import shop

TITLES = st.text("aeiou bcd", min_size=1, max_size=12)
CATALOGS = st.dictionaries(st.sampled_from([f"p{i}" for i in range(9)]), TITLES, min_size=1)
# Most products stay as they are from one catalog to the next.
EDITS = st.lists(
    st.dictionaries(st.sampled_from([f"p{i}" for i in range(9)]), st.none() | TITLES, max_size=2),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(catalog=CATALOGS, edits=EDITS)
def test_equal_to_a_run_on_an_empty_cache(
    catalog: dict[str, str], edits: list[dict[str, str | None]]
) -> None:
    world, clock = shop.World(), MovingClock()
    kept = Session(shop.ShopContext(world, clock), MemoryCache(), engine="local")
    updated = 0
    for edit in [{}, *edits]:
        catalog = {name: title for name, title in {**catalog, **edit}.items() if title is not None}
        world.products = {("abt", "US", name): shop.Product(title) for name, title in catalog.items()}
        found = kept.run(shop.Logic.over(shop.ProductIds), merchant="abt", market="US")
        fresh = Session(shop.ShopContext(world, clock), MemoryCache(), engine="local")
        anew = fresh.run(shop.Logic.over(shop.ProductIds), merchant="abt", market="US")
        assert found.values(shop.Logic) == anew.values(shop.Logic)
        assert not anew.builders["Search"].updated
        updated += found.builders["Search"].updated
    event(f"updated: {min(updated, 5)}")
