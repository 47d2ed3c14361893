"""How a process that runs a job holds its memory. For a program's own process only, never for one that imports the
library."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from typing import Final

__all__ = ["settle_in"]

# Parameters of glibc's mallopt, and the bytes that are kept where the default is to give them back at once.
_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 512 << 20


def settle_in() -> None:
    """Fewer collections, and memory that is kept for the next batch."""
    # A run makes millions of small objects and no rings of them: looking for rings is a tenth of its time.
    gc.set_threshold(200_000, 20, 100)
    # Every batch's arrays would be given back to the system and faulted in again: up to a sixth of a run.
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, value in (
                (_MMAP_THRESHOLD, _KEPT),
                (_TRIM_THRESHOLD, _KEPT),
                (_TOP_PAD, 64 << 20),
            ):
                mallopt(parameter, value)
