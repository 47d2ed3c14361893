"""Settings of calls become a policy and a limiter."""

from __future__ import annotations

from pathlib import Path

import pytest

from featurekit_spark.bootstrap import Bootstrap
from featurekit_spark.config import load_settings
from featurekit_spark.errors import ConfigError
from featurekit_spark.llm import OpenAIChat
from featurekit_spark.llm.batch import OpenAIBatch
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import LocalLimiter, Rates
from featurekit_spark.paid.prices import Price
from featurekit_spark.paid.redis_leases import RedisLeases
from featurekit_spark.paid.redis_limits import RedisLimiter
from featurekit_spark.paid.retry import RetryPolicy


def chat(*overrides: str) -> OpenAIChat:
    given = ["product_db.path=catalogs", "llm.provider=openai", "llm.model=m", *overrides]
    settings = load_settings(merchant="abt", market="US", environ={}, overrides=given)
    made = Bootstrap(settings, merchant="abt", market="US").get_llm()
    assert isinstance(made, OpenAIChat)
    return made


def test_without_limits_calls_are_not_paced() -> None:
    made = chat()
    assert (made.limiter, made.policy) == (LocalLimiter(), RetryPolicy())


def test_limits_hold_for_the_machine() -> None:
    made = chat("llm.requests_per_minute=600", "llm.tokens_per_minute=90000")
    assert isinstance(made.limiter, HostLimiter)
    assert made.limiter.rates == Rates(600, 90_000)
    assert made.limiter == chat("llm.requests_per_minute=600", "llm.tokens_per_minute=90000").limiter
    other = chat("llm.requests_per_minute=600", "llm.base_url=http://other/v1").limiter
    assert isinstance(other, HostLimiter)
    assert other.path != made.limiter.path, "each server has its own limit"


def test_limits_are_shared_through_redis() -> None:
    made = chat("llm.requests_per_minute=600", "llm.redis_url=redis://:secret@h/0")
    assert isinstance(made.limiter, RedisLimiter)
    assert made.limiter.rates == Rates(600)
    assert "secret" not in repr(made.limiter)
    with pytest.raises(ConfigError, match="llm.redis_url"):
        chat("llm.redis_url=http://h")


def test_jobs_that_share_redis_share_leases() -> None:
    given = ["product_db.path=catalogs"]
    url = "llm.redis_url=redis://:secret@h/0"
    for overrides, expected in ((given, None), ([*given, url], RedisLeases("redis://:secret@h/0"))):
        settings = load_settings(merchant="abt", market="US", environ={}, overrides=overrides)
        bootstrap = Bootstrap(settings, merchant="abt", market="US")
        assert bootstrap.leases == expected
        assert "secret" not in repr(bootstrap.leases)
        bootstrap.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:12pa#ss@h/0",
        "redis://:12pa/ss@h/0",
        "redis://:12/4455@h/0",
        "redis://user:1244?ss@h/0",
        "redis://:1244?ss=5@h/0",
        "redis://h:port/0",
        "redis://h/recommendations",
        "redis://h/0?socket_timeout=12pa",
        "redis://h/0?12pa=1",
        "redis://h..x/0",
    ],
)
def test_a_redis_address_that_cannot_be_read_is_refused_and_not_shown(url: str) -> None:
    given = ["product_db.path=catalogs", f"llm.redis_url={url}"]
    settings = load_settings(merchant="abt", market="US", environ={}, overrides=given)
    bootstrap = Bootstrap(settings, merchant="abt", market="US")
    for made in (lambda: chat(given[1]), bootstrap.get_session, lambda: RedisLeases(url)):
        with pytest.raises(ConfigError, match="cannot be read, and is not shown") as refused:
            made()
        assert not any(part in str(refused.value) for part in ("12", "pa#", "44", "ss@", "recomm"))
    bootstrap.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:1/2",
        "rediss://u:p%23%40@h/",
        "redis://[::1]:6379/0?db=1",
        "unix:///tmp/a@b.sock?db=1",
    ],
)
def test_a_redis_address(url: str) -> None:
    assert RedisLeases(url).url == url


def test_time_and_attempts() -> None:
    made = chat("llm.timeout_s=5", "llm.deadline_s=20", "llm.attempts=2")
    assert made.policy == RetryPolicy(attempts=2, timeout_s=5, deadline_s=20)


def test_calls_by_batch(tmp_path: Path) -> None:
    given = ["product_db.path=catalogs", "llm.provider=openai", "llm.model=m", f"warehouse={tmp_path}"]
    given += [
        "llm.mode=batch",
        "llm.batch_wait_s=60",
        "llm.batch_price=0.25",
        "llm.price={input: 4, output: 8}",
    ]
    settings = load_settings(merchant="abt", market="US", environ={}, overrides=given)
    made = Bootstrap(settings, merchant="abt", market="US").get_llm()
    assert isinstance(made, OpenAIBatch)
    assert (made.wait_s, str(made.folder), made.price) == (60.0, f"{tmp_path}/cache/batches", Price.of(1, 2))
    assert made.identity == chat().identity
    with pytest.raises(ConfigError, match="needs provider 'openai' when mode is 'batch'"):
        load_settings(merchant="abt", market="US", environ={}, overrides=["llm.mode=batch"])
