"""How stored matrices are searched: which way, from which size on, and the settings of an inverted file.

Plain values that travel with a store. Knows nothing of how the ways work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

__all__ = ["Mode", "SearchOptions"]

Mode = Literal["auto", "broadcast", "partitioned", "ivf"]


@dataclass(frozen=True)
class SearchOptions:
    """`mode` auto maps a matrix into memory on every host while it has at most `memory_mb`, and searches it part by
    part beyond; broadcast and partitioned do the one or the other whatever the size. The answers are the same.

    `mode` ivf answers from `nprobe` of `lists` inverted lists: fewer rows are looked at, and some neighbours missed.
    `lists` None: by the size of the matrix. `part_mb`: rows that one task holds at a time.
    """

    mode: Mode = "auto"
    memory_mb: int = 4096
    part_mb: int = 256
    nprobe: int = 16
    lists: int | None = None

    def is_mapped(self, rows: int, dim: int) -> bool:
        """Whether a matrix of this size is searched as a whole, from memory."""
        match self.mode:
            case "broadcast":
                return True
            case "auto":
                return 4 * rows * dim <= self.memory_mb << 20
            case "partitioned" | "ivf":
                return False
            case _:
                assert_never(self.mode)
