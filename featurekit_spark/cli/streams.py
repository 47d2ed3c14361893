"""A stderr that stays apart from stdout under spark-submit.

spark-submit merges both streams of a Python job into its own stdout. What is meant for stderr therefore goes
through the JVM, which has the real one. Knows nothing of what is written.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

__all__ = ["stderr_apart"]


@contextmanager
def stderr_apart() -> Iterator[None]:
    """Under spark-submit, `sys.stderr` is spark-submit's own for the length of the block."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        yield
        return
    before = sys.stderr
    through_jvm = _JvmStderr(before)
    sys.stderr = through_jvm
    try:
        yield
    finally:
        sys.stderr = before
        through_jvm.close()


class _JvmStderr(io.TextIOBase):
    """Writes to the stderr of the JVM that started this process; connects when first written to."""

    def __init__(self, instead: TextIO) -> None:
        self._instead = instead
        self._gateway: Any = None
        self._usable = True

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        """Whether spark-submit's stderr is a terminal; where nothing tells, it is taken for none."""
        try:
            handle = os.open(f"/proc/{os.getppid()}/fd/2", os.O_WRONLY | os.O_NOCTTY)
        except OSError:
            return False
        try:
            return os.isatty(handle)
        finally:
            os.close(handle)

    def write(self, text: str) -> int:
        if self._usable:
            self._usable = False  # meanwhile: py4j logs its own troubles, to this very stream
            with suppress(Exception):
                self._write(text)
                self._usable = True
                return len(text)
        # Without a JVM to write through, the merged stream is better than none.
        return self._instead.write(text)

    def _write(self, text: str) -> None:
        if self._gateway is None:
            from pyspark.java_gateway import launch_gateway

            self._gateway = launch_gateway()  # type: ignore[no-untyped-call]
        # Bytes, because the JVM's own encoding may have no letter for what Python writes.
        data = text.encode("utf-8", "backslashreplace")
        stream = self._gateway.jvm.java.lang.System.err
        stream.write(data, 0, len(data))
        stream.flush()

    def close(self) -> None:
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None
        super().close()
