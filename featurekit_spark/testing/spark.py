"""A SparkSession for tests: small, quick to start, bound to loopback. One per suite.

    @pytest.fixture(scope="session")
    def spark():
        with spark_session("local[2]") as session:
            yield session

Imports pyspark when called, not when imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["SETTINGS", "spark_session"]

SETTINGS: Final[Mapping[str, str]] = {
    # The default of 200 makes every join of ten rows 200 tasks.
    "spark.sql.shuffle.partitions": "2",
    "spark.default.parallelism": "2",
    # Delta replays its log with 50 tasks unless told otherwise.
    "spark.databricks.delta.snapshotPartitions": "1",
    # Nobody looks at a test's web page, and its port may be taken.
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    # Without these Spark asks for the machine's name, and listens on its network.
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    # The same instants print the same on every machine.
    "spark.sql.session.timeZone": "UTC",
    # A worker that stays alive keeps its imports: later stages start in milliseconds.
    "spark.python.worker.reuse": "true",
}


@contextmanager
def spark_session(
    master: str | None = None, *, settings: Mapping[str, str] | None = None
) -> Iterator[SparkSession]:
    """A session with SETTINGS and then `settings`; stopped at the end.

    `master` (such as "local[2]") is for tests on one machine; None leaves it to the environment. Workers
    run this Python, and find the modules that PYTHONPATH names: put the folder of your tests there before the
    session starts.
    """
    # Else a worker is whatever `python3` is on the PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    with tempfile.TemporaryDirectory(prefix="spark-warehouse-") as warehouse:
        builder = SparkSession.builder.appName("tests").config("spark.sql.warehouse.dir", warehouse)
        for name, value in {**SETTINGS, **(settings or {})}.items():
            builder = builder.config(name, value)
        if master is not None:
            builder = builder.config("spark.master", master)
        session = builder.getOrCreate()
        try:
            yield session
        finally:
            session.stop()
