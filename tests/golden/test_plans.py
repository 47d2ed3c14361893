"""Plans as text. A change shows as a diff of the text files beside this one.

`python -m tests.golden.test_plans` writes them anew.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.apps.product_recs import LLMLogic, ProductIds, SimilarProducts
from featurekit_spark.builder import Dep, FeatureBuilder
from featurekit_spark.errors import DefinitionError, UsageError
from featurekit_spark.graph import Graph
from featurekit_spark.plan import PlanState, build_plan
from tests import shop

HERE = Path(__file__).parent


class Plain(FeatureBuilder[str]):
    """One source and nothing else."""

    key, deps, value = shop.PRODUCT, (shop.Title,), pa.string()

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return str(inputs["Title"])


PLANS: dict[str, tuple[tuple[Dep, ...], PlanState]] = {
    "plain": ((Plain.over(shop.ProductIds),), PlanState("local")),
    "values_and_group_sources": ((shop.Label.over(shop.ProductIds),), PlanState("spark", 100)),
    "fan_out_and_gather": ((shop.Logic.over(shop.ProductIds),), PlanState("spark", 2_000)),
    "two_key_sets": ((shop.Card.over(shop.ProductIds),), PlanState("local")),
    "by_hand": ((shop.ByHand.over(shop.Featured),), PlanState("local")),
    "several_targets": (
        tuple(target.over(shop.ProductIds) for target in (shop.Logic, shop.Card, shop.Label)),
        PlanState("local"),
    ),
    "product_recs": (
        (LLMLogic.over(ProductIds), SimilarProducts.over(ProductIds)),
        PlanState("spark", 2_000),
    ),
}


def explained(name: str) -> str:
    targets, state = PLANS[name]
    return build_plan(_graph(targets), targets, state).explain() + "\n"


def _graph(targets: tuple[Dep, ...]) -> Graph:
    return Graph([*(t.builder for t in targets), *(t.keyset for t in targets if t.keyset is not None)])


@pytest.mark.parametrize("name", sorted(PLANS))
def test_plan(name: str) -> None:
    assert explained(name) == (HERE / f"{name}.txt").read_text()


def test_every_golden_text_has_its_plan() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == set(PLANS)


def test_a_plan_does_not_depend_on_the_order_of_deps() -> None:
    """The same stages, whichever dep was written first."""

    def shuffled(seed: int) -> str:
        deps = [shop.Title, shop.Price, shop.Shelf, shop.ByHand, shop.Loud]
        random.Random(seed).shuffle(deps)
        card = type("Card", (FeatureBuilder,), {**vars(shop.Card), "deps": tuple(deps)})
        targets = (card.over(shop.ProductIds),)
        return build_plan(_graph(targets), targets, PlanState()).explain()

    assert len({shuffled(seed) for seed in range(10)}) == 1


def test_a_target_says_where_its_keys_come_from() -> None:
    with pytest.raises(DefinitionError, match=r"where its keys come from: Plain.over\(SomeKeySet\)"):
        build_plan(Graph([Plain]), [Dep(Plain)], PlanState())


def test_a_target_has_one_key_set_in_a_run() -> None:
    """What a run proves and answers is kept by the target's name: of two key sets one would be lost."""
    targets = (
        shop.Title.over(shop.ProductIds),
        shop.Price.over(shop.ProductIds),
        shop.Title.over(shop.Featured),
    )
    with pytest.raises(UsageError) as error:
        build_plan(_graph(targets), targets, PlanState())
    assert str(error.value) == (
        "Title.over(ProductIds) and Title.over(Featured) are targets of one run, which keeps answers and proofs by "
        "the target's name, so that one key set's would be lost; run them as two runs"
    )
    build_plan(_graph(targets[:2]), [*targets[:2], targets[0]], PlanState())


if __name__ == "__main__":
    for plan in PLANS:
        (HERE / f"{plan}.txt").write_text(explained(plan))
