"""API keys out of a scope of Databricks secrets: read once, carried along, shown nowhere, and missed in clear words."""

from __future__ import annotations

import asyncio
import builtins
import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.config import load_settings
from featurekit_spark.doctor import Status, services
from featurekit_spark.errors import BuildError, ConfigError, ContextError, FeaturekitError, ServiceError
from featurekit_spark.llm import OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.paid import secrets
from featurekit_spark.paid.secrets import KeyInScope, KeyInVariable, api_key
from featurekit_spark.settings import EmbedderSettings, LLMSettings
from featurekit_spark.testing.chat import chat_server
from featurekit_spark.testing.loopback import JsonHandler, served
from tests.databricks import Workspace, workspace

KEY = "sk-kept-in-a-scope-0123456789"


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    with workspace(
        shop={"openai": KEY.encode(), "empty": b"", "line": b"sk-x\n", "bytes": b"\xff\xfe"}
    ) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def value(path: str = "shop/openai") -> str:
    return KeyInScope(path).value(what="m at http://h")


def test_it_is_read_once_and_shown_nowhere(shop: Workspace, caplog: Any) -> None:
    caplog.set_level(0)
    key = KeyInScope("shop/openai")
    assert str(key) == "the Databricks secret shop/openai" and not shop.asked
    for _ in range(3):
        assert key.value(what="m") == KEY
    assert shop.asked == ["shop/openai"]
    shown = f"{key!r} {key} {vars(key)} {copy.copy(key)!r} {caplog.text}"
    assert KEY not in shown


def test_a_copy_has_what_was_read_by_then(shop: Workspace) -> None:
    key = KeyInScope("shop/openai")
    unread = pickle.loads(pickle.dumps(key))
    key.ready(what="m")
    read = pickle.loads(cloudpickle.dumps(key))
    assert read == key and hash(read) == hash(key) and read != unread
    shop.scopes.clear()
    assert read.value(what="m") == KEY, "it asks nobody"
    with pytest.raises(ContextError):
        unread.value(what="m")


def test_a_variable_is_read_by_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    key = api_key("SHOP_KEY", None)
    assert key == KeyInVariable("SHOP_KEY") and str(key) == "SHOP_KEY"
    key.ready(what="m")
    monkeypatch.setenv("SHOP_KEY", "sk-1")
    assert key.value(what="m") == "sk-1"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere/openai", "Scope nowhere does not exist!. Correct the name.*create-scope nowhere"),
        ("shop/other", "Secret does not exist with scope: shop and key: other.*put-secret shop other"),
        ("shop/empty", "it is empty. Put the key there"),
        ("shop/line", "is no API key for m at http://h: it has line breaks.*put-secret shop line"),
        ("shop/bytes", "is no API key for m at http://h: it has line breaks or letters beyond ASCII"),
        ("closed/openai", "does not have READ permission.*put-acl closed PRINCIPAL READ"),
    ],
)
def test_a_secret_that_is_none(shop: Workspace, path: str, said: str) -> None:
    shop.denied = frozenset({"closed"})
    with pytest.raises(ContextError, match=said) as raised:
        value(path)
    assert f"the Databricks secret {path}" in str(raised.value)
    assert KEY not in str(raised.value) and "sk-x" not in str(raised.value)


def test_a_token_that_is_none(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_TOKEN", "dapi-old")
    with pytest.raises(ContextError, match="Invalid access token.*needs a valid token") as raised:
        value()
    assert "dapi-old" not in str(raised.value)


def test_no_way_to_databricks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContextError, match="cannot be read: .*set DATABRICKS_HOST and DATABRICKS_TOKEN"):
        value()


def test_a_workspace_that_is_away_is_another_run_s_affair(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.fails = (500, "INTERNAL_ERROR", "out of order")
    with pytest.raises(ServiceError, match="out of order. See whether the workspace can be reached"):
        value()
    monkeypatch.setattr(secrets, "_WAIT_S", 1)
    monkeypatch.setenv("DATABRICKS_HOST", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match="See whether the workspace can be reached"):
        value()


def test_without_the_package(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("databricks"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ContextError, match=r"pip install 'featurekit-spark\[databricks\]', or name an env"):
        value()


def test_the_model_is_asked_with_it(shop: Workspace) -> None:
    with chat_server() as server:
        chat = OpenAIChat(server.url, "m", api_key_secret="shop/openai")

        async def ask() -> str:
            try:
                return (await chat.complete("x")).text
            finally:
                await chat.aclose()

        assert not shop.asked, "nothing is read before it is needed"
        assert asyncio.run(ask()) == "hello"
        assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in repr(chat) and "shop/openai" in repr(chat) and KEY not in chat.identity


def test_by_batch_it_is_read_before_anything_as_well(shop: Workspace, tmp_path: Path) -> None:
    batch = OpenAIBatch(OpenAIChat("http://h/v1", "m", api_key_secret="shop/other"), str(tmp_path))
    with pytest.raises(ContextError, match="Secret does not exist"):
        batch.ready()


def test_a_server_that_repeats_the_key_is_not_quoted(shop: Workspace) -> None:
    with chat_server() as server:
        chat = OpenAIChat(server.url, "m", api_key_secret="shop/openai")
        server.then(401, {"error": {"message": f"wrong key {KEY}!", "type": "t", "code": "invalid_api_key"}})

        async def ask() -> None:
            try:
                await chat.complete("x")
            finally:
                await chat.aclose()

        with pytest.raises(BuildError, match=r"wrong key \*\*\*!") as raised:
            asyncio.run(ask())
    error: BaseException | None = raised.value
    while error is not None:
        assert KEY not in f"{error} {error!r}"
        error = error.__cause__


def settings(section: str, text: str) -> Any:
    return getattr(load_settings(merchant="a", market="US", overrides=[f"{section}={text}"]), section)


@pytest.mark.parametrize("section", ["llm", "embedder"])
def test_settings(section: str) -> None:
    found = settings(section, "{provider: openai, model: m, api_key_secret: shop/openai}")
    assert found.api_key_secret == "shop/openai"
    with pytest.raises(
        ConfigError, match=f"{section}: needs the API key in one place, found api_key_env and"
    ):
        settings(section, "{api_key_secret: shop/openai, api_key_env: SHOP_KEY}")
    for wrong in ("sk-123", "a/b/c", "'{{secrets/a/b}}'", "a/", "/b"):
        with pytest.raises(
            ConfigError, match="should be the scope and the key of a Databricks secret"
        ) as raised:
            settings(section, f"{{api_key_secret: {wrong}}}")
        assert wrong.strip("'") not in str(raised.value).replace("`scope/key`", "")


def test_bootstrap_hands_the_name_on(tmp_path: Path) -> None:
    made = Bootstrap(
        load_settings(
            merchant="a",
            market="US",
            overrides=[
                "llm={provider: openai, model: m, api_key_secret: shop/openai, requests_per_minute: 9}",
                "embedder={provider: openai, model: e, api_key_secret: shop/embed}",
            ],
        ),
        merchant="a",
        market="US",
    )
    llm, embedder = made.get_llm(), made.get_embedder()
    assert isinstance(llm, OpenAIChat) and llm.key == KeyInScope("shop/openai")
    assert embedder.key == KeyInScope("shop/embed")
    other = made.settings.llm.model_copy(update={"api_key_secret": "shop/b"})
    assert made.get_limiter(other) != llm.limiter, "a limit is one key's"


def test_the_doctor_reads_it(shop: Workspace) -> None:
    asked: list[str | None] = []

    class Models(JsonHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["authorization"])
            self.reply(200, {}, {"data": [{"id": "m"}]})

    with served(Models) as url:
        options: dict[str, Any] = {"provider": "openai", "model": "m", "base_url": f"{url}/v1"}
        good = services.model(LLMSettings(**options, api_key_secret="shop/openai"), {})
        bad = services.embedder(EmbedderSettings(**options, api_key_secret="shop/other"), {})
    assert good.status is Status.OK and "the key in the secret shop/openai is accepted" in good.found
    assert asked == [f"Bearer {KEY}"]
    assert bad.status is Status.FAIL and "Secret does not exist" in bad.found
    assert "leave embedder.api_key_secret out" in bad.advice
    assert KEY not in json.dumps([good.found, good.advice, bad.found, bad.advice])


def test_only_the_library_s_errors(shop: Workspace) -> None:
    for path in ("nowhere/x", "shop/bytes", "shop/empty"):
        with pytest.raises(FeaturekitError):
            value(path)
