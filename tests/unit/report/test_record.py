"""A run's document: what it holds, what it must not hold, and where it lies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from featurekit_spark.builder import FeatureBuilder, KeySet
from featurekit_spark.cache.memory import MemoryCache
from featurekit_spark.context import Context
from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.report.lists import list_page
from featurekit_spark.report.page import run_page
from featurekit_spark.report.record import KEPT_ERRORS, masked, run_document, versions
from featurekit_spark.report.store import LISTED, RunStore
from featurekit_spark.session import Session
from featurekit_spark.settings import Settings

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
FACTS: dict[str, Any] = {
    "run_id": "nightly-1",
    "merchant": "abt",
    "market": "US",
    "status": "ok",
    "products": 2,
    "wall_seconds": 1.5,
    "builders": {},
    "sinks": {},
    "quality": {},
    "unchanged": False,
}


class Letters(KeySet):
    key = ("merchant",)
    of = "letter"
    value = pa.list_(pa.string())
    version = "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> list[str]:
        return ["a", "b"]


class Upper(FeatureBuilder[str]):
    key = ("merchant", "letter")
    value = pa.string()
    version = "1"

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        if inputs["letter"] == "b":
            raise ValueError("no b")
        return str(inputs["letter"].upper())


def document(**changes: Any) -> dict[str, Any]:
    return run_document({**FACTS, **changes}, started=START, ended=START)


def test_a_document_holds_plan_stages_identities_errors_versions_and_settings() -> None:
    result = Session(Context(), MemoryCache(), engine="local").run(Upper.over(Letters), merchant="m")
    found = run_document(
        FACTS,
        started=START,
        ended=START,
        execution=result.execution,
        errors=result.errors,
        settings=Settings(),
    )
    assert json.loads(json.dumps(found)) == found
    assert found["plan"] == result.execution.plan.explain() and "Upper" in found["plan"]
    assert [stage["stage"] for stage in found["stages"]] == list(result.execution.seconds)
    assert set(found["identities"]) == {"Letters", "Upper"}
    assert found["identities"]["Upper"]["version"] == "1"
    assert found["errors"]["total"] == 1 and found["errors"]["first"][0]["key"] == '["m","b"]'
    assert "no b" in found["errors"]["first"][0]["error"]
    assert found["versions"]["python"] == sys.version.split()[0] and "deltalake" in found["versions"]
    assert {"key": "search.top_k", "value": 10, "origin": "default"} in found["settings"]
    assert (found["started"], found["engine"]) == ("2026-01-31T12:00:00.000Z", "spark")


def test_secrets_stay_out() -> None:
    settings = Settings.model_validate(
        {
            "sinks": [{"kind": "redis", "url": "redis://me:s3cret@host/0?password=s3cret&db=1"}],
            "llm": {"base_url": "https://host/v1?api-key=s3cret"},
        }
    )
    found = run_document(
        {**FACTS, "error": "redis://me:s3cret@host did not answer"},
        started=START,
        ended=START,
        errors={"[]": "https://x/?api_key=s3cret refused"},
        settings=settings,
    )
    assert "s3cret" not in json.dumps(found) and "s3cret" not in run_page(found)
    assert "db=1" in json.dumps(found)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Incorrect API key provided: sk-proj-Ab12_cd34ef56", "Incorrect API key provided: sk-***"),
        ("401 for Authorization: Bearer eyJhbGciOi.J9-x_y=", "401 for Authorization: Bearer ***"),
        ("token dapi0123456789abcdef is expired", "token dapi*** is expired"),
        ("a task-based disk-cleaner", "a task-based disk-cleaner"),
    ],
)
def test_keys_that_a_provider_repeats_are_masked(said: str, kept: str) -> None:
    assert masked(said) == kept


def test_only_the_first_errors_are_kept() -> None:
    errors = {f'["{number}"]': "bad" for number in range(1000)}
    found = run_document(FACTS, started=START, ended=START, errors=errors)
    assert found["errors"]["total"] == 1000 and len(found["errors"]["first"]) == KEPT_ERRORS
    assert "975 more." in run_page(found)


def test_versions_load_nothing() -> None:
    code = (
        "import sys\nfrom featurekit_spark.report.record import versions\n"
        "import featurekit_spark.report.store\n"
        "found = versions()\nassert 'pyspark' in found and 'pandas' in found, found\n"
        "print(*sorted({'pyspark', 'pandas', 'pyarrow', 'deltalake', 'jinja2', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("release", "version"), [('IMPLEMENTOR="x"\nJAVA_VERSION="17.0.9"\n', "17.0.9"), ("nothing", None)]
)
def test_java_is_asked_for_its_version_without_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, version: str | None
) -> None:
    (tmp_path / "release").write_text(release)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert versions().get("java") == version


# -- pages ---------------------------------------------------------------------------------------------------


def test_everything_on_a_page_is_escaped_and_nothing_is_fetched() -> None:
    evil = "<script>alert('x')</script>&\"'"
    found = run_document(
        {
            **FACTS,
            "merchant": evil,
            "error": evil,
            "builders": {evil: {"hit": 1, "computed": 0, "usd": None}},
            "sinks": {evil: {"status": evil, "rows": 1, evil: evil}},
            "quality": {evil: 1},
        },
        started=START,
        ended=START,
        errors={evil: evil},
    )
    found |= {
        "plan": evil,
        "stages": [{"stage": evil, "seconds": 0.1}],
        "settings": [{"key": evil, "value": evil, "origin": evil}],
        "identities": {evil: {"version": evil, "config_hash": evil, "type": evil, "config": evil}},
        "earlier": [{"status": evil, "started": evil, "error": evil}],
        "versions": {evil: evil},
        "run_date": evil,
        "engine": evil,
        "run_id": evil,
    }
    for page in (run_page(found), list_page(evil, evil, [found])):
        assert "<script" not in page and "alert(&#x27;x&#x27;)" in page
        assert "http://" not in page and "https://" not in page and "src=" not in page


def test_a_page_is_made_within_ten_milliseconds() -> None:
    counts = {
        "hit": 5,
        "computed": 5,
        "empty": 1,
        "error": 1,
        "calls": 2,
        "tokens": 9,
        "usd": 0.1,
        "seconds": 1.0,
    }
    errors = {f'["{number}"]': "bad " * 20 for number in range(1000)}
    found = run_document(
        {**FACTS, "builders": {f"Builder{number}": counts for number in range(12)}},
        started=START,
        ended=START,
        errors=errors,
        settings=Settings(),
    )
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        run_page(found)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.01


# -- the store -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    if request.param == "uri":  # the way of object stores, over a folder
        monkeypatch.setattr("featurekit_spark.report.store.local_path", lambda uri: None)
    return RunStore(str(tmp_path / "w"))


def test_what_is_written_is_read(store: RunStore, tmp_path: Path) -> None:
    page = store.write(document())
    assert page == f"{tmp_path}/w/runs/abt/US/nightly-1.html"
    assert store.read("abt", "US", "nightly-1") == store.read("abt", "US", "latest") == document()
    assert "nightly-1" in Path(page).read_text()
    assert 'href="nightly-1.html"' in Path(page).with_name("index.html").read_text()
    assert 'href="abt/US/index.html"' in (tmp_path / "w" / "runs" / "index.html").read_text()
    left = {path.name for path in Path(page).parent.iterdir()} - {".lock"}
    assert left == {"nightly-1.json", "nightly-1.html", ".index.json", "index.html"}


def test_lists_are_newest_first_and_of_one_market(store: RunStore) -> None:
    for day, market in [(1, "US"), (3, "US"), (2, "US"), (4, "NO")]:
        found = run_document(
            {**FACTS, "run_id": f"r{day}", "market": market},
            started=START.replace(day=day),
            ended=START,
        )
        store.write(found)
    assert [run["run_id"] for run in store.runs("abt", "US")] == ["r3", "r2", "r1"]
    assert [run["run_id"] for run in store.runs("abt", "NO")] == ["r4"]
    assert store.runs("abt", "DE") == []
    assert store.groups() == [("abt", "NO"), ("abt", "US")]


def test_a_run_of_the_same_name_is_replaced_and_told_of(store: RunStore) -> None:
    store.write(document(status="failed", error="no disk"))
    store.write(document(status="failed", error="no net"))
    store.write(document())
    assert [run["status"] for run in store.runs("abt", "US")] == ["ok"]
    found = store.read("abt", "US", "nightly-1")
    assert [run["error"] for run in found["earlier"]] == ["no disk", "no net"]


def test_a_list_is_made_again_from_the_documents(store: RunStore, tmp_path: Path) -> None:
    store.write(document())
    store.write(document(run_id="r2"))
    folder = tmp_path / "w" / "runs" / "abt" / "US"
    (folder / "broken.json").write_text("{")
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(folder / ".index.json")
        assert {run["run_id"] for run in store.runs("abt", "US")} == {"nightly-1", "r2"}
    with pytest.raises(DataError, match=r"broken\.json is no document of a run"):
        store.read("abt", "US", "broken")


def test_an_unknown_run_is_told_with_those_there_are(store: RunStore) -> None:
    store.write(document())
    with pytest.raises(UsageError, match=r"no run 'nightly-2' of abt in US .*Did you mean 'nightly-1'"):
        store.read("abt", "US", "nightly-2")
    with pytest.raises(UsageError, match="no run 'latest' of abt in NO .*Known: none"):
        store.read("abt", "NO", "latest")


def test_lists_end_somewhere(store: RunStore) -> None:
    runs = [{"run_id": f"r{n}", "started": f"2026-01-01T{n:09d}"} for n in range(LISTED + 20)]
    store._files.write("abt/US/.index.json", json.dumps({"runs": runs}))
    store.write(document())
    assert len(store.runs("abt", "US")) == LISTED


def test_text_that_is_no_unicode_is_written_all_the_same(store: RunStore) -> None:
    store.write(document(error="half a letter: \ud83d"))
    assert store.read("abt", "US", "nightly-1")["error"] == "half a letter: \ud83d"
