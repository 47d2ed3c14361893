from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from featurekit_spark import Context, Controller, MemoryCache
from featurekit_spark.apps.product_recs import (
    LLMLogic,
    LLMProductPrompt,
    LLMSuggestions,
    ProductEmbeddingDB,
    ProductEmbeddingSearcher,
    ProductEmbeddingString,
    ProductIds,
    SimilarProducts,
)
from featurekit_spark.apps.product_recs.builders import merged
from featurekit_spark.builder import Update, bind
from featurekit_spark.embed import HashingEmbedder
from featurekit_spark.errors import BuildError, NotBuiltError, UsageError
from featurekit_spark.search import MatrixStore, OldLists, incremental, merge_top_k
from featurekit_spark.search.copies import Copies
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.testing.fakes import CountingLLM, ProductDBFake
from featurekit_spark.testing.parity import assert_parity

TITLES = {
    "p1": "Red desk lamp",
    "p2": "Blue desk lamp",
    "p3": "Green floor lamp",
    "p4": "Oak dining table",
    "p5": None,
    "p6": " \t",
    "p7": "Red desk lamp",
}


def at(product_id: str) -> tuple[str, str, str]:
    return ("shop", "US", product_id)


def controller(tmp_path: Path, titles: dict[str, Any] = TITLES, **changes: Any) -> Controller:
    context = Context(
        product_db=ProductDBFake({name: {"title": title} for name, title in titles.items()}),
        embedder=HashingEmbedder(64),
        matrices=MatrixStore(tmp_path / "matrices"),
        **{"llm": CountingLLM(lambda prompt: "1. Blue desk lamp\n2. Oak table"), **changes},
    )
    made = Controller(context, MemoryCache())
    made.get(ProductEmbeddingDB, ("shop", "US"), gather=True)
    return made


def test_similar_products_are_not_the_product_itself(tmp_path: Path) -> None:
    got = controller(tmp_path)
    value = got.get(SimilarProducts, at("p1")).require()
    assert value is not None
    assert [hit["product_id"] for hit in value] == ["p7", "p2", "p3", "p4"]
    assert value[0]["score"] == 1.0
    assert (got.get(SimilarProducts, at("p7")).require() or [{}])[0]["product_id"] == "p1"


def test_llm_logic_searches_for_what_the_model_suggests(tmp_path: Path) -> None:
    got = controller(tmp_path)
    model = got.context.llm
    assert got.get(LLMLogic, at("p1")).require() == ["p2", "p4", "p7", "p3"]
    assert got.get(LLMSuggestions, at("p1")).value == ["Blue desk lamp", "Oak table"]
    assert "p2" not in (got.get(LLMLogic, at("p2")).value or [])
    assert got.get(LLMLogic, at("p7")).require() == ["p2", "p4", "p1", "p3"]
    assert sum(model._here.values()) == 2, "equal prompts of p1 and p7 are one call"


def test_the_prompt_is_the_template_with_the_title(tmp_path: Path) -> None:
    got = controller(tmp_path, merchant_config={"prompt_template": "like {title}?"})
    assert got.get(LLMProductPrompt, at("p1")).value == "like Red desk lamp?"
    assert (
        controller(tmp_path).get(LLMProductPrompt, at("p1")).value == "get recommendations for Red desk lamp"
    )


def test_a_template_with_logic_is_part_of_the_prompt_s_identity(tmp_path: Path) -> None:
    words = {
        "template_engine": "jinja",
        "prompt_template": "like {{ title[:15] | lower }}{{ '?' if 'lamp' in title }}",
    }
    got = controller(tmp_path, titles={**TITLES, "p8": "{{ 7*7 }} {title}"}, merchant_config=words)
    assert got.get(LLMProductPrompt, at("p1")).value == "like red desk lamp?"
    assert got.get(LLMProductPrompt, at("p8")).value == "like {{ 7*7 }} {titl"
    assert got.get(LLMProductPrompt, at("p5")).value is None
    template = {"prompt_template": "about {{ title }}"}
    hashes = {
        bind(LLMProductPrompt, Context(merchant_config={**template, "template_engine": engine})).config_hash
        for engine in ("fields", "jinja")
    }
    assert len(hashes) == 2


def test_a_prompt_that_cannot_be_made_is_its_product_s_error(tmp_path: Path) -> None:
    words = {"template_engine": "jinja", "prompt_template": "{{ title[13] }}"}
    got = controller(tmp_path, merchant_config=words)
    first, second = got.get_many(LLMProductPrompt, [at("p1"), at("p2")])
    assert second.value == "p"
    assert 'LLMProductPrompt["shop","US","p1"]: prompt_template \'{{ title[13] }}\' cannot' in (
        first.error or ""
    )
    assert "title" in (first.error or "")


@pytest.mark.parametrize("product_id", ["p5", "p6", "unknown"])
def test_without_a_title_there_is_nothing_and_no_call(tmp_path: Path, product_id: str) -> None:
    got = controller(tmp_path)
    for builder in (ProductEmbeddingString, LLMProductPrompt, SimilarProducts, LLMLogic):
        feature = got.get(builder, at(product_id))
        assert (feature.status, feature.value) == ("fresh", None), builder.name
    assert got.get(LLMSuggestions, at(product_id)).value == []
    assert not got.context.llm._here


def test_the_db_holds_every_product_with_a_title(tmp_path: Path) -> None:
    got = controller(tmp_path)
    assert got.get(ProductIds, ("shop", "US")).value == sorted(TITLES)
    ref = got.get(ProductEmbeddingDB, ("shop", "US")).require()
    matrix = got.context.matrices.open(ref)
    assert matrix.ids == ("p1", "p2", "p3", "p4", "p7")
    assert np.allclose(np.linalg.norm(matrix.vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(NotBuiltError, match="gather=True"):
        got.get(ProductEmbeddingDB, ("shop", "other"))


def test_top_k_is_searched_without_the_product_itself(tmp_path: Path) -> None:
    got = controller(tmp_path, merchant_config={"top_k": 2})
    assert len(got.get(ProductEmbeddingSearcher, ("shop", "US", "lamp")).value or []) == 3
    assert [hit["product_id"] for hit in got.get(SimilarProducts, at("p1")).value or []] == ["p7", "p2"]
    assert got.get(LLMLogic, at("p1")).value == ["p2", "p4"]
    assert got.get(ProductEmbeddingSearcher, ("shop", "US", "  ")).value is None


@pytest.mark.parametrize("target", [LLMLogic, SimilarProducts])
def test_every_way_of_running_agrees(tmp_path: Path, target: Any) -> None:
    context = controller(tmp_path).context
    values = assert_parity(target.over(ProductIds), context, merchant="shop", market="US")
    assert len(values) == len(TITLES)


def test_an_empty_catalog_and_a_single_product(tmp_path: Path) -> None:
    got = controller(tmp_path, {})
    assert got.get(ProductEmbeddingSearcher, ("shop", "US", "lamp")).value == []
    got = controller(tmp_path, {"p1": "Lamp"})
    assert got.get(SimilarProducts, at("p1")).value == []
    assert got.get(LLMLogic, at("p1")).value == []


def test_a_failing_model_fails_its_products_only(tmp_path: Path) -> None:
    got = controller(tmp_path)
    got.context.llm.failures["get recommendations for Oak dining table"] = BuildError("refused")
    features = got.get_many(LLMLogic, [at("p1"), at("p4")])
    assert [feature.status for feature in features] == ["fresh", "error"]
    assert "refused" in (features[1].error or "")


def test_an_answer_without_suggestions_recommends_nothing(tmp_path: Path) -> None:
    got = controller(tmp_path, llm=CountingLLM(lambda prompt: "[]"))
    assert got.get(LLMLogic, at("p1")).require() == []


def test_the_title_is_the_markets(tmp_path: Path) -> None:
    german = (("locale", "de_DE"),)
    titles = {"p1": {(): "Lamp", german: "Lampe"}, "p2": {german: "Tisch"}, "p3": {(): "Chair", german: " "}}
    config = {"dimensions": {"locale": "de_DE"}}
    keys = [at(product_id) for product_id in titles]
    got = controller(tmp_path, titles, merchant_config=config)
    assert [f.value for f in got.get_many(ProductEmbeddingString, keys)] == ["Lampe", "Tisch", "Chair"]
    assert [f.value for f in controller(tmp_path, titles).get_many(ProductEmbeddingString, keys)] == [
        "Lamp",
        None,
        "Chair",
    ]


def test_merging_takes_the_best_score_then_the_id() -> None:
    def hits(**scores: float) -> list[dict[str, Any]]:
        return [{"product_id": name, "score": score} for name, score in scores.items()]

    lists = [hits(a=0.9, b=0.5, me=1.0), None, hits(b=0.9, c=0.9, a=0.1), []]
    assert merged(lists, leave_out="me") == [("a", 0.9), ("b", 0.9), ("c", 0.9)]
    assert merged([hits(a=-0.5)], leave_out="me") == [("a", -0.5)]


def test_a_scan_gives_what_build_gives(tmp_path: Path) -> None:
    (tmp_path / "shop_US.csv").write_text(
        "product_id,title,title[locale=de_DE]\nb,Lamp,Lampe\na,\u2003,\nc,Chair,\n", encoding="utf-8"
    )
    db = FileProductDB(tmp_path, merchant="shop", market="US")
    context = Context(product_db=db, merchant_config={"dimensions": {"locale": "de_DE"}})
    got = Controller(context, MemoryCache())
    group = {"merchant": "shop", "market": "US"}
    ids = ProductIds().scan(group, None, context)
    assert ids is not None
    assert ids.to_arrow().to_pydict() == {"product_id": got.get(ProductIds, ("shop", "US")).value}
    builder = ProductEmbeddingString()
    titles = builder.scan(group, builder.default_config(context), context)
    assert titles is not None and titles.bytes > 0
    table = titles.to_arrow()
    assert table.column_names == ["product_id", "value"] and table["value"].type == pa.string()
    values = dict(zip(*table.to_pydict().values(), strict=True))
    assert values == {"a": None, "b": "Lampe", "c": "Chair"}
    for product_id, title in values.items():
        assert got.get(ProductEmbeddingString, at(product_id)).value == title
    assert ProductIds().scan(group, None, Context(product_db=ProductDBFake({}))) is None


@pytest.mark.parametrize(("changed", "follows"), [(2, True), (3, False), (10, False)])
def test_lists_are_searched_anew_where_a_fifth_of_many_products_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int, follows: bool
) -> None:
    monkeypatch.setattr(incremental, "_FEW", 2)
    store = MatrixStore(tmp_path, copies=Copies(tmp_path / "copies"))
    former, ids = np.eye(10, dtype=np.float32), [f"p{row}" for row in range(10)]
    vectors = -former
    vectors[: 10 - changed] = former[: 10 - changed]
    then, now = (asdict(store.put(ids, rows)) for rows in (former, vectors))
    old = [{"product_id": "p0", "score": 1.0}, {"product_id": "p1", "score": 0.0}]
    searcher: Any = ProductEmbeddingSearcher()
    config = searcher.Config(top_k=1)
    inputs, before = (
        pd.DataFrame({"ProductEmbeddingDB": [ref], "ProductEmbedding": [former[0]]}) for ref in (now, then)
    )
    found = searcher.update(inputs, before.assign(value=[old]), config, Context(matrices=store))
    assert found == [Update.KEEP if follows else Update.REBUILD]
    change = store.change(then, now)
    assert (change.too_large, change.index is None, len(change.kept)) == (
        not follows,
        not follows,
        8 * follows,
    )
    if not follows:
        with pytest.raises(UsageError, match=f"{changed} rows changed: too many to merge"):
            merge_top_k(store.open(now).index, former[:1], OldLists.of([old], 2, change.kept), change)
