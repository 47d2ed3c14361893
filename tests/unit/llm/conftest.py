"""A chat server on a loopback port, and the answers it gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from featurekit_spark.testing.chat import ChatServer, chat_reply, chat_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_CHAT_KEY", "sk-secret")
    with chat_server() as chat:
        yield chat


@pytest.fixture
def reply() -> Any:
    return chat_reply
