from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from featurekit_spark.errors import (
    BudgetError,
    BuildError,
    ContextError,
    FeaturekitError,
    ServiceError,
    UsageError,
)
from featurekit_spark.llm import Completion, OpenAIChat
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import LocalLimiter, Rates
from featurekit_spark.paid.retry import FailureKind, failure_of


def model(server: Any, **options: Any) -> OpenAIChat:
    """A model that waits little between attempts."""
    url = server if isinstance(server, str) else server.url
    chat = OpenAIChat(url, "m", api_key_env="TEST_CHAT_KEY", **options)
    chat.policy = replace(chat.policy, first_wait_s=0.01)
    return chat


def asked(chat: OpenAIChat, work: Callable[[OpenAIChat], Awaitable[Any]]) -> Any:
    """Run `work` and close the client it made, so that no socket outlives the test."""

    async def run() -> Any:
        try:
            return await work(chat)
        finally:
            await chat.aclose()

    return asyncio.run(run())


def test_the_prompt_is_sent_byte_for_byte_and_usage_comes_back(server: Any) -> None:
    prompt = '  get {title}\n\tfor \u00fc\U0001f600 \\ "x"  '
    answer = asked(
        model(server), lambda m: m.complete(prompt, system="a list", temperature=0.0, max_tokens=5)
    )
    assert answer == Completion("hello", 7, 3, usd=None, finish_reason="stop")
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "a list"}, {"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": 5,
        }
    ]
    assert server.keys == ["Bearer sk-secret"]


def test_a_process_that_closes_nothing_ends_in_silence(server: Any) -> None:
    """aiohttp complains of connections that nobody closed."""
    code = (
        "from featurekit_spark import aio; from featurekit_spark.llm import OpenAIChat; import gc\n"
        f"kept, dropped = [OpenAIChat({server.url!r}, name, api_key_env='TEST_CHAT_KEY') for name in 'ab']\n"
        "print(aio.run(kept.complete('p')).text, aio.run(dropped.complete('p')).text)\n"
        "del dropped; gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("hello hello\n", "", 0)


def test_what_is_not_set_is_not_sent(server: Any) -> None:
    asked(model(server), lambda m: m.complete("p"))
    assert server.requests == [{"model": "m", "messages": [{"role": "user", "content": "p"}]}]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(server: Any, status: int) -> None:
    server.fails(status).fails(status)
    assert asked(model(server), lambda m: m.complete("p")).text == "hello"
    assert len(server.requests) == 3


def test_retry_after_is_honoured(server: Any) -> None:
    server.fails(429, retry_after="0.4")
    start = time.monotonic()
    asked(model(server), lambda m: m.complete("p"))
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(
    ("status", "code", "kind", "calls"),
    [
        (400, "context_length_exceeded", BuildError, 1),
        (401, "invalid_api_key", BuildError, 1),
        (404, "model_not_found", BuildError, 1),
        (429, "insufficient_quota", BudgetError, 1),
        (400, "billing_hard_limit_reached", BudgetError, 1),
        (503, "", ServiceError, 3),
    ],
)
def test_errors_say_whether_trying_again_helps(
    server: Any, status: int, code: str, kind: type[FeaturekitError], calls: int
) -> None:
    for _ in range(calls):
        server.fails(status, code)
    with pytest.raises(kind, match=f"m at {server.url}.*status {status}"):
        asked(model(server, attempts=3), lambda m: m.complete("p"))
    assert len(server.requests) == calls


def test_answers_that_are_none(server: Any, reply: Any) -> None:
    chat = model(server, attempts=2)
    server.then(200, reply(None, refusal="I will not"))
    with pytest.raises(BuildError, match="refused: I will not"):
        asked(chat, lambda m: m.complete("p"))
    server.then(200, reply("cut", finish_reason="content_filter"))
    with pytest.raises(BuildError, match="content filter"):
        asked(chat, lambda m: m.complete("p"))
    server.then(200, b"{malformed").then(200, reply("good"))
    assert asked(chat, lambda m: m.complete("p")).text == "good"
    server.then(200, {"choices": []}).then(200, {"choices": []})
    with pytest.raises(ServiceError, match="no choices"):
        asked(chat, lambda m: m.complete("p"))
    server.then(200, reply("cut", finish_reason="length"))
    assert asked(chat, lambda m: m.complete("p")).finish_reason == "length"


def test_a_server_that_hangs_or_is_not_there(server: Any) -> None:
    server.delay_s = 1.0
    with pytest.raises(ServiceError, match="no answer in time"):
        asked(model(server, attempts=1, timeout_s=0.1), lambda m: m.complete("p"))
    gone = model("http://127.0.0.1:9/v1", attempts=2)
    with pytest.raises(ServiceError, match="attempt 2 of 2"):
        asked(gone, lambda m: m.complete("p"))


def test_calls_in_flight_are_bounded(server: Any) -> None:
    server.delay_s = 0.03

    async def many(chat: OpenAIChat) -> None:
        await asyncio.gather(*(chat.complete(str(i)) for i in range(20)))

    asked(model(server, concurrency=4), many)
    assert len(server.requests) == 20
    assert server.most_in_flight <= 4


def test_a_prompt_that_cannot_be_sent_is_not_tried_again(server: Any) -> None:
    with pytest.raises(BuildError, match="cannot be sent: UnicodeEncodeError"):
        asked(model(server), lambda m: m.complete("half a pair \ud83d"))
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "code", "blamed"),
    [
        (400, "context_length_exceeded", True),
        (400, "model_not_found", False),
        (400, "invalid_api_key", False),
        (401, "", False),
        (403, "", False),
        (404, "", False),
    ],
)
def test_only_what_blames_the_request_is_its_fault(server: Any, status: int, code: str, blamed: bool) -> None:
    server.fails(status, code)
    with pytest.raises(BuildError) as told:
        asked(model(server), lambda m: m.complete("p"))
    assert told.value.blames_request is blamed


def test_a_header_that_cannot_be_sent_is_not_the_fault_of_the_prompt(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org\n")
    with pytest.raises(BuildError, match="cannot be sent: ValueError") as told:
        asked(model(server), lambda m: m.complete("p"))
    assert not told.value.blames_request
    monkeypatch.delenv("OPENAI_ORG_ID")
    with pytest.raises(BuildError, match="cannot be sent: UnicodeEncodeError") as told:
        asked(model(server), lambda m: m.complete("half a pair \ud83d"))
    assert told.value.blames_request
    assert server.requests == []


@pytest.mark.parametrize("key", ["sk-abc\n", "sk-\u201cabc\u201d", "sk-\x07abc"])
def test_what_cannot_be_a_key_is_told_and_not_shown(
    server: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", key)
    with pytest.raises(ContextError, match="TEST_CHAT_KEY holds is no API key for m at") as told:
        asked(model(server), lambda m: m.complete("p"))
    assert "abc" not in str(told.value)
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://me:s3cret@host/v1",
        "https://s3cret@host/v1",
        "https://:s3cret@host:80/v1",
        "https://me:a/s3cret@host/v1",
        "https://me:12#s3cret@host/v1",
        "https://me:a?s3cret@host/v1",
    ],
)
def test_a_url_with_a_password_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="base_url names a user") as told:
        OpenAIChat(url, "m")
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize("url", ["https://host:8080/v1/@me/", "https://host/a:b/@me", "http://[::1]:80/v1"])
def test_other_urls_are_not(url: str) -> None:
    assert OpenAIChat(url, "m").base_url == url.rstrip("/")


def test_a_refusal_is_told_with_what_it_cost(server: Any, reply: Any) -> None:
    server.then(200, reply(None, refusal="I will not"))
    with pytest.raises(BuildError) as told:
        asked(model(server), lambda m: m.complete("p"))
    assert told.value.tokens == 10
    failure = failure_of(told.value)
    assert failure is not None
    assert (failure.kind, failure.attempts) == (FailureKind.TERMINAL, 1)


def test_a_wrong_key_stops_the_rest(server: Any) -> None:
    server.script = [(401, {}, {"error": {"message": "no", "code": "invalid_api_key"}})] * 100

    async def many(chat: OpenAIChat) -> list[Any]:
        return await asyncio.gather(*(chat.complete(str(i)) for i in range(100)), return_exceptions=True)

    errors = asked(model(server, concurrency=4), many)
    assert 20 <= len(server.requests) <= 23
    assert {type(error) for error in errors} == {BuildError, ServiceError}
    assert "calls in a row failed (the last: status 401" in str(errors[-1])


def test_calls_are_paced(server: Any) -> None:
    async def many(chat: OpenAIChat) -> float:
        start = time.monotonic()
        await asyncio.gather(*(chat.complete(str(i)) for i in range(10)))
        return time.monotonic() - start

    paced = model(server, limiter=LocalLimiter(Rates(requests_per_minute=1200, burst_s=0)))
    assert asked(paced, many) >= 9 / 20


def test_tokens_are_estimated_and_then_corrected(server: Any) -> None:
    """10 tokens each by the server's count: after the first answer about as many are expected."""

    async def many(chat: OpenAIChat) -> float:
        await chat.complete("the first one")
        start = time.monotonic()
        for i in range(10):
            await chat.complete(str(i))
        return time.monotonic() - start

    limiter = LocalLimiter(Rates(tokens_per_minute=12_000, burst_s=0))
    assert 0.35 <= asked(model(server, limiter=limiter), many) < 4


def test_a_share_of_a_model(server: Any, tmp_path: Path) -> None:
    chat = model(server, concurrency=10, limiter=LocalLimiter(Rates(600)), timeout_s=7)
    share = chat.divided(4)
    assert (share.concurrency, share.limiter) == (2, LocalLimiter(Rates(150)))
    assert (share.identity, share.policy, chat.concurrency) == (chat.identity, chat.policy, 10)
    assert chat.divided(100).concurrency == 1
    host = model(server, limiter=HostLimiter(str(tmp_path), "m", Rates(600)))
    assert host.divided(4, one_host=True).limiter == host.limiter
    assert asked(share, lambda m: m.complete("p")).text == "hello"


def test_tasks_of_a_process_share_what_travelled(server: Any) -> None:
    chat = model(server, concurrency=3)
    one, other = (pickle.loads(pickle.dumps(chat)) for _ in range(2))
    assert one is other and one is not chat
    assert pickle.loads(pickle.dumps(model(server, concurrency=4))) is not one


def test_the_key_stays_in_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = model(server)
    asked(chat, lambda m: m.complete("p"))
    assert "sk-secret" not in repr(chat)
    for dump in (pickle.dumps(chat), cloudpickle.dumps(chat)):
        assert b"sk-secret" not in dump
        again = pickle.loads(dump)
        assert again.identity == chat.identity
        assert asked(again, lambda m: m.complete("p")).text == "hello"
    monkeypatch.delenv("TEST_CHAT_KEY")
    with pytest.raises(ContextError, match="TEST_CHAT_KEY is not set"):
        asked(model(server), lambda m: m.complete("p"))


def test_against_llmock(llmock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CHAT_KEY", "k")
    chat = OpenAIChat(llmock.base_url("openai"), "gpt-4o-mini", api_key_env="TEST_CHAT_KEY")
    llmock.rate_limit(times=2, retry_after=0.1).reply("1. a lamp")
    answer = asked(chat, lambda m: m.complete("p", system="s"))
    assert answer.text == "1. a lamp"
    assert answer.tokens > 0
    llmock.context_overflow()
    with pytest.raises(BuildError, match="maximum context length"):
        asked(chat, lambda m: m.complete("p"))
