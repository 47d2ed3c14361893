"""`cache.storage_options`: what opens a cache in an object store, and nothing secret among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.storage import check_options, is_secret, resolved, without_secrets
from featurekit_spark.config import Settings, load_settings
from featurekit_spark.errors import ConfigError

SECRET = "AWS_SECRET_ACCESS_KEY"


def load(*overrides: str, environ: dict[str, str] | None = None) -> Settings:
    return load_settings(merchant="abt", market="US", environ=environ or {}, overrides=overrides)


def test_they_open_the_cache_and_the_one_below(tmp_path: Path) -> None:
    """As they are written: what they refer to is looked up where the storage is opened."""
    settings = load(
        "cache.path=s3://lake/cache",
        "cache.storage_options.AWS_REGION=eu-central-1",
        environ={f"FEATUREKIT__CACHE__STORAGE_OPTIONS__{SECRET}": "${env:LAKE_SECRET}"},
    )
    cache = Bootstrap(settings, merchant="abt", market="US").cache
    assert isinstance(cache, DeltaCache)
    assert cache.storage_options == {"AWS_REGION": "eu-central-1", SECRET: "${env:LAKE_SECRET}"}
    assert cache.journals == Folder("s3://lake/cache/journal", cache.storage_options)
    shown = {leaf.key: leaf.value for leaf in settings.leaves()}
    assert shown[f"cache.storage_options.{SECRET}"] == "${env:LAKE_SECRET}"


@pytest.mark.parametrize("value", ["hunter2", "'12345678'", "12345678", "${env:LAKE} and more", "${env:9}"])
def test_a_secret_that_is_written_down_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ConfigError, match=r"cache\.storage_options") as refused:
        load(f"cache.storage_options.{SECRET}={value}")
    assert "env:NAME" in str(refused.value)
    assert value.strip("'") not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SECRET, True),
        ("secret_access_key", True),
        ("aws_session_token", True),
        ("azure_storage_account_key", True),
        ("azure_storage_sas_token", True),
        ("client_secret", True),
        ("google_service_account_key", True),
        ("aws_sse_customer_key_base64", True),
        ("AWS_ACCESS_KEY_ID", False),
        ("aws_sse_kms_key_id", False),
        ("aws_web_identity_token_file", False),
        ("AWS_ENDPOINT_URL", False),
        ("aws_skip_signature", False),
    ],
)
def test_what_is_secret(name: str, expected: bool) -> None:
    assert is_secret(name) is expected


@given(
    st.text().map(lambda text: f"§{text}§"), st.sampled_from([SECRET, "azure_storage_account_key", "token"])
)
def test_no_message_has_what_is_secret(value: str, name: str) -> None:
    """It is none of the messages' own words."""
    problem = check_options({"AWS_REGION": "eu-central-1", name: value})
    assert problem is not None and value not in problem
    assert without_secrets(f"denied: {value}.", {name: value}) == "denied: ***."
    assert without_secrets(f"denied: {value}.", {"AWS_REGION": value}) == f"denied: {value}."


def test_references_are_looked_up_and_masked(monkeypatch: Any) -> None:
    options = {"AWS_ENDPOINT_URL": "http://${env:LAKE_HOST}:9000", SECRET: "${env:LAKE_SECRET}"}
    monkeypatch.setenv("LAKE_HOST", "store")
    monkeypatch.setenv("LAKE_SECRET", "hunter2")
    assert check_options(options) is None
    assert resolved(options) == {"AWS_ENDPOINT_URL": "http://store:9000", SECRET: "hunter2"}
    assert without_secrets("http://store refuses hunter2", options) == "http://store refuses ***"
    monkeypatch.delenv("LAKE_SECRET")
    with pytest.raises(ConfigError, match=r"'LAKE_SECRET', which is not set .*spark\.executorEnv"):
        resolved(options)
