"""The batch API of the OpenAI protocol for a server on loopback: files and batches that are answered as told.

Deterministic: a batch ends after so many questions about it, not after some time. Knows requests and answers; HTTP is
the server's affair.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from typing import Any

__all__ = ["BatchDepartment"]

_ENDED = ("completed", "failed", "expired", "cancelled")
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@dataclass
class BatchDepartment:
    """`polls`: how many questions find a batch unfinished. `fails`: by user message, the (status, error code) that its
    line ends in. `expires`: user messages that the batch has no time for. `refuses`: an error code with which each
    batch is refused as a whole. `written`: what becomes of the lines of a file of answers or errors. `before` and
    `after` are called with `POST /files` and the like, and may raise ConnectionError, which loses the connection:
    nothing was done yet, or all was. `available`: without it there is no batch API."""

    polls: int = 1
    fails: dict[str, tuple[int, str]] = field(default_factory=dict)
    expires: set[str] = field(default_factory=set)
    refuses: str | None = None
    available: bool = True
    before: Callable[[str], None] = lambda call: None
    after: Callable[[str], None] = lambda call: None
    files: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    written: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda lines: lines
    calls: list[str] = field(default_factory=list)
    _made: int = 0
    _asked: dict[str, int] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def prompts(self) -> list[str]:
        """The user messages of all lines of all batches, in the order in which they were handed in."""
        return list(self.lines)

    def serve(self, verb: str, path: str, body: bytes, content_type: str, answer: Answer) -> tuple[int, Any]:
        """Status and body for a call below /v1: `files...` or `batches...`. `answer`: of a chat completion."""
        name = f"{verb} /{path.split('/')[0]}"
        with self._lock:
            self.calls.append(name)
            if not self.available:
                return 404, _error("not_found", "no such path")
            self.before(name)
            reply = self._served(verb, path.split("/"), body, content_type, answer)
            self.after(name)
            return reply

    def _served(
        self, verb: str, path: list[str], body: bytes, content_type: str, answer: Answer
    ) -> tuple[int, Any]:
        match verb, path:
            case "POST", ["files"]:
                return 200, self._keep(*_uploaded(body, content_type), "batch")
            case "GET", ["files"]:
                kept = [self._told(file_id) for file_id in reversed(self.names)]
                return 200, {"object": "list", "data": kept, "has_more": False}
            case "DELETE", ["files", file_id] if file_id in self.files:
                del self.files[file_id], self.names[file_id]
                return 200, {"id": file_id, "object": "file", "deleted": True}
            case "GET", ["files", file_id, "content"] if file_id in self.files:
                return 200, self.files[file_id]
            case "POST", ["batches"]:
                return 200, self._create(json.loads(body))
            case "GET", ["batches"]:
                newest = list(reversed(self.batches.values()))
                return 200, {"object": "list", "data": newest, "has_more": False}
            case "POST", ["batches", batch_id, "cancel"] if batch_id in self.batches:
                return 200, self._cancel(self.batches[batch_id])
            case "GET", ["batches", batch_id] if batch_id in self.batches:
                return 200, self._advance(self.batches[batch_id], answer)
            case _:
                return 404, _error("not_found", "no such object")

    def _keep(self, content: bytes, name: str, purpose: str) -> dict[str, Any]:
        self._made += 1
        file_id = f"file-{self._made}"
        self.files[file_id], self.names[file_id] = content, name
        return {**self._told(file_id), "purpose": purpose}

    def _told(self, file_id: str) -> dict[str, Any]:
        told = {
            "id": file_id,
            "object": "file",
            "bytes": len(self.files[file_id]),
            "created_at": int(time.time()),
        }
        return {**told, "filename": self.names[file_id], "purpose": "batch", "status": "processed"}

    def _cancel(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] not in _ENDED:
            batch["status"] = "cancelled"
        return batch

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        requests = self._requests(asked["input_file_id"])
        self.lines += [line["body"]["messages"][-1]["content"] for line in requests]
        batch_id, now = f"batch_{len(self.batches) + 1}", int(time.time())
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": asked["endpoint"],
            "input_file_id": asked["input_file_id"],
            "completion_window": asked["completion_window"],
            "metadata": asked.get("metadata"),
            "status": "validating",
            "created_at": now,
            "expires_at": now + 86_400,
            "request_counts": {"total": len(requests), "completed": 0, "failed": 0},
        }
        return self.batches[batch_id]

    def _requests(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[file_id].splitlines()]

    def _advance(self, batch: dict[str, Any], answer: Answer) -> dict[str, Any]:
        asked = self._asked[batch["id"]] = self._asked.get(batch["id"], 0) + 1
        if batch["status"] in _ENDED:
            return batch
        if asked <= self.polls:
            batch["status"] = "in_progress"
            return batch
        requests = self._requests(batch["input_file_id"])
        if self.refuses is not None:
            fault = {"code": self.refuses, "message": "refused", "line": None, "param": None}
            batch.update(status="failed", errors={"object": "list", "data": [fault]})
            return batch
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for line in reversed(requests):  # the provider keeps no order
            self._answer(line, answer, good, bad)
        for name, lines in (("output_file_id", good), ("error_file_id", bad)):
            if lines:
                content = _jsonl(self.written(lines))
                batch[name] = self._keep(content, f"{batch['id']}_{name}.jsonl", "batch_output")["id"]
        batch["status"] = "expired" if self.expires & set(map(_prompt, requests)) else "completed"
        counts = {"total": len(requests), "completed": len(good), "failed": len(bad)}
        batch["request_counts"] = counts
        return batch

    def _answer(
        self, line: dict[str, Any], answer: Answer, good: list[dict[str, Any]], bad: list[dict[str, Any]]
    ) -> None:
        prompt, told = _prompt(line), {"id": f"batch_req_{line['custom_id']}", "custom_id": line["custom_id"]}
        if prompt in self.expires:
            late = {"code": "batch_expired", "message": "This request could not be executed in time."}
            bad.append({**told, "response": None, "error": late})
            return
        status, code = self.fails.get(prompt, (200, ""))
        if status == 200:
            status, body = answer(line["body"])
        else:
            body = _error(code, "no")
        response = {"status_code": status, "request_id": "r", "body": body}
        (good if status == 200 else bad).append({**told, "response": response, "error": None})


def _prompt(line: dict[str, Any]) -> str:
    return str(line["body"]["messages"][-1]["content"])


def _jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "code": code}}


def _uploaded(body: bytes, content_type: str) -> tuple[bytes, str]:
    """The file in a form, and its name."""
    form = BytesParser().parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
    for part in form.walk():
        if (name := part.get_filename()) is not None:
            return bytes(part.get_payload(decode=True)), name
    raise ValueError("the form has no file")
