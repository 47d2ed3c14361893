"""`featurekit cache purge`: afterwards nothing below the warehouse names the product, and the next run does well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import redis
from deltalake import DeltaTable
from typer.testing import CliRunner

from featurekit_spark.cache.care import CARE_GROUP
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cli import app
from featurekit_spark.llm.batch_records import BatchRecords, Stage, Submission
from featurekit_spark.locks import file_lock
from featurekit_spark.sinks import read_recs
from featurekit_spark.testing.redis import redis_server

Workplace = Any
Purge = Callable[..., dict[str, Any]]
SECRET = "p-\u00e4 '\"13"
TITLE = "green desk lamp of somebody"
TITLES = {
    "p1": "red table lamp",
    "p2": "blue table lamp",
    SECRET: TITLE,
    "p4": "green desk lamp of all",
    "p5": "green desk lamp of nobody",
}
KEY = json.dumps(["abt", "US", SECRET])
LEFT = {product: title for product, title in TITLES.items() if product != SECRET}


@pytest.fixture
def purge(workplace: Workplace) -> Purge:
    def run(*arguments: str, code: int = 0, settings: bool = True) -> dict[str, Any]:
        where = ("--set", f"warehouse={workplace.warehouse}", "--merchant", "abt", "--market", "US")
        found = where if settings else ("--path", str(workplace.warehouse / "cache"))
        done = CliRunner().invoke(app, ["cache", "purge", *arguments, *found, "--output", "json"])
        assert done.exit_code == code, done.output + done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    return run


def mentions(folder: Path, *words: str) -> list[str]:
    """Files below a folder in which one of the words is, in any column of a Parquet file too."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            texts = [path.read_bytes(), *(_columns(path) if path.suffix == ".parquet" else ())]
            forms = {form.encode() for word in words for form in (word, json.dumps(word)[1:-1])}
            forms |= {json.dumps(form.decode())[1:-1].encode() for form in forms}
            forms |= {json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in words}
            if any(form in text for form in forms for text in texts):
                found.append(str(path.relative_to(folder)))
    return found


def _columns(path: Path) -> Iterator[bytes]:
    for row in pq.read_table(path, partitioning=None).to_pylist():
        for value in row.values():
            yield value if isinstance(value, bytes) else str(value).encode()
            yield json.dumps(value, ensure_ascii=False, default=str).encode()


def test_nothing_names_the_product_any_more(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    workplace.run("--set", "search.top_k=2")
    assert SECRET in {rec for row in workplace.published() for rec in row["recs"]}
    assert mentions(workplace.warehouse, SECRET)
    promised = purge("--key", KEY, "--dry-run", "--text")
    before = mentions(workplace.warehouse, SECRET, TITLE)
    assert before
    told = purge("--key", KEY, "--yes", "--text", "--reason", "request 17")
    assert told["entries"] == promised["entries"] and told["sinks"] == promised["sinks"]
    assert told["entries"]["LLMLogic"] >= 2 and told["entries"]["LLMCompletion"] == 1
    assert told["sinks"]["delta"]["rows"] == 1 and told["sinks"]["delta"]["lists"] >= 1
    assert told["matrices"] == 1
    assert mentions(workplace.warehouse, SECRET, TITLE) == []
    assert SECRET not in {row["product_id"] for row in workplace.published()}
    for name in ("entries", "traces", "runs"):
        protocol = DeltaTable(str(workplace.warehouse / "cache" / name)).protocol()
        assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2)
    record = DeltaCache(str(workplace.warehouse / "cache")).last_run(CARE_GROUP)
    assert record is not None and record.record["reason"] == "request 17"
    assert purge("--key", KEY, "--yes", "--text")["entries"] == {}


def test_the_run_after_it(workplace: Workplace, purge: Purge) -> None:
    """Without the product: what is left is right, and only what its going concerns is computed."""
    workplace.catalog(TITLES)
    workplace.run()
    purge("--key", KEY, "--yes")
    workplace.catalog(LEFT)
    ran = workplace.run()
    assert ran.code == 0 and ran.calls == 0
    recs = workplace.recs()
    shutil.rmtree(workplace.warehouse)
    workplace.run()
    assert workplace.recs() == recs
    assert set(recs) == set(LEFT)


def test_a_product_that_is_still_in_the_catalog_comes_back(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    recs = workplace.recs()
    purge("--key", KEY, "--yes")
    ran = workplace.run()
    assert (ran.code, ran.calls) == (0, 0)  # its prompt was not asked to go
    assert workplace.recs() == recs


def test_what_others_may_share_is_listed(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    told = purge("--key", KEY, "--yes")
    shared = told["keyed_by_their_texts"]
    assert shared["LLMCompletion"] == 1 and shared["ProductEmbedding"] >= 1
    assert "LLMCompletion" not in told["entries"]
    cache = workplace.warehouse / "cache"
    done = CliRunner().invoke(app, ["cache", "show", "ProductEmbedding", TITLE, "--path", str(cache)])
    assert done.exit_code == 0
    assert mentions(cache, SECRET) == []


def test_the_same_id_of_another_merchant_stays(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.catalog(TITLES, merchant="buy")
    workplace.run()
    workplace.run(merchant="buy")
    others = [row for row in workplace.published() if row["merchant"] == "buy"]
    told = purge("--key", KEY, "--yes", "--text")
    assert told["sinks"]["delta"]["groups"] == [["abt", "US"]]
    assert [row for row in workplace.published() if row["merchant"] == "buy"] == others
    assert told["matrices"] == 0  # the other's matrix has the same content, and is the same
    ran = workplace.run(merchant="buy")
    assert ran.code == 0
    by_id = purge("--key", SECRET, "--yes", "--text")
    assert by_id["matrices"] == 1
    assert mentions(workplace.warehouse, SECRET) == []


def test_run_records_keep_what_is_no_ones(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    cache = DeltaCache(str(workplace.warehouse / "cache"))
    run = cache.last_run('["abt","US"]')
    assert run is not None
    told = {**run.record, "errors": {KEY: f"LLMLogic {KEY} failed", '["abt","US","p1"]': "p1 failed"}}
    cache.record_run(replace(run, record=told))
    purge("--key", KEY, "--yes")
    after = DeltaCache(cache.path).last_run('["abt","US"]')
    assert after is not None
    assert after.record["errors"] == {"[purged]": "[purged]", '["abt","US","p1"]': "p1 failed"}
    assert after.record["builders"] == run.record["builders"]


def test_redis_forgets_as_well(workplace: Workplace) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    workplace.catalog(TITLES)
    with redis_server() as url:
        for publish in ("keys", "versioned"):
            sinks = f"sinks=[{{kind: delta}}, {{kind: redis, url: '{url}', publish: {publish}}}]"
            workplace.run("--set", sinks)
            place = ("--set", f"warehouse={workplace.warehouse}", "--merchant", "abt", "--market", "US")
            done = CliRunner().invoke(
                app, ["cache", "purge", "--key", KEY, "--yes", "--output", "json", *place, "--set", sinks]
            )
            assert done.exit_code == 0, done.output
            told = json.loads(done.stdout)["sinks"]["redis"]
            assert told["keys"] == 1 and told["lists"] >= 1
            client = redis.Redis.from_url(url)

            def read(product: str, client: Any = client, publish: Any = publish) -> Any:
                return read_recs(client, product, merchant="abt", market="US", publish=publish)

            assert read(SECRET) is None
            assert read("p4") and SECRET not in read("p4")
            assert SECRET not in str(
                [client.get(k) for k in client.scan_iter() if client.type(k) == b"string"]
            )
            ran = workplace.run("--set", sinks)  # still in the catalog: it comes back
            assert ran.code == 0 and read(SECRET) is not None
            client.flushall()
            client.close()


def test_not_while_a_run_goes_on_and_not_unasked(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    before = mentions(workplace.warehouse, SECRET)
    assert "--yes" in purge("--key", KEY, code=2)["error"]
    assert "--key KEY" in purge("--yes", code=2)["error"]
    with file_lock(workplace.warehouse / "locks" / "abt" / "US.lock", timeout_s=0, owner="abt in US"):
        assert "abt/US" in purge("--key", KEY, "--yes", code=75)["error"]
    purge("--key", KEY, "--dry-run")
    assert mentions(workplace.warehouse, SECRET) == before


def test_a_no_to_the_question_is_no_bug(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run()
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("featurekit_spark.cli.removal_commands.sys", terminal)
    where = ["--path", str(workplace.warehouse / "cache"), "--key", '["abt","US","p1"]']
    done = CliRunner().invoke(app, ["cache", "purge", *where], input="n\n")
    assert done.exit_code == 1 and "removed" not in done.stdout
    assert "would be removed: 1 entry of LLMSuggestions" in done.stderr
    assert "Aborted" in done.stderr and "Traceback" not in done.stderr
    done = CliRunner().invoke(app, ["cache", "purge", *where], input="y\n")
    assert done.exit_code == 0 and "removed: 1 entry of LLMSuggestions" in done.stdout
    done = CliRunner().invoke(app, ["cache", "purge", *where, "--dry-run"])
    assert "nothing names them" in done.stdout


def test_with_the_path_alone_only_the_cache(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    told = purge("--key", KEY, "--yes", "--text", settings=False)
    assert "--path names only the cache" in told["not_looked_at"]
    assert mentions(workplace.warehouse / "cache", SECRET, TITLE) == []
    assert mentions(workplace.warehouse / "recommendations", SECRET)


def test_no_older_answer_stands_in(workplace: Workplace, purge: Purge, tmp_path: Path) -> None:
    """A list that named the product goes; the one before it did not, and is not the answer either."""
    workplace.catalog(LEFT)
    workplace.run()
    workplace.catalog(TITLES)
    workplace.run()
    cache = DeltaCache(str(workplace.warehouse / "cache"))
    named = {k for k, v in workplace.recs().items() if SECRET in v and k != SECRET}
    assert named
    purge("--key", KEY, "--yes")
    left = {json.loads(key)[2] for key in cache.newest("LLMLogic")["key"].to_pylist()}
    assert left == set(LEFT) - named
    workplace.catalog(LEFT)
    workplace.run()
    assert {json.loads(key)[2] for key in cache.newest("LLMLogic")["key"].to_pylist()} == set(LEFT)


def test_batches_on_their_way_are_told(workplace: Workplace, purge: Purge) -> None:
    workplace.catalog(TITLES)
    workplace.run()
    assert purge("--key", KEY, "--dry-run")["batches_on_their_way"] == 0
    records = BatchRecords(str(workplace.warehouse / "cache" / "batches"))
    records.intend(Submission("t1", "a model", "monday", Stage.SUBMITTED, 0.0), b"")
    assert purge("--key", KEY, "--dry-run")["batches_on_their_way"] == 1
    told = CliRunner().invoke(
        app, ["cache", "purge", "--key", KEY, "--dry-run", "--set", f"warehouse={workplace.warehouse}"]
    )
    assert "1 batch of calls on the way" in told.output and "purge again" in told.output
