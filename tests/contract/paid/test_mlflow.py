"""Traces in MLflow's own store, by its own client: what is there, what must not be there, and an MLflow that is not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.config import load_settings
from featurekit_spark.errors import ConfigError
from featurekit_spark.testing.chat import chat_server

pytest.importorskip("mlflow.tracing")
# Its modules warn of their own type hints, of each other's deprecation and of dates without a zone.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

SECRET = "sk-planted0123456789abcdef"
FAILS = "a chair that the model refuses"


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    titles = ["a red lamp", "a sofa for jane.doe@mail.example", f"a desk {SECRET}", "order 17-AB-4711", FAILS]
    rows = "".join(f"p{i},{title}\n" for i, title in enumerate(titles))
    (tmp_path / "catalogs").mkdir()
    (tmp_path / "catalogs/abt_US.csv").write_text(f"product_id,title\n{rows}")
    return tmp_path


def run(folder: Path, url: str, *overrides: str, environ: dict[str, str] | None = None) -> Any:
    given = [
        f"product_db.path={folder}/catalogs",
        f"warehouse={folder}/warehouse",
        "engine.kind=local",
        "llm.provider=openai",
        "llm.model=m",
        "llm.api_key_env=THE_KEY",
        f"llm.base_url={url}",
        "llm.price={input: 1, output: 2}",
        "llm.tracing.provider=mlflow",
        "llm.tracing.sample=1.0",
        *overrides,
    ]
    settings = load_settings(merchant="abt", market="US", environ=environ or {}, overrides=given)
    boot = Bootstrap(settings, merchant="abt", market="US")
    try:
        targets = [builder.over(boot.get_logic_keys()) for builder in boot.get_logic_builders()]
        return boot.get_session().run(*targets, run_id="the-run", merchant="abt", market="US")
    finally:
        boot.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # no server, no database: MLflow's oldest store
    monkeypatch.setenv("THE_KEY", "the-very-key-of-the-provider")
    return tmp_path / "mlruns"


def traces_in(store: Path, experiment: str = "featurekit") -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store.as_uri())
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_traces(locations=[found.experiment_id], max_results=100))


def texts_below(store: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in store.rglob("*") if path.is_file())


def echo(prompt: str) -> str:
    return f"1. goes with {prompt}\n2. key the-very-key-of-the-provider"


def test_a_run_is_seen_in_mlflow_and_nobodys_data_is(catalog: Path, store: Path) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    with chat_server(answer=echo) as server:
        result = run(
            catalog,
            server.url,
            f"llm.tracing.uri={store.as_uri()}",
            "llm.tracing.experiment=prompts",
            r"llm.tracing.masked_patterns=['\d\d-[A-Z]{2}-\d{4}']",
        )
        calls = result.builders["LLMCompletion"].calls
        assert calls == len(server.requests) == 5
    traces = traces_in(store, "prompts")
    roots = [trace.data.spans[0] for trace in traces]
    assert sum(root.attributes["calls"] for root in roots) == 5
    assert sum(root.attributes["tokens"] for root in roots) == 50
    assert sum(root.attributes["usd"] for root in roots) == pytest.approx(5 * (7 + 2 * 3) / 1e6)
    assert {root.attributes["builder"] for root in roots} == {"LLMCompletion"}
    assert {trace.info.tags["featurekit.run_id"] for trace in traces} == {"the-run"}
    assert all("m" in root.attributes["model"] for root in roots)
    calls_shown = [span for trace in traces for span in trace.data.spans[1:]]
    assert len(calls_shown) == 5
    shown = {span.inputs["prompt"]: span.outputs for span in calls_shown}
    assert shown["get recommendations for a red lamp"].startswith(
        "1. goes with get recommendations for a red"
    )
    assert {"get recommendations for a sofa for [email]", "get recommendations for a desk [secret]"} <= set(
        shown
    )
    assert "get recommendations for order [masked]" in shown
    below = texts_below(store)
    for hidden in (SECRET, "jane.doe", "17-AB-4711", "the-very-key-of-the-provider"):
        assert hidden not in below
    assert mlflow.get_tracking_uri() == before


def test_marked_fields_and_failures(catalog: Path, store: Path) -> None:
    with chat_server(answer=echo) as server:
        server.script.append((400, {}, {"error": {"message": "no chairs here", "code": "bad"}}))
        result = run(
            catalog,
            server.url,
            f"llm.tracing.uri={store.as_uri()}",
            "llm.tracing.masked_fields=[title]",
            "llm.concurrency=1",
        )
        assert result.status == "partial"
    roots = [trace.data.spans[0] for trace in traces_in(store)]
    assert sum(root.attributes["calls"] for root in roots) == 5
    assert sum(root.attributes.get("errors.terminal", 0) for root in roots) == 1
    assert [root.status.status_code for root in roots].count("ERROR") == 1
    below = texts_below(store)
    assert "get recommendations for [title]" in below
    for hidden in ("red lamp", "sofa", "desk", "4711", "chair"):
        assert hidden not in below


def test_prompts_with_logic_are_not_shown_where_fields_are_marked(catalog: Path, store: Path) -> None:
    with chat_server(answer=echo) as server:
        run(
            catalog,
            server.url,
            f"llm.tracing.uri={store.as_uri()}",
            "template_engine=jinja",
            "prompt_template=what suits {{ title|upper }}?",
            "llm.tracing.masked_fields=[title]",
        )
    below = texts_below(store)
    assert "not shown:" in below and "LAMP" not in below and "what suits" not in below


def test_an_mlflow_that_is_down_costs_a_warning(
    catalog: Path, store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with chat_server(answer=echo) as server:
        result = run(catalog, server.url, f"llm.tracing.uri=http://127.0.0.1:{port}")
        assert result.status == "ok"
    warnings = [r for r in caplog.records if r.name.startswith("featurekit_spark")]
    assert [r.levelname for r in warnings] == ["WARNING"]
    assert "the-run" in warnings[0].getMessage() and "The run is not affected" in warnings[0].getMessage()


def test_wrong_settings_are_refused() -> None:
    for override, told in (
        ("llm.tracing.masked_fields=[tittle]", "tittle"),
        ("llm.tracing.masked_patterns=['(']", "no regular expression"),
        ("llm.tracing.masked_patterns=['a*']", "matches the empty text"),
        ("llm.tracing.sample=1.5", "sample"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_settings(merchant="abt", market="US", environ={}, overrides=["product_db.path=c", override])
