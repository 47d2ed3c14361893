"""A chat server on a loopback port that speaks the OpenAI protocol, answers as told, and remembers what it
was asked.

    with chat_server() as server:
        model = OpenAIChat(server.url, "m", api_key_env="ANY")

Being a real server, it serves calls from Spark workers and from jobs in processes of their own as well.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["ChatServer", "chat_reply", "chat_server"]


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
    """Answers come from `script` in turn, then from `answer(prompt)`; `delay_s` holds each of them back."""

    url: str = ""
    answer: Callable[[str], str] = lambda prompt: "hello"
    script: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: Any = field(default_factory=threading.Lock)

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
def chat_server(answer: Callable[[str], str] | None = None) -> Iterator[ChatServer]:
    """A running server; `answer` makes the text of an answer from the user message."""
    chat = ChatServer() if answer is None else ChatServer(answer=answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with chat.lock:
                chat.requests.append(body)
                chat.keys.append(self.headers["authorization"])
                chat.in_flight += 1
                chat.most_in_flight = max(chat.most_in_flight, chat.in_flight)
                scripted = chat.script.pop(0) if chat.script else None
            prompt = body["messages"][-1]["content"]
            status, headers, reply = scripted or (200, {}, chat_reply(chat.answer(prompt)))
            time.sleep(chat.delay_s)
            with chat.lock:
                chat.in_flight -= 1
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, text in {"content-type": "application/json", **headers}.items():
                self.send_header(name, text)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield chat
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
