"""What bad input does to the main job, and that nothing in the cache or the sinks is lost by it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.errors import ServiceError
from featurekit_spark.locks import file_lock
from featurekit_spark.sinks import DeltaSink

Workplace = Any
Module = Callable[[str, str], str]

LOGIC = """
    import pyarrow as pa
    from pathlib import Path
    from featurekit_spark import FeatureBuilder
    from featurekit_spark.apps.product_recs import ProductEmbeddingString

    class Own(FeatureBuilder):
        key = ("merchant", "market", "product_id")
        deps = (ProductEmbeddingString,)
        value = pa.list_(pa.string())

        def build_one(self, inputs, config, context):
            if (Path(__file__).parent / f"break-{inputs['product_id']}").exists():
                %s
            return [inputs["product_id"] + "'s friend"]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Writes a user's own module; the answer is the `--set` that makes its class `Own` the logic builder."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(dedent(code))
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
        return f"logic_builders=[{name}:Own]"

    return write


def test_a_builder_that_raises_for_one_key(workplace: Workplace, module: Module, tmp_path: Path) -> None:
    own = module("raises", LOGIC % 'raise ValueError("no friends")')
    assert workplace.run("--set", own).code == 0
    before = workplace.recs()
    workplace.catalog({"p1": "changed", "p2": "changed too", "p3": "green desk lamp"})
    (tmp_path / "break-p1").touch()

    ran = workplace.run("--set", own)
    assert (ran.code, ran.summary["status"]) == (5, "partial")
    assert ran.summary["builders"]["Own"]["error"] == 1
    assert 'failed: ["abt","US","p1"]: Own["abt","US","p1"]: ValueError: no friends' in ran.err
    assert ran.summary["quality"]["kept"] == 1
    assert workplace.recs() == {product: before[product] for product in ("p1", "p2", "p3")}
    history = DeltaCache(f"{workplace.warehouse}/cache").history("Own").to_pylist()
    assert [row["key"] for row in history if row["status"] == "error"] == ['["abt","US","p1"]']

    (tmp_path / "break-p1").unlink()
    ran = workplace.run("--set", own)
    assert (ran.code, ran.summary["builders"]["Own"]["computed"]) == (0, 1)


def test_a_failed_key_without_an_earlier_answer_has_no_recommendations(
    workplace: Workplace, module: Module, tmp_path: Path
) -> None:
    own = module("raises_at_once", LOGIC % 'raise ValueError("no friends")')
    (tmp_path / "break-p2").touch()
    ran = workplace.run("--set", own)
    assert (ran.code, ran.summary["quality"]["without_recommendations"]) == (5, 1)
    assert workplace.recs()["p2"] == [] and workplace.recs()["p1"] == ["p1's friend"]


def test_many_failed_keys_are_told_briefly(workplace: Workplace, module: Module, tmp_path: Path) -> None:
    own = module("raises_often", LOGIC % 'raise ValueError("no friends")')
    for number in range(1, 7):
        (tmp_path / f"break-p{number}").touch()
    ran = workplace.run("--set", own)
    assert ran.code == 5
    assert ran.err.count("failed: ") == 6 and "failed: 1 more keys" in ran.err


def test_a_value_that_does_not_fit(workplace: Workplace, module: Module, tmp_path: Path) -> None:
    own = module("misfit", LOGIC % "return [7]")
    (tmp_path / "break-p3").touch()
    ran = workplace.run("--set", own)
    assert ran.code == 5
    assert 'Own["abt","US","p3"]' in ran.err and "list<" in ran.err
    assert len(workplace.recs()) == 6


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Own(FeatureBuilder): key = ('product_id',)", "declare the value's type"),
        ("from nowhere import Own", "names no builder (No module named 'nowhere')"),
        (
            """
            class Own(FeatureBuilder):
                key, value = ("merchant", "market", "product_id"), pa.list_(pa.string())
                def build_one(self, inputs, config, context): return []
            Own.deps = (Own,)
            """,
            "Own -> Own",
        ),
        (
            """
            class Own(FeatureBuilder):
                key, value = ("merchant", "market", "product_id"), pa.list_(pa.string())
                deps = ("Title",)
                def build_one(self, inputs, config, context): return []
            """,
            "'Title' is no feature",
        ),
        (
            """
            class Own(FeatureBuilder):
                key, value = ("merchant", "market", "product_id"), pa.list_(pa.string())
                def build_one(self, inputs, config, context): return context.weather
            """,
            "reads context.weather, which it does not declare",
        ),
    ],
)
def test_a_builder_that_is_declared_wrongly(
    workplace: Workplace, module: Module, code: str, said: str, request: pytest.FixtureRequest
) -> None:
    name = f"wrong_{abs(hash(said))}"
    text = "import pyarrow as pa\nfrom featurekit_spark import FeatureBuilder\n" + dedent(code)
    ran = workplace.run("--set", module(name, text))
    assert ran.code == 3 and said in ran.err and "Traceback" not in ran.err


def test_a_missing_column(workplace: Workplace) -> None:
    workplace.catalog({"p1": "lamp"}, columns=("product_id", "name"))
    ran = workplace.run()
    assert ran.code == 4 and "'title'" in ran.err and "abt_US.csv" in ran.err
    workplace.catalog({"p1": "lamp"}, columns=("id", "title"))
    ran = workplace.run()
    assert ran.code == 4 and "'product_id'" in ran.err


def test_a_catalog_that_needs_no_titles(workplace: Workplace, module: Module) -> None:
    workplace.catalog({"p1": "lamp"}, columns=("product_id", "name"))
    own = module(
        "titleless",
        """
        import pyarrow as pa
        from featurekit_spark import FeatureBuilder

        class Own(FeatureBuilder):
            key, value = ("merchant", "market", "product_id"), pa.list_(pa.string())
            def build_one(self, inputs, config, context): return ["p2"]
        """,
    )
    ran = workplace.run("--set", own)
    assert ran.code == 0 and ran.summary["quality"]["products"] == 1
    assert workplace.recs() == {"p1": ["p2"]}


def test_duplicates_are_refused_or_counted(workplace: Workplace) -> None:
    workplace.run()
    before, version = workplace.recs(), workplace.version()
    workplace.catalog([("p1", "old"), ("p2", "lamp"), ("p1", "new lamp"), ("p3", "desk"), ("p4", "cup")])
    ran = workplace.run()
    assert ran.code == 4 and "'p1'" in ran.err and "keep_last" in ran.err
    assert (workplace.recs(), workplace.version()) == (before, version)
    ran = workplace.run("--set", "product_db.duplicates=keep_last")
    assert ran.code == 0
    assert (ran.summary["products"], ran.summary["quality"]["duplicates_dropped"]) == (4, 1)


def test_products_without_a_title(workplace: Workplace) -> None:
    workplace.catalog({"p1": "red lamp", "p2": "", "p3": " \t", "p4": "blue lamp"})
    ran = workplace.run()
    assert (ran.code, ran.calls, ran.summary["products"]) == (0, 2, 4)
    assert ran.summary["quality"]["missing_title"] == 2
    assert ran.summary["quality"]["without_recommendations"] == 2
    assert workplace.recs() == {"p1": ["p4"], "p2": [], "p3": [], "p4": ["p1"]}
    again = workplace.run()
    assert again.summary["unchanged"] and again.computed == 0
    assert again.summary["quality"] == ran.summary["quality"]


def test_only_empty_titles(workplace: Workplace) -> None:
    workplace.catalog({"p1": "", "p2": ""})
    ran = workplace.run()
    assert (ran.code, ran.calls) == (0, 0)
    assert workplace.recs() == {"p1": [], "p2": []}


def test_product_ids_are_never_merged(workplace: Workplace) -> None:
    ids = [
        "caf\u00e9",
        "cafe\u0301",
        "\U0001f600",
        'a"b',
        "a'b",
        "a\nb",
        "a,b",
        "a\\b",
        "A",
        "a",
        " a",
        "%61",
    ]
    workplace.catalog([(product, f"lamp number {i}") for i, product in enumerate(ids)])
    ran = workplace.run()
    assert (ran.code, ran.summary["products"]) == (0, len(ids))
    recs = workplace.recs()
    assert set(recs) == set(ids)
    assert all(set(found) <= set(ids) - {product} and len(found) == 10 for product, found in recs.items())
    assert workplace.run().computed == 0


def test_a_result_that_shrank_is_not_published(workplace: Workplace) -> None:
    workplace.run("--run-id", "whole")
    before, version = workplace.recs(), workplace.version()
    workplace.catalog({"p1": "red table lamp", "p2": "blue table lamp"})
    ran = workplace.run()
    assert ran.code == 4 and "2 rows now, 6 published by run 'whole'" in ran.err
    assert ran.summary["products"] == 2 and ran.summary["builders"]["LLMLogic"]["computed"] == 2
    assert (workplace.recs(), workplace.version()) == (before, version)

    ran = workplace.run("--set", "publish_gate.max_row_drop=null")
    assert (ran.code, ran.computed) == (0, 0)
    assert workplace.recs() == {"p1": ["p2"], "p2": ["p1"]}

    workplace.catalog({})
    ran = workplace.run()
    assert ran.code == 4 and "0 rows now, 2 published" in ran.err


def test_a_fall_in_coverage_is_not_published(workplace: Workplace) -> None:
    workplace.run()
    version = workplace.version()
    workplace.catalog({"p1": "lamp", "p2": "", "p3": "", "p4": "", "p5": "", "p6": "desk"})
    ran = workplace.run()
    assert ran.code == 4 and "max_coverage_drop=null" in ran.err
    assert workplace.version() == version


def test_no_sink_is_written_to_where_the_gate_of_one_trips(workplace: Workplace, tmp_path: Path) -> None:
    sinks = f"sinks=[{{kind: delta, path: {tmp_path}/new}}, {{kind: delta}}]"
    workplace.run()
    workplace.catalog({"p1": "red table lamp", "p2": "blue table lamp"})
    assert workplace.run("--set", sinks).code == 4
    assert not (tmp_path / "new").exists()


def test_a_crash_before_publishing_computes_nothing_twice(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DeltaSink, publication: object) -> None:
        raise ServiceError("the disk is gone.")

    with monkeypatch.context() as broken:
        broken.setattr(DeltaSink, "publish", fail)
        ran = workplace.run()
    assert (ran.code, ran.calls) == (75, 6) and "error: the disk is gone." in ran.err
    ran = workplace.run()
    assert (ran.code, ran.computed) == (0, 0)
    assert ran.summary["sinks"]["delta"]["status"] == "published"
    assert len(workplace.recs()) == 6


def test_a_bug_shows_where_it_is(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DeltaSink, publication: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(DeltaSink, "publish", fail)
    ran = workplace.run()
    assert ran.code == 1 and "Traceback" in ran.err
    assert ran.summary["error"] == "ZeroDivisionError: oops"


def test_a_deleted_table_is_published_again_from_the_cache(workplace: Workplace) -> None:
    workplace.run()
    before = workplace.recs()
    shutil.rmtree(workplace.warehouse / "recommendations")
    ran = workplace.run()
    assert (ran.code, ran.computed, ran.summary["unchanged"]) == (0, 0, True)
    assert workplace.recs() == before


def test_a_deleted_cache_is_made_again(workplace: Workplace) -> None:
    workplace.run()
    before = workplace.recs()
    shutil.rmtree(workplace.warehouse / "cache")
    assert workplace.run().calls == 6
    assert workplace.recs() == before


def test_one_run_at_a_time(workplace: Workplace) -> None:
    lock = workplace.warehouse / "locks" / "abt" / "US.lock"
    with file_lock(lock, timeout_s=0, owner="abt in US"):
        ran = workplace.run()
        assert ran.code == 75 and "locked by process" in ran.err and "(abt in US) since 20" in ran.err
        workplace.catalog({"p1": "lampe"}, market="DE")
        assert workplace.run(market="DE").code == 0
    assert workplace.run().code == 0
