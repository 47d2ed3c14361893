"""Files of answers, whatever is in them: each request ends in one outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark import aio
from featurekit_spark.llm.openai import OpenAIChat
from featurekit_spark.llm.openai_batch import BatchClient, BatchState, Progress, request_id
from featurekit_spark.testing.chat import ChatServer, chat_reply, chat_server

IDS = [f"r{i}" for i in range(6)]


def _written(name: str, fate: str) -> bytes:
    told: dict[str, Any] = {"id": "x", "custom_id": name, "response": None, "error": None}
    match fate:
        case "answer":
            told["response"] = {"status_code": 200, "body": chat_reply(f"of {name}")}
        case "refused":
            told["response"] = {"status_code": 400, "body": {"error": {"code": "c", "message": "no"}}}
        case "expired":
            told["error"] = {"code": "batch_expired", "message": "late"}
        case "torn":
            return json.dumps(told).encode()[:-9]
    return json.dumps(told).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server() as chat:
        yield chat


fates = st.sampled_from(["answer", "refused", "expired", "torn"])
files = st.lists(st.tuples(st.sampled_from([*IDS, "nobody's"]), fates), max_size=15)


@settings(max_examples=60, deadline=None)
@given(files, files)
def test_each_request_has_one_outcome_whatever_the_files_hold(
    server: ChatServer, good: list[tuple[str, str]], bad: list[tuple[str, str]]
) -> None:
    chat = OpenAIChat(server.url, "m", api_key_env="PATH")
    server.batches.files.update(
        {name: b"\n".join(_written(*line) for line in lines) for name, lines in (("out", good), ("err", bad))}
    )

    async def read() -> Any:
        try:
            state = BatchState("b", Progress.COMPLETED, files=("out", "err"))
            return await BatchClient(chat).lines(state, IDS)
        finally:
            await chat.aclose()

    found = aio.run(read())
    assert [line.custom_id for line in found] == IDS, "as they were handed in"
    for line in found:
        told = [fate for name, fate in (*good, *bad) if name == line.custom_id and fate != "torn"]
        assert (line.body is not None) == ("answer" in told)
        assert (line.kind is None) == (line.body is not None)
        if line.body is not None:
            assert json.loads(line.body) == chat_reply(f"of {line.custom_id}")
        elif not told:
            assert line.kind.value == "retryable" and "completed" in line.message


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_a_requests_name_is_of_its_content(body: dict[str, Any]) -> None:
    try:
        name = request_id("m", body)
    except ValueError:  # half of a surrogate pair
        return
    assert request_id("m", dict(reversed(body.items()))) == name
    assert request_id("another", body) != name
    assert request_id("m", {**body, "one more": 1}) != name
