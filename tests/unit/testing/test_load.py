"""The load server counts and misbehaves as it is told to."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

from featurekit_spark.testing.load import LoadServer, load_server


def asked(server: LoadServer, prompts: list[str]) -> list[tuple[int, str | None, bytes]]:
    """(status, Retry-After, body) of calls on one connection."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=5)
    answers = []
    try:
        for prompt in prompts:
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]})
            connection.request("POST", "/v1/chat/completions", body)
            answer = connection.getresponse()
            answers.append((answer.status, answer.getheader("retry-after"), answer.read()))
    finally:
        connection.close()
    return answers


def test_a_good_server_answers_and_counts() -> None:
    with load_server() as server:
        answers = asked(server, ["a", "b\u00fc\n", "a"])
        seen = server.seen()
    assert [status for status, _, _ in answers] == [200] * 3
    texts = [json.loads(body)["choices"][0]["message"]["content"] for _, _, body in answers]
    assert texts == ["1. like a", "1. like b\u00fc\n", "1. like a"]
    assert (seen.requests, seen.prompts, seen.paid_twice) == (3, 2, 1)
    assert seen.kinds == {"answered": 3}
    assert seen.most_in_flight == 1


def test_shares_are_drawn_by_a_seed() -> None:
    runs = []
    for _ in range(2):
        with load_server(busy=0.3, broken=0.2, malformed=0.1, refusal=0.1, seed=7) as server:
            runs.append([status for status, _, _ in asked(server, [str(i) for i in range(100)])])
            kinds = server.seen().kinds
    assert runs[0] == runs[1]
    assert sum(kinds.values()) == 100
    assert 20 <= kinds["busy"] <= 40 and 10 <= kinds["broken"] <= 30
    assert runs[0].count(429) == kinds["busy"] and runs[0].count(500) == kinds["broken"]


def test_a_limit_lets_a_second_s_worth_through_at_once() -> None:
    with load_server(per_minute=300, retry_after_s=2) as server:
        answers = asked(server, [str(i) for i in range(12)])
    assert [status for status, _, _ in answers][:5] == [200] * 5
    assert {(status, wait) for status, wait, _ in answers[7:]} == {(429, "2")}
