"""A model server for load: cheap enough to serve hundreds of calls a second beside its client, and as unreliable as
it is told to be.

    with load_server(delay_s=0.1, busy=0.3) as server:
        model = OpenAIChat(server.url, "m", api_key_env="ANY")

It is a process of its own (`python -m featurekit_spark.testing.load`), which ends with its stdin. What it counts is
in `server.seen()`. It knows just enough of HTTP/1.1 and of the OpenAI protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

__all__ = ["LoadServer", "Manners", "Seen", "load_server"]

_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_STATUS = {200: b"OK", 429: b"Too Many Requests", 500: b"Internal Server Error"}


@dataclass(frozen=True)
class Manners:
    """How the server answers: after `delay_s`, at most `per_minute` calls (0: any number) of which a second's worth may
    come at once, and with these shares, drawn by `seed`, of calls that get a 429, get a 500, are left without an
    answer, get half an answer, or are refused by the model. `retry_after_s` goes with each 429."""

    delay_s: float = 0.0
    per_minute: float = 0.0
    busy: float = 0.0
    broken: float = 0.0
    hang: float = 0.0
    malformed: float = 0.0
    refusal: float = 0.0
    retry_after_s: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """What arrived: `requests` in `seconds` from the first to the last, by how they were answered, also per second
    since the first; distinct prompts, and those of them that got more than one answer that had to be paid for."""

    requests: int
    seconds: float
    most_in_flight: int
    prompts: int
    paid_twice: int
    kinds: dict[str, int]
    per_second: list[dict[str, int]]


@dataclass
class _Log:
    manners: Manners
    rng: random.Random
    kinds: Counter[str] = field(default_factory=Counter)
    per_second: list[Counter[str]] = field(default_factory=list)
    prompts: set[str] = field(default_factory=set)
    paid: Counter[str] = field(default_factory=Counter)
    first: float = 0.0
    last: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0
    paid_off: float = 0.0

    def kind(self, now: float) -> str:
        """How a call is answered."""
        manners = self.manners
        if manners.per_minute:
            each = 60 / manners.per_minute
            if max(self.paid_off, now) + each > now + max(1.0, each):
                return "limited"
            self.paid_off = max(self.paid_off, now) + each
        drawn = self.rng.random()
        for kind in ("busy", "broken", "hang", "malformed", "refusal"):
            drawn -= getattr(manners, kind)
            if drawn < 0:
                return kind
        return "answered"

    def arrived(self, prompt: str) -> str:
        now = time.monotonic()
        self.first = self.first or now
        self.last = now
        kind = self.kind(now)
        self.kinds[kind] += 1
        while len(self.per_second) <= now - self.first:
            self.per_second.append(Counter())
        self.per_second[int(now - self.first)][kind] += 1
        self.prompts.add(prompt)
        if kind in ("answered", "refusal"):
            self.paid[prompt] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return kind

    def seen(self) -> Seen:
        return Seen(
            sum(self.kinds.values()),
            self.last - self.first,
            self.most_in_flight,
            len(self.prompts),
            sum(count > 1 for count in self.paid.values()),
            dict(self.kinds),
            [dict(second) for second in self.per_second],
        )


class _Connection(asyncio.Protocol):
    """One kept connection; requests on it come one after the other."""

    def __init__(self, log: _Log) -> None:
        self.log, self.buffer, self.busy = log, bytearray(), False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:  # its client gave up waiting
            self.busy = False
            self.log.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        found = _LENGTH.search(self.buffer, 0, end)
        length = end + 4 + (int(found[1]) if found else 0)
        if len(self.buffer) < length:
            return
        body = bytes(self.buffer[end + 4 : length])
        asked = self.buffer.startswith(b"GET")
        del self.buffer[:length]
        if asked:
            self._reply(200, json.dumps(asdict(self.log.seen())).encode())
            return
        prompt = json.loads(body)["messages"][-1]["content"]
        kind = self.log.arrived(prompt)
        self.busy = True
        if kind != "hang":
            delay = 0.0 if kind in ("busy", "limited") else self.log.manners.delay_s
            asyncio.get_running_loop().call_later(delay, self._answer, kind, prompt)

    def _answer(self, kind: str, prompt: str) -> None:
        if not self.busy:
            return
        self.busy = False
        self.log.in_flight -= 1
        match kind:
            case "busy" | "limited":
                body = b'{"error":{"message":"slow down","code":"rate_limit_exceeded"}}'
                self._reply(429, body, b"retry-after: %g\r\n" % self.log.manners.retry_after_s)
            case "broken":
                self._reply(500, b'{"error":{"message":"oops"}}')
            case "malformed":
                self._reply(200, b'{"choices":[{"mess')
            case "refusal":
                self._reply(200, _chat(None, "I will not"))
            case _:
                self._reply(200, _chat(f"1. like {prompt}", None))

    def _reply(self, status: int, body: bytes, headers: bytes = b"") -> None:
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n%s"
            % (status, _STATUS[status], len(body), headers, body)
        )


def _chat(text: str | None, refusal: str | None) -> bytes:
    return (
        b'{"id":"1","object":"chat.completion","created":0,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
        b'"message":{"role":"assistant","content":%s,"refusal":%s}}],'
        b'"usage":{"prompt_tokens":20,"completion_tokens":10,"total_tokens":30}}'
        % (json.dumps(text).encode(), json.dumps(refusal).encode())
    )


@dataclass(frozen=True)
class LoadServer:
    """A running server; `url` ends in `/v1`."""

    url: str

    def seen(self) -> Seen:
        """What it has seen so far."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url, timeout=30) as answer:
            return Seen(**json.load(answer))


@contextmanager
def load_server(manners: Manners | None = None, **options: float) -> Iterator[LoadServer]:
    """A server in a process of its own; `options` as the fields of `Manners`."""
    manners = manners or Manners(**options)  # type: ignore[arg-type]
    command = [sys.executable, "-m", __name__]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in asdict(manners).items()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield LoadServer(server.stdout.readline().strip())
        finally:
            server.stdin.close()
            server.wait(timeout=30)


async def _serve(manners: Manners) -> None:
    log = _Log(manners, random.Random(manners.seed))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(log), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m featurekit_spark.testing.load",
        description="Serves an unreliable OpenAI-compatible model until stdin is closed.",
    )
    for one in fields(Manners):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    asyncio.run(_serve(Manners(**vars(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
