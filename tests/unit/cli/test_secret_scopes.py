"""The main job with an API key out of a scope of Databricks secrets: used, and in nothing that a run leaves or says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest

from featurekit_spark.testing.chat import chat_server
from tests.databricks import Workspace, workspace

Workplace = Any
KEY = "sk-kept-in-a-scope-0123456789"


@pytest.fixture
def scopes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    with workspace(shop={"openai": KEY.encode()}) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def test_a_run_keeps_and_says_nothing_of_the_key(workplace: Workplace, scopes: Workspace) -> None:
    with chat_server(lambda prompt: "1. table lamp") as server:
        llm = f"llm={{provider: openai, model: m, base_url: '{server.url}', api_key_secret: shop/openai, attempts: 1}}"
        planned = workplace.run("--set", llm, "--dry-run")
        assert planned.code == 0 and not scopes.asked and not server.keys
        server.then(400, {"error": {"message": f"no {KEY}", "type": "t", "code": "x"}})
        ran = workplace.run("--set", llm)
        assert ran.code == 5 and scopes.asked == ["shop/openai"]
        assert len(server.keys) == 6 and set(server.keys) == {f"Bearer {KEY}"}
        assert "no ***" in ran.err
        again = workplace.run("--set", llm)
        assert again.calls == 0 and len(server.keys) == 6
    said = "".join(text for one in (planned, ran, again) for text in (one.out, one.err))
    files = [path for path in workplace.warehouse.rglob("*") if path.is_file()]
    assert any(path.parent.name == "US" and path.suffix == ".json" for path in files), "the run's record"
    for path in files:
        said += path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            said += json.dumps(pq.read_table(path).to_pylist(), default=repr)
    assert "no ***" in said and "shop/openai" in said
    for form in (KEY, *(base64.b64encode(b"-" * at + KEY.encode()).decode()[4:-4] for at in range(3))):
        assert form not in said


def test_a_key_that_is_not_there_ends_the_run_before_anything(
    workplace: Workplace, scopes: Workspace
) -> None:
    with chat_server() as server:
        llm = f"llm={{provider: openai, model: m, base_url: '{server.url}', api_key_secret: shop/other}}"
        ran = workplace.run("--set", llm)
        assert ran.code == 3 and "Secret does not exist with scope: shop and key: other" in ran.err
        assert "databricks secrets put-secret shop other" in ran.err and "Traceback" not in ran.err
        assert not server.keys
        scopes.fails = (500, "INTERNAL_ERROR", "out of order")
        assert workplace.run("--set", llm).code == 75
        assert workplace.run("--set", llm, "--no-new-calls").code == 6, "which needs none"
        embedder = f"embedder={{provider: openai, model: e, dim: 8, base_url: '{server.url}', "
        ran = workplace.run("--set", embedder + "api_key_secret: nowhere/openai}")
        assert ran.code == 75 and "the API key of e at" in ran.err
        scopes.fails = None
        ran = workplace.run("--set", embedder + "api_key_secret: nowhere/openai}")
        assert ran.code == 3 and "Scope nowhere does not exist" in ran.err and not server.keys
