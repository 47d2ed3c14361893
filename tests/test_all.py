"""Everything together: the product recommendation app with its outside world faked, and the main job on real
catalogs.

    python tests/test_all.py

prints product title -> recommended titles, after checking that `LLMLogic` gives the same answers per key
in-process and on Spark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from featurekit_spark import Context, DeltaCache, Limits, Session
from featurekit_spark.apps.product_recs import LLMLogic, ProductIds
from featurekit_spark.cli import run_logic_main
from featurekit_spark.testing.fakes import CountingLLM, InteractionDBFake, MovingClock, ProductDBFake
from featurekit_spark.testing.parity import assert_parity
from featurekit_spark.testing.spark import spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MERCHANT, MARKET = "shop", "DE"
TITLES: Mapping[str, Any] = {
    "desk-1": "Adjustable Desk Lamp, White",
    "desk-2": "Adjustable Desk Lamp, Black",
    "floor": {(): "Floor Lamp", (("locale", "de_DE"),): "Stehlampe"},
    "bulb-e27": "Light Bulb E27, Warm White",
    "bulb-e14": "Light Bulb E14, Warm White",
    "cafe\u0301": "Espresso Machine with Milk Frother",
    "caf\u00e9": "Espresso Cups, Set of 6",
    "grinder": "Coffee Grinder",
    "untitled": "   ",
}
ANSWERS = {
    "get recommendations for Adjustable Desk Lamp, White": "1. Light Bulb E14\n2. Stehlampe",
    "get recommendations for Adjustable Desk Lamp, Black": "- Light Bulb E27\n- Desk Lamp White",
    "get recommendations for Stehlampe": '["Light Bulb E27, Warm White", "Desk Lamp"]',
    "get recommendations for Espresso Machine with Milk Frother": "1. Coffee Grinder\n2. Espresso Cups",
    "get recommendations for Coffee Grinder": "I have no suggestions.",
}
KEYS = [(MERCHANT, MARKET, product) for product in sorted(TITLES)]


def faked_context(llm: CountingLLM) -> Context:
    """The app's interfaces, all faked; a prompt without an answer is answered with itself."""
    return Context(
        product_db=ProductDBFake({product: {"title": title} for product, title in TITLES.items()}),
        interaction_data_db=InteractionDBFake(),
        merchant_config={"top_k": 3, "dimensions": {"locale": "de_DE"}},
        llm=llm,
        clock=MovingClock(),
    )


def recommendations(spark: SparkSession, folder: Path) -> dict[str, list[str]]:
    """Recommended ids by product, computed per key in-process and for all keys on Spark; they are equal."""
    llm = CountingLLM(ANSWERS, log=folder / "calls")
    context = faked_context(llm)
    values = assert_parity(LLMLogic.over(ProductIds), context, spark=spark, merchant=MERCHANT, market=MARKET)

    # Once more with a cache that is kept: what Spark computed is what the controller then finds.
    cache = DeltaCache(str(folder / "cache"))
    session = Session(context, cache, spark=spark, limits=Limits(in_process_keys=0, partitions=2))
    run = session.run(LLMLogic.over(ProductIds), merchant=MERCHANT, market=MARKET)
    assert run.status == "ok" and run.values(LLMLogic) == values
    before = sum(llm.calls.values())
    features = [session.get(LLMLogic, key) for key in KEYS]
    assert [feature.value for feature in features] == [values[key] for key in KEYS]
    assert all(feature.origin == "hit" and feature.ts == run.ts for feature in features if feature.value)
    assert cache(LLMLogic).get(key=KEYS[0], context=context, cache=cache) == values[KEYS[0]]

    again = session.run(LLMLogic.over(ProductIds), merchant=MERCHANT, market=MARKET)
    assert again.unchanged and sum(counts.computed for counts in again.builders.values()) == 0
    assert sum(llm.calls.values()) == before
    return {product: values[MERCHANT, MARKET, product] or [] for product in sorted(TITLES)}


@pytest.mark.spark
def test_recommendations_per_key_and_on_spark(spark: SparkSession, tmp_path: Path) -> None:
    found = recommendations(spark, tmp_path)
    assert found["untitled"] == []
    assert found["desk-1"][:2] == ["floor", "bulb-e14"]
    assert found["cafe\u0301"][:2] == ["grinder", "caf\u00e9"]
    for product, recs in found.items():
        assert product not in recs and "untitled" not in recs and len(recs) == len(set(recs)) <= 3


CATALOGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "catalogs"


@pytest.mark.slow
@pytest.mark.skipif(not CATALOGS.is_dir(), reason="the real catalogs, ../shared/data/catalogs, are not here")
@pytest.mark.parametrize(
    ("merchant", "products"), [("abt", 1_076), ("buy", 1_076), ("amazon", 1_354), ("google", 3_039)]
)
def test_a_real_catalog_cold_and_again(
    merchant: str, products: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> dict[str, Any]:
        code = run_logic_main(
            [
                *("--merchant", merchant, "--market", "US", "--engine", "local", "--output", "json"),
                *("--set", f"product_db.path={CATALOGS}", "--set", f"warehouse={tmp_path}"),
            ]
        )
        out, err = capfd.readouterr()
        assert (code, err) == (0, "")
        summary: dict[str, Any] = json.loads(out)
        return summary

    cold = run()
    assert cold["products"] == cold["sinks"]["delta"]["rows"] == products
    assert cold["quality"]["without_recommendations"] == cold["quality"]["missing_title"]
    again = run()
    assert sum(counts["computed"] for counts in again["builders"].values()) == 0
    assert again["unchanged"] and again["sinks"]["delta"]["status"] == "unchanged"


def main() -> None:
    """Print the recommendations by title."""
    import tempfile

    with spark_session("local[2]") as spark, tempfile.TemporaryDirectory() as folder:
        found = recommendations(spark, Path(folder))
    shown = {
        product: title if isinstance(title, str) else title[(("locale", "de_DE"),)]
        for product, title in TITLES.items()
    }
    for product, recs in found.items():
        print(f"{shown[product].strip() or f'({product}, without a title)'} -> ", end="")
        print("; ".join(shown[rec] for rec in recs) or "nothing")


if __name__ == "__main__":
    main()
