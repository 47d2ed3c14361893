"""An S3 server on loopback, in memory: what Delta tables need of it, for one pair of credentials.

Path-style requests, signature version 4 checked over the headers, conditional puts, ranges, copies, multipart uploads,
lists of one page. A test may say that its clock goes ahead, and what it refuses. Not checked: the payload's own hash,
times, rights. No part of S3 beyond that is here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from urllib.request import Request, urlopen
from xml.etree import ElementTree
from xml.sax.saxutils import escape

__all__ = ["Store", "s3_server"]

_CONTROL = "/-/control"


@dataclass
class Store:
    """Where it is and who may use it."""

    url: str = ""
    access_key: str = "reader"
    secret_key: str = "wr/ter+secret"
    region: str = "eu-central-1"
    objects: dict[str, tuple[bytes, datetime]] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    ahead_s: float = 0.0
    refused: str = ""

    def tell(self, *, ahead_s: float = 0.0, refused: str = "") -> None:
        """Its clock goes so far ahead of others, and denies requests (`PUT bucket/key`) like `refused`, a pattern."""
        query = urlencode({"ahead_s": ahead_s, "refused": refused})
        urlopen(Request(f"{self.url}{_CONTROL}?{query}", method="PUT")).close()

    @property
    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)

    @property
    def options(self) -> dict[str, str]:
        """What opens it, as `deltalake` takes it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
        }


@contextmanager
def s3_server() -> Iterator[Store]:
    """A server in a process of its own: `deltalake` waits for some answers with Python's lock in its hands."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield Store(server.stdout.readline().strip())
        finally:
            server.terminate()


def main() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": Store()})) as server:
        server.daemon_threads = True
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
        server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # an answer in one piece: in two, each waits for the client's acknowledgement

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()  # else the client waits a second for it
        return going_on

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has what it wanted
            self.close_connection = True

    def do_GET(self) -> None:
        _, query = self._begin()
        if not self._signed(query):
            return self._deny()
        if "list-type" in query:
            return self._list(query)
        if self._is_refused():
            return self._answer(403, _error("AccessDenied"))
        found = self.store.objects.get(self._key)
        if found is None:
            return self._answer(404, _error("NoSuchKey"))
        data, changed = found
        headers = {"ETag": _etag(data), "Last-Modified": f"{changed:%a, %d %b %Y %H:%M:%S} GMT"}
        asked = self.headers.get("Range")
        if asked is None:
            return self._answer(200, data, headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last), len(data) - 1) if first and last else len(data) - 1
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self._answer(206, data[start : end + 1], headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body, query = self._begin()
        if self._path == _CONTROL:
            self.store.ahead_s, self.store.refused = float(query["ahead_s"]), query.get("refused", "")
            return self._answer(200, b"")
        if not self._signed(query):
            return self._deny()
        if self._is_refused():
            return self._answer(403, _error("AccessDenied"))
        source = self.headers.get("x-amz-copy-source")
        if source is not None:
            found = self.store.objects.get(unquote(source).lstrip("/"))
            if found is None:
                return self._answer(404, _error("NoSuchKey"))
            self.store.objects[self._key] = (found[0], self.store.now)
            return self._answer(200, _xml("CopyObjectResult", f"<ETag>{_etag(found[0])}</ETag>"))
        if "uploadId" in query:
            self.store.uploads[query["uploadId"]][int(query["partNumber"])] = body
        elif self.headers.get("If-None-Match") == "*" and self._key in self.store.objects:
            return self._answer(412, _error("PreconditionFailed"))
        else:
            self.store.objects[self._key] = (body, self.store.now)
        return self._answer(200, b"", {"ETag": _etag(body)})

    def do_POST(self) -> None:
        body, query = self._begin()
        if not self._signed(query):
            return self._deny()
        if self._is_refused():
            return self._answer(403, _error("AccessDenied"))
        if "delete" in query:
            names = [node.text or "" for node in ElementTree.fromstring(body).iter() if _is(node, "Key")]
            for name in names:
                self.store.objects.pop(f"{self._key.strip('/')}/{name}", None)
            gone = (f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            return self._answer(200, _xml("DeleteResult", "".join(gone)))
        if "uploads" in query:
            self.store.uploads[upload := uuid.uuid4().hex] = {}
            inside = f"<Key>{escape(self._key.partition('/')[2])}</Key><UploadId>{upload}</UploadId>"
            return self._answer(200, _xml("InitiateMultipartUploadResult", inside))
        parts = self.store.uploads.pop(query["uploadId"])
        data = b"".join(part for _, part in sorted(parts.items()))
        self.store.objects[self._key] = (data, self.store.now)
        return self._answer(200, _xml("CompleteMultipartUploadResult", f"<ETag>{_etag(data)}</ETag>"))

    def do_DELETE(self) -> None:
        _, query = self._begin()
        if not self._signed(query):
            return self._deny()
        if self._is_refused():
            return self._answer(403, _error("AccessDenied"))
        self.store.objects.pop(self._key, None)
        return self._answer(204, b"")

    def _begin(self) -> tuple[bytes, dict[str, str]]:
        """(body, query); the whole body is read, so that the connection can go on."""
        parts = urlsplit(self.path)
        self._path, self._key = parts.path, unquote(parts.path).lstrip("/")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _unchunked(body)
        return body, dict(parse_qsl(parts.query, keep_blank_values=True))

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _list(self, query: dict[str, str]) -> None:
        bucket, prefix = self._key.strip("/"), query.get("prefix", "")
        after, delimiter = query.get("start-after", ""), query.get("delimiter", "")
        contents, folders = [], {}
        for name, (data, changed) in sorted(self.store.objects.copy().items()):
            key = name.removeprefix(f"{bucket}/")
            if key == name or not key.startswith(prefix) or key <= after:
                continue
            inner, cut, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
            if cut:
                folders[f"{prefix}{inner}{cut}"] = None
                continue
            contents.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{_etag(data)}</ETag>"
                f"<LastModified>{changed:%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>"
            )
        found = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        facts = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        facts += f"<KeyCount>{len(contents) + len(found)}</KeyCount>"
        self._answer(200, _xml("ListBucketResult", facts + "".join([*contents, *found])))

    def _is_refused(self) -> bool:
        return (
            bool(self.store.refused)
            and re.search(self.store.refused, f"{self.command} {self._key}") is not None
        )

    def _signed(self, query: dict[str, str]) -> bool:
        """Whether the request was signed with the store's own credentials."""
        kind, _, rest = self.headers.get("Authorization", "").partition(" ")
        if kind != "AWS4-HMAC-SHA256":
            return False
        facts = dict(part.strip().split("=", 1) for part in rest.split(","))
        access, day, region, service, _ = facts["Credential"].split("/")
        if (access, region, service) != (self.store.access_key, self.store.region, "s3"):
            return False
        names = facts["SignedHeaders"].split(";")
        pairs = sorted((_quoted(k), _quoted(v)) for k, v in query.items())
        request = "\n".join(
            [
                self.command,
                quote(unquote(self._path), safe="/-_.~"),
                "&".join(f"{k}={v}" for k, v in pairs),
                *(f"{name}:{' '.join(self.headers.get(name, '').split())}" for name in names),
                "",
                facts["SignedHeaders"],
                self.headers.get("x-amz-content-sha256", ""),
            ]
        )
        scope = f"{day}/{region}/s3/aws4_request"
        hashed = hashlib.sha256(request.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{self.headers.get('x-amz-date')}\n{scope}\n{hashed}"
        key = f"AWS4{self.store.secret_key}".encode()
        for part in (*scope.split("/"), text):
            key = hmac.digest(key, part.encode(), "sha256")
        return key.hex() == facts["Signature"]

    def _deny(self) -> None:
        self._answer(403, _error("SignatureDoesNotMatch"))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/xml", **(headers or {})}.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _unchunked(body: bytes) -> bytes:
    data = b""
    while body:
        head, _, rest = body.partition(b"\r\n")
        size = int(head.partition(b";")[0], 16)
        if not size:
            break
        data, body = data + rest[:size], rest[size + 2 :]
    return data


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _is(node: ElementTree.Element, name: str) -> bool:
    return node.tag.rpartition("}")[2] == name


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


def _xml(name: str, inside: str) -> bytes:
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    return f'{head}<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inside}</{name}>'.encode()


if __name__ == "__main__":
    main()
