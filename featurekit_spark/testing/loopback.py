"""A real HTTP server on a loopback port, for as long as a block runs. Knows no protocol above HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["JsonHandler", "served"]


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and answers JSON on connections that are kept; says nothing on stderr."""

    protocol_version = "HTTP/1.1"
    # Headers and body in one packet, sent at once: else each kept connection waits 40 ms per answer.
    wbufsize = -1
    disable_nagle_algorithm = True

    def body(self) -> Any:
        """What was sent."""
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def reply(self, status: int, headers: dict[str, str], body: Any) -> None:
        """Answer with bytes as they are, or with anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, text in {"content-type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(handler: type[BaseHTTPRequestHandler], *, port: int = 0) -> Iterator[str]:
    """The server's URL; port 0: any free one."""
    http = ThreadingHTTPServer(("127.0.0.1", port), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
