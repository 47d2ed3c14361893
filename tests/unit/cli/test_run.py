"""The main job as a user sees it: what it says, what it exits with, and what it leaves behind."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from featurekit_spark.sinks import DeltaSink

SIMILAR = "logic_builders=[featurekit_spark.apps.product_recs:SimilarProducts]"
BOTH = (
    "logic_builders=[featurekit_spark.apps.product_recs:LLMLogic, "
    "featurekit_spark.apps.product_recs:SimilarProducts]"
)

Workplace = Any
TWICE = [("p1", "lamp"), ("p1", "desk lamp")]


def test_cold_then_again(workplace: Workplace) -> None:
    cold = workplace.run()
    assert (cold.code, cold.err) == (0, "")
    assert cold.out.count("\n") == 1
    summary = cold.summary
    assert set(summary) >= {
        *("status", "run_id", "merchant", "market", "products", "wall_seconds", "builders", "sinks")
    }
    assert (summary["status"], summary["merchant"], summary["market"]) == ("ok", "abt", "US")
    assert summary["products"] == 6 and summary["wall_seconds"] > 0
    assert set(summary["builders"]["LLMLogic"]) >= {
        *("hit", "computed", "error", "calls", "tokens", "usd", "seconds")
    }
    assert cold.calls == 6 and summary["builders"]["LLMCompletion"]["tokens"] > 0
    assert summary["sinks"]["delta"]["status"] == "published"
    assert summary["sinks"]["delta"]["rows"] == 6
    recs, version = workplace.recs(), workplace.version()
    assert all(found and product not in found for product, found in recs.items())

    again = workplace.run()
    assert again.code == 0 and again.computed == 0 and again.calls == 0
    assert again.summary["builders"]["LLMLogic"]["hit"] == 6
    assert again.summary["unchanged"] and again.summary["sinks"]["delta"]["status"] == "unchanged"
    assert (workplace.recs(), workplace.version()) == (recs, version)


def test_text_is_for_people(workplace: Workplace) -> None:
    ran = workplace.run(output="text")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("abt US: 6 products, ok in ")
    assert "sink delta: published, 6 rows" in ran.out
    assert "nothing had changed" in workplace.run(output="text").out


def test_one_product_more_computes_little(workplace: Workplace) -> None:
    workplace.run()
    workplace.catalog([*_titles(workplace).items(), ("p7", "floor lamp")])
    ran = workplace.run()
    assert ran.calls == 1
    assert set(workplace.recs()) == {"p1", "p2", "p3", "p4", "p5", "p6", "p7"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--frobnicate"], 2, "No such option"),
        (["surplus"], 2, "unexpected extra argument"),
        (["--run-date", "2026-02-30"], 2, "'2026-02-30' is no date: write it like 2026-01-31"),
        (["--output", "xml"], 2, "'xml'"),
        (["--run-id", "a/b"], 2, "run id 'a/b' cannot be used"),
        (["--set", "search.top_k"], 2, "write --set key.path=value"),
        (["--set", "serch.top_k=3"], 3, "--set serch.top_k: serch: unknown key"),
        (["--set", "search.top_k=ten"], 3, "--set search.top_k: Input should be"),
        (["--engine", "flink"], 2, "not one of 'spark', 'local'"),
        (["--conf-file", "nowhere.yaml"], 3, "nowhere.yaml: this configuration file does not exist"),
        (["--set", "product_db.path=nowhere"], 3, "'nowhere': there is no such folder"),
        (["--set", "product_db.path=null"], 3, "--set product_db.path=PATH"),
        (["--set", "logic_builders=[nowhere:X]"], 3, "logic_builders: 'nowhere:X' names no builder"),
        (["--set", "logic_builders=[json:JSONDecoder]"], 3, "not a FeatureBuilder class"),
        (
            ["--set", "logic_builders=[featurekit_spark.apps.product_recs:LLMProductPrompt]"],
            3,
            "LLMProductPrompt is no logic builder: its value must be",
        ),
        (
            ["--set", "logic_builders=[featurekit_spark.apps.product_recs:ProductEmbeddingDB]"],
            3,
            "ProductEmbeddingDB is no logic builder over ProductIds: its key must be",
        ),
        (
            ["--set", "logic_keys=featurekit_spark.apps.product_recs:LLMLogic"],
            3,
            "logic_keys: 'featurekit_spark.apps.product_recs:LLMLogic' is no KeySet class",
        ),
        (["--set", "product_db.title_attribute=name"], 4, "'name'"),
        (["--set", "llm={provider: openai, model: m}"], 3, "OPENAI_API_KEY is not set"),
        (["--set", "sinks=[{kind: redis, url: 'redis://127.0.0.1:1/0', timeout_s: 0.2}]"], 75, "127.0.0.1:1"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    workplace: Workplace, options: list[str], code: int, said: str
) -> None:
    ran = workplace.run(*options)
    plain = " ".join(ran.err.replace("│", " ").split())  # the usage box breaks lines
    assert ran.code == code and said in plain and "Traceback" not in ran.err
    if ran.out:
        assert ran.summary["status"] == "failed" and ran.summary["exit_code"] == code
        assert said.split(":")[-1] in ran.summary["error"]
    assert not (workplace.warehouse / "recommendations").exists()


@pytest.mark.parametrize("name", ["../abt", ".abt", "a b", "", "x" * 65, "abt\n", "caf\u00e9"])
def test_names_that_cannot_be_used_are_usage_errors(workplace: Workplace, name: str) -> None:
    for given in ({"merchant": name}, {"market": name}):
        ran = workplace.run(**given)
        assert ran.code == 2 and "cannot be used" in ran.err and "Traceback" not in ran.err
    assert not workplace.warehouse.exists()


def test_a_catalog_that_is_not_there(workplace: Workplace) -> None:
    ran = workplace.run(merchant="abbt")
    assert ran.code == 3
    assert "no abbt_US.csv or abbt_US.parquet" in ran.err and "abt_US" in ran.err
    assert ran.summary["builders"] == {} and ran.summary["products"] is None


def test_settings_say_where_they_came_from(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "conf.yaml"
    conf.write_text("embedder: {dim: many}\n")
    monkeypatch.setenv("FEATUREKIT__SEARCH__TOP_K", "0")
    ran = workplace.run("--conf-file", str(conf), "--set", "llm.modell=m")
    assert ran.code == 3
    assert f"{conf}: embedder.dim: " in ran.err
    assert "environment FEATUREKIT__SEARCH__TOP_K: search.top_k: " in ran.err
    assert "--set llm.modell: unknown key" in ran.err


def test_settings_reach_the_builders(workplace: Workplace) -> None:
    workplace.run()
    ran = workplace.run("--set", "search.top_k=2", "--set", "prompt_template='like {title}'")
    assert ran.calls == 6
    assert {len(recs) for recs in workplace.recs().values()} == {2}


def test_a_market_called_no(workplace: Workplace) -> None:
    workplace.catalog({"p1": "rød lampe", "p2": "blå lampe"}, market="NO")
    ran = workplace.run("--set", "product_db.dimensions={NO: {locale: nb-NO}}", market="NO")
    assert (ran.code, ran.summary["market"]) == (0, "NO")
    assert [row["market"] for row in workplace.published()] == ["NO", "NO"]


def test_equal_prompts_are_paid_once_across_merchants_and_markets(workplace: Workplace) -> None:
    workplace.run()
    workplace.catalog(_titles(workplace), merchant="buy", market="DE")
    ran = workplace.run(merchant="buy", market="DE")
    assert (ran.code, ran.calls, ran.summary["builders"]["LLMCompletion"]["hit"]) == (0, 0, 6)
    assert len(workplace.published()) == 12


def test_a_market_picks_its_titles(workplace: Workplace) -> None:
    rows = [("p1", "lamp", "Lampe"), ("p2", "cup", "Tasse"), ("p3", "Lampe", "")]
    workplace.catalog(rows, columns=("product_id", "title", "title[locale=de_DE]"), market="DE")
    ran = workplace.run(
        *("--set", "product_db.dimensions={DE: {locale: de_DE}}", "--set", "search.top_k=1"), market="DE"
    )
    assert ran.calls == 2  # "Lampe" twice
    assert workplace.recs()["p1"] == ["p3"]


def test_the_shipped_configuration_and_a_merchant_of_its_own(workplace: Workplace) -> None:
    workplace.catalog({"p1": "lamp", "p2": "desk lamp"}, columns=("product_id", "name"), merchant="example")
    conf = Path(__file__).parents[3] / "conf" / "dev.yaml"
    ran = workplace.run("--conf-file", str(conf), merchant="example")
    assert (ran.code, ran.err) == (0, "")
    assert workplace.recs() == {"p1": ["p2"], "p2": ["p1"]}
    workplace.catalog([*TWICE], merchant="other")
    assert workplace.run("--conf-file", str(conf), merchant="other").code == 4


def test_an_interrupted_run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(DeltaSink, "publish", interrupt)
        ran = workplace.run()
    assert ran.code == 130 and "interrupted: what was computed is kept" in ran.err
    assert workplace.run().computed == 0


def test_run_date_and_run_id(workplace: Workplace) -> None:
    ran = workplace.run("--run-date", "2026-01-31", "--run-id", "nightly-7")
    assert ran.summary["run_id"] == "nightly-7"
    rows = workplace.published()
    assert {row["run_id"] for row in rows} == {"nightly-7"}
    assert {row["ts"].astimezone(UTC) for row in rows} == {datetime(2026, 1, 31, 12, tzinfo=UTC)}


def test_a_second_logic_builder_brings_scores(workplace: Workplace) -> None:
    ran = workplace.run("--set", BOTH)
    assert ran.summary["sinks"]["delta"]["rows"] == 12
    by_builder: dict[str, list[Any]] = {}
    for row in workplace.published():
        by_builder.setdefault(row["logic_builder"], []).append(row)
    assert set(by_builder) == {"LLMLogic", "SimilarProducts"}
    assert all(row["scores"] is None for row in by_builder["LLMLogic"])
    for row in by_builder["SimilarProducts"]:
        assert len(row["scores"]) == len(row["recs"]) == 5
        assert row["scores"] == sorted(row["scores"], reverse=True)


def test_without_a_model_no_call_is_made(workplace: Workplace) -> None:
    ran = workplace.run("--set", SIMILAR)
    assert ran.code == 0 and "LLMCompletion" not in ran.summary["builders"]


def test_sinks_of_one_kind_have_names_of_their_own(workplace: Workplace, tmp_path: Path) -> None:
    sinks = f"sinks=[{{kind: delta}}, {{kind: delta, path: {tmp_path}/second}}]"
    ran = workplace.run("--set", sinks)
    assert {name: sink["status"] for name, sink in ran.summary["sinks"].items()} == {
        "delta": "published",
        "delta-2": "published",
    }
    assert DeltaTable(f"{tmp_path}/second").version() == 1
    assert workplace.run("--set", sinks).summary["sinks"]["delta-2"]["status"] == "unchanged"


def test_no_sinks(workplace: Workplace) -> None:
    ran = workplace.run("--set", "sinks=[]")
    assert (ran.code, ran.summary["sinks"]) == (0, {})


def test_the_empty_table_is_typed(workplace: Workplace) -> None:
    workplace.catalog({})
    ran = workplace.run("--set", BOTH)
    assert (ran.code, ran.summary["status"], ran.summary["products"]) == (0, "ok", 0)
    assert workplace.published() == []
    types = {field.name: str(field.type) for field in _schema(workplace)}
    assert types["recs"].startswith("list<") and "string" in types["recs"]
    assert set(types) == {
        *("merchant", "market", "product_id", "logic_builder", "recs", "scores", "ts", "run_id")
    }
    assert workplace.run("--set", BOTH).code == 0


def _schema(workplace: Workplace) -> pa.Schema:
    return pa.schema(DeltaTable(str(workplace.warehouse / "recommendations")).schema().to_arrow())


def _titles(workplace: Workplace) -> dict[str, str]:
    lines = (workplace.catalogs / "abt_US.csv").read_text().splitlines()[1:]
    return dict(line.split(",") for line in lines)


def test_a_budget_stops_a_run_and_the_next_one_goes_on(workplace: Workplace) -> None:
    stopped = workplace.run("--max-calls", "2")
    summary = stopped.summary
    assert (stopped.code, summary["status"], summary["exit_code"], stopped.calls) == (75, "stopped", 75, 2)
    assert stopped.err.startswith("stopped: the run stopped at its budget, max_calls=2, after 2 calls")
    assert not workplace.warehouse.joinpath("recommendations").exists()
    assert workplace.run("--set", "run.max_calls=3", output="text").out == ""
    done = workplace.run("--max-calls", "1", "--max-usd", "0.00001")
    assert (done.code, done.calls) == (0, 1)  # the stand-in is free
