"""A real Redis server for tests, on a free loopback port, gone when the test is.

Owns starting and stopping the `redis-server` program. It must not know what is kept there.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from featurekit_spark.errors import ConfigError, ServiceError

__all__ = ["redis_server"]

_START_SECONDS = 20.0


@contextmanager
def redis_server(*arguments: str) -> Iterator[str]:
    """The URL of an empty server that persists nothing; `arguments` go to `redis-server` as they are.

    Raises ConfigError where the program is not installed, ServiceError where it does not come up.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise ConfigError("redis-server is not installed: apt-get install redis-server.")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--appendonly", "no", *arguments]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait(server, port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(timeout=10)


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise ServiceError(f"redis-server did not start on port {port}; exit status {server.poll()}.")
