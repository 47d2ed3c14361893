"""`featurekit vectors` end to end: a catalog, a run, an export to each store, a search with filters."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable, QueryBuilder
from typer.testing import CliRunner, Result

from featurekit_spark.cli import app
from featurekit_spark.search import MatrixStore
from featurekit_spark.testing.embeddings import embedding_server
from featurekit_spark.testing.qdrant import qdrant_server

KEY = "s3cret-of-the-test"


@pytest.fixture(params=["lancedb", "qdrant", "server"])
def index(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Settings that name one."""
    fields = "vector_index.fields={brand: str, price: float}"
    if request.param != "server":
        yield [f"vector_index.kind={request.param}", f"vector_index.path={tmp_path / 'index'}", fields]
        return
    monkeypatch.setenv("TEST_QDRANT_KEY", KEY)
    with qdrant_server(api_key=KEY) as server:
        yield [
            *("vector_index.kind=qdrant", f"vector_index.url={server.url}"),
            *("vector_index.api_key_env=TEST_QDRANT_KEY", fields),
        ]


def featurekit(folder: Path, words: list[str], changes: list[str], *, market: str = "US") -> Result:
    places = [f"product_db.path={folder / 'catalogs'}", f"warehouse={folder / 'warehouse'}"]
    given = [word for change in (*places, *changes) for word in ("--set", change)]
    return CliRunner().invoke(app, [*words, "--merchant", "demo", "--market", market, *given])


def run(folder: Path) -> None:
    assert featurekit(folder, ["run", "--engine", "local"], []).exit_code == 0


def told(done: Result) -> dict[str, Any]:
    assert KEY not in done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a catalog of which everything is computed."""
    done = CliRunner().invoke(app, ["demo", "--products", "40", "--folder", str(tmp_path)])
    assert done.exit_code == 0, done.output
    return tmp_path


def test_an_export_sends_what_differs_and_a_search_finds_it(shop: Path, index: list[str]) -> None:
    as_json = ["--output", "json"]
    first = told(featurekit(shop, ["vectors", "export", "--dry-run", *as_json], index))
    assert (first["how"], first["sent"], first["dry_run"]) == ("replaced", 40, True)
    nothing = featurekit(shop, ["vectors", "show"], index)
    assert nothing.exit_code == 2 and "nothing yet" in nothing.stderr and "vectors export" in nothing.stderr
    done = featurekit(shop, ["vectors", "export", "--batch", "7"], index)
    assert done.exit_code == 0, done.output
    assert "demo US: 40 vectors are in " in done.stdout
    assert "a new generation, switched to: 40 sent, 0 there already, 0 removed" in done.stdout

    catalog = shop / "catalogs" / "demo_US.csv"
    with catalog.open(encoding="utf-8", newline="") as file:
        products = list(csv.DictReader(file))
    products[0]["price"] = "1.25"
    products[1]["title"] = "Garden chair of teak"
    removed = products.pop()
    with catalog.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(products[0]))
        writer.writeheader()
        writer.writerows(products)
    run(shop)
    changed = told(featurekit(shop, ["vectors", "export", *as_json], index))
    figures = [changed[name] for name in ("how", "rows", "sent", "same", "removed")]
    assert figures == ["changed", 39, 2, 37, 1]
    again = told(featurekit(shop, ["vectors", "export", *as_json], index))
    assert (again["how"], again["sent"], again["content"]) == ("unchanged", 0, changed["content"])

    found = told(featurekit(shop, ["vectors", "search", "garden chair of teak", "-k", "3", *as_json], index))
    assert found["hits"][0]["id"] == products[1]["product_id"]
    assert len(found["hits"]) == 3
    cheap = ["--where", "price<=1.25", "--where", f"brand={products[0]['brand']}"]
    found = told(featurekit(shop, ["vectors", "search", "anything at all", *cheap, *as_json], index))
    assert [hit["id"] for hit in found["hits"]] == [products[0]["product_id"]]
    assert found["hits"][0]["payload"] == {"brand": products[0]["brand"], "price": 1.25}
    shown = featurekit(shop, ["vectors", "search", "chair", "-k", "40"], index).stdout
    assert shown.splitlines()[0].split() == ["score", "product", "brand", "price"]
    assert removed["product_id"] not in shown and len(shown.splitlines()) == 40

    state = told(featurekit(shop, ["vectors", "show", *as_json], index))
    assert (state["rows"], state["spec"]["dim"], state["content"]) == (39, 384, changed["content"])
    text = featurekit(shop, ["vectors", "show"], index).stdout
    assert "39 rows, 384 dimensions" in text and "brand (str), price (float)" in text


def test_a_matrix_that_is_not_mapped_is_exported_all_the_same(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> Any:
        raise AssertionError("mapped as a whole")

    index = ["vector_index.kind=lancedb", f"vector_index.path={tmp_path / 'index'}"]
    words = ["vectors", "export", "--output", "json"]
    first = told(featurekit(shop, words, index))
    monkeypatch.setattr(MatrixStore, "open", opened)
    again = told(featurekit(shop, words, [*index, "search.memory_mb=0"]))
    assert (again["how"], again["content"]) == ("unchanged", first["content"])


def test_what_cannot_be_is_said(shop: Path, index: list[str]) -> None:
    assert featurekit(shop, ["vectors", "export"], index).exit_code == 0
    for words, said in (
        (["--where", "colour=red"], "Known: brand, price"),
        (["--where", "price=cheap"], "'cheap' is none"),
        (["--where", "price"], "is no condition"),
    ):
        done = featurekit(shop, ["vectors", "search", "chair", *words], index)
        assert done.exit_code == 2 and said in done.stderr
    done = featurekit(shop, ["vectors", "search", "chair"], [*index, "embedder.dim=64"])
    assert done.exit_code == 3 and "export to it anew" in done.stderr
    done = featurekit(shop, ["vectors", "export", "--builder", "ProductEmbedingDB"], index)
    assert done.exit_code == 2 and "Did you mean 'ProductEmbeddingDB'?" in done.stderr
    done = featurekit(shop, ["vectors", "export"], [*index[:-1], "vector_index.fields={title: int}"])
    assert done.exit_code == 4 and "'title' is " in done.stderr and "demo-0000" in done.stderr
    done = featurekit(shop, ["vectors", "export"], [])
    assert done.exit_code == 3 and "vector_index.kind is none" in done.stderr


def test_nothing_is_computed_by_an_export(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--products", "5", "--folder", str(tmp_path)])
    assert done.exit_code == 0
    index = ["vector_index.kind=lancedb", f"vector_index.path={tmp_path / 'index'}"]
    elsewhere = [*index, f"warehouse={tmp_path / 'other'}"]
    done = featurekit(tmp_path, ["vectors", "export"], elsewhere)
    assert done.exit_code != 0 and "ProductEmbeddingDB" in done.stderr
    assert not (tmp_path / "index").exists()


def test_a_logic_builder_searches_the_index(shop: Path, tmp_path: Path) -> None:
    """The same neighbours as in the matrix; asked for again when an export changed the index, and only then."""
    apps = "featurekit_spark.apps.product_recs"
    index = ["vector_index.kind=lancedb", f"vector_index.path={tmp_path / 'index'}"]
    outside = [*index, f"logic_builders=['{apps}.outside:SimilarInIndex']"]
    done = featurekit(shop, ["run", "--engine", "local"], outside)
    assert done.exit_code == 3 and "Export to it first" in done.stderr
    assert featurekit(shop, ["vectors", "export"], index).exit_code == 0

    def recommended(changes: list[str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        facts = told(featurekit(shop, ["run", "--engine", "local", "--output", "json"], changes))
        table = DeltaTable(str(shop / "warehouse" / "recommendations"))
        query = QueryBuilder().register("recs", table).execute("select product_id, recs from recs")
        return facts, {
            row["product_id"]: row["recs"] for row in query.read_all().to_struct_array().to_pylist()
        }

    _, by_matrix = recommended([f"logic_builders=['{apps}:SimilarProducts']"])
    first, by_index = recommended(outside)
    assert by_index == by_matrix and len(by_index) == 40
    searches = first["builders"]["IndexSearcher"]["computed"]
    assert searches > 30  # one for each title
    again, _ = recommended(outside)
    assert again["unchanged"]
    few = [*index, "embedder.dim=384", "vector_index.fields={brand: str}"]
    assert featurekit(shop, ["vectors", "export"], few).exit_code == 0
    anew, still = recommended(outside)
    assert anew["builders"]["IndexSearcher"]["computed"] == searches and still == by_matrix


def test_markets_that_share_a_conf_file_have_an_index_each(shop: Path, index: list[str]) -> None:
    named = [*index, "vector_index.name=shop.{merchant}-{market}"]
    catalog = shop / "catalogs" / "demo_US.csv"
    catalog.with_name("demo_DE.csv").write_text(
        "product_id,title,brand,price\nd1,Garten-Stuhl,A,1\nd2,Lampe,B,2\n"
    )
    done = featurekit(shop, ["run", "--engine", "local"], [], market="DE")
    assert done.exit_code == 0, done.output
    as_json = ["--output", "json"]
    for market, rows in (("US", 40), ("DE", 2)):
        done = featurekit(shop, ["vectors", "export", *as_json], named, market=market)
        assert (told(done)["how"], told(done)["sent"]) == ("replaced", rows)
        assert told(done)["index"].endswith(f"shop.demo-{market}")
    for market, rows in (("US", 40), ("DE", 2)):
        shown = told(featurekit(shop, ["vectors", "show", *as_json], named, market=market))
        assert shown["rows"] == rows
    done = featurekit(shop, ["vectors", "export"], [*index, "vector_index.name=shop"])
    assert done.exit_code == 3 and "shop-{merchant}-{market}" in done.stderr


def test_a_hosted_embedder_is_paid_once_for_matrix_and_index(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = "featurekit_spark.apps.product_recs"
    monkeypatch.setenv("TEST_EMBED_KEY", KEY)
    with embedding_server() as server:
        hosted = (
            "embedder={provider: openai, model: m, dim: 64, api_key_env: TEST_EMBED_KEY, base_url: 'URL'}"
        )
        given = [
            *("vector_index.kind=lancedb", f"vector_index.path={tmp_path / 'index'}"),
            hosted.replace("URL", server.url),
        ]
        matrix = [*given, f"logic_builders=['{apps}:SimilarProducts']"]
        run = ["run", "--engine", "local", "--output", "json"]
        assert told(featurekit(shop, run, matrix))["status"] == "ok"
        paid = len(server.texts)
        assert paid > 30
        assert featurekit(shop, ["vectors", "export"], matrix).exit_code == 0
        outside = [*given, f"logic_builders=['{apps}.outside:SimilarInIndex']"]
        assert told(featurekit(shop, run, outside))["builders"]["IndexSearcher"]["computed"] == paid
        assert len(server.texts) == paid
