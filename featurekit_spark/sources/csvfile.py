"""One strict CSV dialect: RFC 4180 in UTF-8, every cell as text.

A byte order mark is skipped, lines may end in LF or CRLF, blank lines do not count, spaces and
backslashes mean themselves. Whatever two readers could understand differently (text after a closing
quote, an open quote, a ragged line, bytes that are no UTF-8) is refused with its line. Arrow's fast reader is used
where a file has nothing that it reads differently. Knows no products.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from featurekit_spark.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader as _Reader

    import pyarrow as pa

__all__ = ["lines_of", "read_columns", "read_header", "read_tables"]

_CHUNK = 16_384
_BOM = b"\xef\xbb\xbf"
_BARE_CR = re.compile(rb"\r(?!\n)")
_BLOCK = 1 << 24


def read_header(path: Path) -> tuple[str, ...]:
    """The names in the first line; DataError if the file is empty."""
    with path.open("rb") as stream:
        return tuple(next(_records(stream, path)))


def read_columns(path: Path, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Chunks of rows as one list of cells per asked column; an empty cell is the empty text.

    `columns` must be in the header, each once.
    """
    with path.open("rb") as stream:
        records = _records(stream, path)
        header = next(records)
        wanted = [itemgetter(header.index(name)) for name in columns]
        done = 0
        while chunk := list(islice(records, _CHUNK)):
            for row, cells in enumerate(chunk):
                if len(cells) != len(header):
                    line = lines_of(path, [done + row])[0]
                    raise DataError(
                        f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}; "
                        "quote cells that hold commas, quotes or line ends."
                    )
            yield [[pick(cells) for cells in chunk] for pick in wanted]
            done += len(chunk)


def read_tables(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """As `read_columns`, as tables of text columns in the order asked, named by position."""
    import pyarrow as pa

    names = [str(i) for i in range(len(columns))]
    whole = _read_fast(path, list(columns))
    if whole is not None:
        yield whole.rename_columns(names)
        return
    for cells in read_columns(path, columns):
        yield pa.table([pa.array(column, pa.string()) for column in cells], names=names)


def _read_fast(path: Path, columns: list[str]) -> pa.Table | None:
    """The columns by Arrow's reader; None where the file is not plain enough, or wrong: that is told by line."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    data = path.read_bytes()
    quoted = b'"' in data
    if not _is_plain(data):
        return None
    try:
        if not data.isascii():  # all of it: Arrow looks at the columns that are asked for
            whole = pa.array([0, len(data)], pa.int64()).buffers()[1]
            pa.LargeStringArray.from_buffers(1, whole, pa.py_buffer(data)).validate(full=True)
        return arrow_csv.read_csv(
            pa.BufferReader(data),
            read_options=arrow_csv.ReadOptions(block_size=max(1 << 20, len(data) // 8)),
            parse_options=arrow_csv.ParseOptions(
                quote_char='"' if quoted else False, double_quote=True, newlines_in_values=quoted
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(dict.fromkeys(columns)),
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=False,
            ),
        ).select(columns)
    except (pa.ArrowException, KeyError):
        return None


def _is_plain(data: bytes) -> bool:
    """Whether there is nothing that Arrow's reader takes otherwise than this dialect: a line end of CR alone, a zero
    byte, a quote anywhere but around a whole cell or doubled within."""
    import numpy as np

    if b"\x00" in data or (b"\r" in data and _BARE_CR.search(data)):
        return False
    if b'"' not in data:
        return True
    text = np.frombuffer(data, np.uint8)
    quotes = np.concatenate(
        [
            start + np.flatnonzero(text[start : start + _BLOCK] == ord('"'))
            for start in range(0, len(text), _BLOCK)
        ]
    )
    if len(quotes) % 2:
        return False
    # By turns they open and close. A doubled one closes and opens again.
    opening, closing = quotes[::2], quotes[1::2]
    before = text[opening - 1]  # of one at the very beginning: any byte, it is let through below
    begins = (before == ord(",")) | (before == ord("\n")) | (before == ord('"'))
    begins |= opening == (len(_BOM) if data.startswith(_BOM) else 0)
    after = text[np.minimum(closing + 1, len(text) - 1)]
    ends = (after == ord(",")) | (after == ord("\n")) | (after == ord("\r")) | (after == ord('"'))
    ends |= closing == len(text) - 1
    return bool(begins.all() and ends.all())


def lines_of(path: Path, rows: Iterable[int]) -> list[int]:
    """The lines (from 1) where the rows (from 0, header not counted) begin."""
    wanted = sorted(set(rows))
    found: list[int] = []
    with path.open("rb") as stream:
        lines = _Lines(stream, path)
        reader = _reader(lines)
        row = -2
        while len(found) < len(wanted):
            begin = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                break
            if cells:
                row += 1
                if row == wanted[len(found)]:
                    found.append(begin)
    return found


def _records(stream: Iterable[bytes], path: Path) -> Iterator[list[str]]:
    reader = _reader(_Lines(stream, path))
    empty = True
    try:
        for cells in reader:
            if cells:
                empty = False
                yield cells
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; the file is not plain CSV (RFC 4180: cells with "
            "commas, quotes or line ends in double quotes, quotes inside them doubled)."
        ) from None
    if empty:
        raise DataError(f"{path}: the file is empty; its first line must name the columns.")


def _reader(lines: Iterator[str]) -> _Reader:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(lines, strict=True)


class _Lines:
    """The lines of a binary stream as text, so that a byte that is no UTF-8 is known by its line."""

    def __init__(self, stream: Iterable[bytes], path: Path) -> None:
        self._stream = enumerate(stream, start=1)
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._stream)
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}, line {number}: byte 0x{line[error.start]:02x} at position {error.start + 1} "
                "is not UTF-8; save the file as UTF-8."
            ) from None
