"""How stored matrices are searched: which way, from which size on, and the settings of an inverted file.

Plain values that travel with a store. Knows nothing of how the ways work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from featurekit_spark.search.rounded import stored_bytes

__all__ = ["Mode", "Probes", "SearchOptions"]

Mode = Literal["auto", "broadcast", "partitioned", "ivf"]


@dataclass(frozen=True)
class Probes:
    """An approximate search: in `nprobe` of a matrix's `lists` inverted lists. None: by the size of the matrix."""

    nprobe: int
    lists: int | None = None


@dataclass(frozen=True)
class SearchOptions:
    """`mode` auto maps a matrix into memory on every host while it has at most `memory_mb`, and searches it part by
    part beyond; broadcast and partitioned do the one or the other whatever the size. The answers are the same.

    `mode` ivf has searchers whose config says nothing else answer from `nprobe` of `lists` inverted lists (`Probes`):
    fewer rows are looked at, and some neighbours missed. Whoever asks for exact answers has them as with auto.
    `part_mb`: rows that one task holds at a time.
    """

    mode: Mode = "auto"
    memory_mb: int = 4096
    part_mb: int = 256
    nprobe: int = 16
    lists: int | None = None

    def is_mapped(self, rows: int, dim: int, storage: str = "float32") -> bool:
        """Whether an exact search of a matrix of this size and type is one of the whole, from memory."""
        match self.mode:
            case "broadcast":
                return True
            case "auto" | "ivf":
                return stored_bytes(rows, dim, storage) <= self.memory_mb << 20
            case "partitioned":
                return False
            case _:
                assert_never(self.mode)
