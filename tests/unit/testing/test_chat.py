"""The chat server as a process of its own: what it answers, counts, and how it ends."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from featurekit_spark.testing.chat import offline_answer

PROMPT = "get recommendations for Oak Desk Lamp, 12 V, Black"


def post(connection: http.client.HTTPConnection, prompt: str) -> Any:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]})
    connection.request("POST", "/v1/chat/completions", body, {"authorization": "Bearer any"})
    return json.loads(connection.getresponse().read())


def requests(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/v1")
    found: int = json.loads(connection.getresponse().read())["requests"]
    return found


def test_a_server_process_answers_counts_and_ends_with_its_stdin() -> None:
    command = [sys.executable, "-m", "featurekit_spark.testing.chat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        url = urlsplit(server.stdout.readline().strip())
        connection = http.client.HTTPConnection(url.hostname or "", url.port)
        assert requests(connection) == 0
        answer = post(connection, PROMPT)["choices"][0]["message"]["content"]
        assert answer == offline_answer(PROMPT) and answer.count("\n") == 3

        start = time.perf_counter()
        for number in range(100):
            post(connection, f"{PROMPT} {number}")
        seconds = time.perf_counter() - start
        assert requests(connection) == 101
        assert seconds < 2, "a kept connection must not wait for acknowledgements, 40 ms each"

        connection.close()
        server.stdin.close()
        assert server.wait(timeout=20) == 0
