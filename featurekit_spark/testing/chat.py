"""A chat server on a loopback port that speaks the OpenAI protocol, answers as told, and remembers what it
was asked.

    with chat_server() as server:
        model = OpenAIChat(server.url, "m", api_key_env="ANY")

Being a real server, it serves calls from Spark workers and from jobs in processes of their own as well. As a process
of its own (`python -m featurekit_spark.testing.chat`) it answers as the offline stand-in and prints its URL; a GET of
the URL gives `{"requests": n}`, and it ends with its stdin.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from featurekit_spark.llm.offline import OfflineLLM
from featurekit_spark.testing.batches import BatchDepartment
from featurekit_spark.testing.loopback import JsonHandler, served

__all__ = ["ChatServer", "chat_reply", "chat_server", "offline_answer"]


def chat_reply(text: str | None = "hello", **message: Any) -> dict[str, Any]:
    """The body of an answer; `message` goes into its message, but for `finish_reason`. 7 + 3 tokens."""
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": message.pop("finish_reason", "stop"),
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


@dataclass
class ChatServer:
    """Answers come from `script` in turn, then from `answer(prompt)`; `delay_s` holds each of them back. `cut`: prompts
    whose answers end by `max_tokens`."""

    url: str = ""
    answer: Callable[[str], str] = lambda prompt: "hello"
    script: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    delay_s: float = 0.0
    cut: frozenset[str] = frozenset()
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: Any = field(default_factory=threading.Lock)
    batches: BatchDepartment = field(default_factory=BatchDepartment)

    def reply(self, prompt: str) -> dict[str, Any]:
        """The body of the answer to a prompt."""
        return chat_reply(self.answer(prompt), finish_reason="length" if prompt in self.cut else "stop")

    def then(self, status: int, body: Any, **headers: str) -> ChatServer:
        """Answer one more request so; underscores in header names stand for dashes."""
        self.script.append((status, {name.replace("_", "-"): text for name, text in headers.items()}, body))
        return self

    def fails(self, status: int, code: str = "", **headers: str) -> ChatServer:
        """Answer one more request with an error."""
        return self.then(status, {"error": {"message": "no", "type": "t", "code": code}}, **headers)

    @property
    def prompts(self) -> list[str]:
        """The user messages, in the order in which they came."""
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def chat_server(answer: Callable[[str], str] | None = None, *, port: int = 0) -> Iterator[ChatServer]:
    """A running server; `answer` makes the text of an answer from the user message. Port 0: any free one."""
    chat = ChatServer() if answer is None else ChatServer(answer=answer)

    def of_a_line(request: dict[str, Any]) -> tuple[int, Any]:
        return 200, chat.reply(request["messages"][-1]["content"])

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            if not self.by_batch("GET"):
                self.reply(200, {}, {"requests": len(chat.requests)})

        def do_DELETE(self) -> None:
            self.by_batch("DELETE")

        def by_batch(self, verb: str) -> bool:
            """Answer a call of the batch API."""
            path = self.path.partition("?")[0].removeprefix("/v1/")
            if path.split("/")[0] not in ("files", "batches"):
                return False
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            kind = self.headers.get("content-type") or ""
            try:
                status, reply = chat.batches.serve(verb, path, sent, kind, of_a_line)
            except ConnectionError:
                self.close_connection = True
            else:
                self.reply(status, {}, reply)
            return True

        def do_POST(self) -> None:
            if self.by_batch("POST"):
                return
            body = self.body()
            with chat.lock:
                chat.requests.append(body)
                chat.keys.append(self.headers["authorization"])
                chat.in_flight += 1
                chat.most_in_flight = max(chat.most_in_flight, chat.in_flight)
                scripted = chat.script.pop(0) if chat.script else None
            prompt = body["messages"][-1]["content"]
            status, headers, reply = scripted or (200, {}, chat.reply(prompt))
            if chat.delay_s:
                time.sleep(chat.delay_s)
            with chat.lock:
                chat.in_flight -= 1
            self.reply(status, headers, reply)

    with served(Handler, port=port) as url:
        chat.url = f"{url}/v1"
        yield chat


def offline_answer(prompt: str, *, suggestions: int = 3) -> str:
    """What the offline stand-in answers, without an event loop."""
    try:
        OfflineLLM(suggestions).complete(prompt).send(None)
    except StopIteration as done:  # it waits for nothing, so that its first step is its last
        return str(done.value.text)
    raise AssertionError("the stand-in waits for nothing")


def _main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m featurekit_spark.testing.chat",
        description="Serves the offline stand-in as an OpenAI-compatible model until stdin is closed.",
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    options = parser.parse_args(arguments)
    with chat_server(offline_answer, port=options.port) as chat:
        chat.delay_s = options.delay_ms / 1000
        print(chat.url, flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
