"""Ids of a matrix's rows, read from mapped bytes: no text object per row in every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

__all__ = ["Ids"]


class Ids(Sequence[str]):
    """Texts in UTF-8, one after the other in `text`; `ends` int64 [rows + 1]: where each begins, and the last ends."""

    def __init__(self, ends: npt.NDArray[np.int64], text: npt.NDArray[np.uint8]) -> None:
        self.ends, self.text = ends, text
        # Views that answer with Python's own numbers: an array would make an object of numpy's for each.
        self._ends, self._text = ends.data, text.data

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        """Texts laid out as a copy has them."""
        texts = [text.encode() for text in ids]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(texts), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        if row < 0:
            row += len(self)
        return str(self._text[self._ends[row] : self._ends[row + 1]], "utf-8")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends[1:]:
            yield str(self._text[start:end], "utf-8")
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ids | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def to_arrow(self) -> Any:
        """The same bytes as pyarrow's large_string."""
        import pyarrow as pa

        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._text))

    def ranks(self) -> npt.NDArray[np.int64] | None:
        """Each row's place in the order of ids (of code points); None where that is the order of rows."""
        import pyarrow.compute as pc

        order: npt.NDArray[np.int64] = pc.array_sort_indices(self.to_arrow()).to_numpy().astype(np.int64)
        places = np.arange(len(order), dtype=np.int64)
        if np.array_equal(order, places):
            return None
        ranks = np.empty_like(places)
        ranks[order] = places
        return ranks
