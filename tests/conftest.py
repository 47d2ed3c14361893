"""What every test gets: no way to the network, no keys of anybody's, and one Spark session for all who
ask.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from featurekit_spark.testing.spark import spark_session

ROOT = Path(__file__).resolve().parent.parent

# Deadlines per example would fail on a busy machine; the suite's own timeout bounds the whole.
# Derandomised, so that a failure in one run is a failure in the next.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


class NetworkUsed(BaseException):
    """A test reached for the network; no `except Exception` may swallow it."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets connect to this machine only."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(real: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and not _is_loopback(address[0]):
                raise NetworkUsed(f"a test connects to {address!r}; use a fake or a server on 127.0.0.1")
            return real(self, address)

        return call

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the developer's environment must not turn a test into a bill."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_API_TOKEN", "_ACCESS_KEY_ID", "_SECRET_ACCESS_KEY")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """The suite's Spark session, started by the first test that asks."""
    # Workers import the builders that tests define.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        with spark_session("local[2]") as session:
            yield session
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
