"""The real Redis server that a shared limit needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from featurekit_spark.errors import ConfigError
from featurekit_spark.testing.redis import redis_server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    try:
        with redis_server() as url:
            yield url
    except ConfigError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
