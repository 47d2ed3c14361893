"""The layout in Redis, what a crash leaves behind, and an unreachable server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pytest
import redis

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.sinks import Publication, RedisSink, read_recs
from featurekit_spark.sinks.redis import KEY_TEMPLATE_OTHER, _Writer
from featurekit_spark.testing.redis import redis_server

pytestmark = pytest.mark.redis

Publish = Callable[..., Publication]


def recommendations(client: redis.Redis) -> dict[str, str]:
    """Every key of consumers, with its text."""
    names = sorted(name for name in client.scan_iter() if not name.startswith("featurekit/"))
    return {name: client.get(name) for name in names}


def bookkeeping(client: redis.Redis) -> set[str]:
    return {name.removeprefix("featurekit/abt:US:") for name in client.scan_iter("featurekit/abt*")}


def test_keys_and_values(redis_url: str, client: redis.Redis, publication: Publish) -> None:
    made = publication("run-1", {"1": ["2", 'q"ö'], "a:b/é": []})
    other = made.rows.set_column(1, "logic_builder", pa.array(["Other"] * 2))
    made = replace(made, rows=pa.concat_tables([made.rows, other]))
    RedisSink(redis_url).publish(made)
    assert recommendations(client) == {
        "abt:US:1": '["2","q\\"ö"]',
        "abt:US:1:Other": '["2","q\\"ö"]',
        "abt:US:a%3Ab%2F%C3%A9": "[]",
        "abt:US:a%3Ab%2F%C3%A9:Other": "[]",
    }
    found = read_recs(
        client, "1", merchant="abt", market="US", logic_builder="Other", template=KEY_TEMPLATE_OTHER
    )
    assert found == ["2", 'q"ö']


def test_key_templates(redis_url: str, client: redis.Redis, publication: Publish) -> None:
    template = "recs/{product_id}@{merchant}-{market}/{logic_builder}"
    RedisSink(redis_url, key_template=template).publish(publication("run-1", {"1": ["2"]}))
    assert list(recommendations(client)) == ["recs/1@abt-US/Main"]


def test_ttl(redis_url: str, client: redis.Redis, publication: Publish) -> None:
    RedisSink(redis_url, ttl_s=100, publish_as="versioned").publish(publication("run-1", {"1": ["2"]}))
    lasting = {name for name in client.scan_iter() if client.ttl(name) == -1}
    assert lasting == {"featurekit/abt:US:generations"}
    assert 90 < client.ttl("run-1:abt:US:1") <= 100


def test_versions_switch_whole_and_the_one_before_stays(
    redis_url: str, client: redis.Redis, publication: Publish
) -> None:
    sink = RedisSink(redis_url, publish_as="versioned")
    sink.publish(publication("run-1", {"1": ["a"], "2": ["a"]}))
    sink.publish(publication("run-2", {"1": ["b"]}))
    assert recommendations(client) == {
        "abt:US:version": "run-2",
        "run-1:abt:US:1": '["a"]',
        "run-1:abt:US:2": '["a"]',
        "run-2:abt:US:1": '["b"]',
    }
    assert sink.publish(publication("run-3", {"1": ["c"]})).detail["removed"] == 2
    assert list(recommendations(client)) == ["abt:US:version", "run-2:abt:US:1", "run-3:abt:US:1"]


def test_a_run_that_publishes_again_does_not_write_into_what_is_live(
    redis_url: str, client: redis.Redis, publication: Publish
) -> None:
    sink = RedisSink(redis_url, publish_as="versioned")
    sink.publish(publication("run-1", {"1": ["a"]}))
    sink.publish(publication("run-1", {"1": ["b"]}))
    assert client.get("abt:US:version") == "run-1~2"
    assert client.get("run-1:abt:US:1") == '["a"]'


@pytest.mark.parametrize("publish_as", ["keys", "versioned"])
def test_what_a_crash_left_behind_is_removed_by_the_next_run(
    redis_url: str,
    client: redis.Redis,
    publication: Publish,
    publish_as: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = RedisSink(redis_url, publish_as=publish_as, batch=1)
    sink.publish(publication("run-1", {"1": ["a"]}))
    state = sink.state("abt", "US")

    written = 0

    def two_keys_only(self: _Writer, product_id: str, logic_builder: str) -> str:
        nonlocal written
        written += 1
        if written > 2:
            raise KeyboardInterrupt
        return key(self, product_id, logic_builder)

    key = _Writer._key
    killed = publication("run-2", {"1": ["b"], "7": ["b"], "8": ["b"]})
    monkeypatch.setattr(_Writer, "_key", two_keys_only)
    with pytest.raises(KeyboardInterrupt):
        sink.publish(killed)
    monkeypatch.undo()
    assert sink.state("abt", "US") == state
    if publish_as == "versioned":
        assert read_recs(client, "1", merchant="abt", market="US", publish="versioned") == ["a"]

    for run in ("run-3", "run-4"):
        sink.publish(publication(run, {"1": ["c"]}))
    left = {name.removeprefix("run-3:").removeprefix("run-4:") for name in recommendations(client)}
    assert left - {"abt:US:version"} == {"abt:US:1"}
    lives = {"keys": {"keys:run-4"}, "versioned": {"keys:run-3", "keys:run-4"}}[publish_as]
    assert bookkeeping(client) == {"state", "generations", *lives}


def test_changing_the_way_of_publishing(redis_url: str, client: redis.Redis, publication: Publish) -> None:
    keys, versioned = RedisSink(redis_url), RedisSink(redis_url, publish_as="versioned")
    keys.publish(publication("run-1", {"1": ["a"], "version": ["a"]}))
    versioned.publish(publication("run-2", {"1": ["b"]}))
    versioned.publish(publication("run-3", {"1": ["c"]}))
    assert list(recommendations(client)) == ["abt:US:version", "run-2:abt:US:1", "run-3:abt:US:1"]
    assert client.get("abt:US:version") == "run-3"
    keys.publish(publication("run-4", {"1": ["d"]}))
    assert recommendations(client) == {"abt:US:1": '["d"]'}
    keys.publish(publication("run-5", {"version": ["d"]}))
    assert recommendations(client) == {"abt:US:version": '["d"]'}


def test_the_state_is_readable_json(redis_url: str, client: redis.Redis, publication: Publish) -> None:
    RedisSink(redis_url).publish(publication("run-1", {"1": ["2"], "2": []}))
    assert json.loads(client.get("featurekit/abt:US:state")) == {
        "run_id": "run-1",
        "rows": 2,
        "covered": 1,
        "publish": "keys",
        "generation": "run-1",
        "ts": "2026-01-01T01:00:00+00:00",
    }


def test_no_server_is_a_service_error_without_the_password(publication: Publish) -> None:
    sink = RedisSink("redis://user:s3cret@127.0.0.1:1/0")
    started = time.monotonic()
    for attempt in (
        sink.check,
        lambda: sink.state("abt", "US"),
        lambda: sink.publish(publication("run-1", {"1": ["2"]})),
    ):
        with pytest.raises(ServiceError, match=r"Redis at 127\.0\.0\.1:1 cannot be reached") as caught:
            attempt()
        assert "s3cret" not in str(caught.value)
    assert time.monotonic() - started < 10


def test_a_server_that_does_not_answer(redis_url: str, client: redis.Redis) -> None:
    sink = RedisSink(redis_url, timeout_s=0.1)
    sink.check()
    client.client_pause(3000)
    try:
        with pytest.raises(ServiceError, match=r"did not answer within 0\.1 s"):
            sink.check()
    finally:
        client.client_unpause()


def test_a_wrong_password_and_a_wrong_address_are_configuration() -> None:
    with redis_server("--requirepass", "right") as url:
        address = url.removeprefix("redis://")
        RedisSink(f"redis://:right@{address}").check()
        with pytest.raises(ConfigError, match=r"refused the user or the command: invalid username") as caught:
            RedisSink(f"redis://:wr0ng@{address}").check()
        assert "wr0ng" not in str(caught.value)
        with pytest.raises(ConfigError, match="refused the user or the command"):
            RedisSink(url).check()
    with pytest.raises(ConfigError, match="is no Redis address"):
        RedisSink("http://h").check()


def test_full_memory_is_found_before_the_run(client: redis.Redis, redis_url: str) -> None:
    client.config_set("maxmemory", "1")
    try:
        with pytest.raises(ServiceError, match="refused a command: .*memory"):
            RedisSink(redis_url).check()
    finally:
        client.config_set("maxmemory", "0")
