"""The one CSV dialect: what is read as it stands, and what is refused with its line."""

from __future__ import annotations

import csv
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurekit_spark.errors import DataError
from featurekit_spark.sources.csvfile import _is_plain, lines_of, read_columns, read_header, read_tables


def rows_of(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [row for chunk in read_columns(path, columns) for row in zip(*chunk, strict=True)]


def tables_of(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [
        row
        for table in read_tables(path, columns)
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    ]


def write(folder: Path, data: bytes) -> Path:
    path = folder / "x.csv"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b'a,b\n1,"x, y"\n', [("1", "x, y")]),
        (b'a,b\n1,"x ""q"" y"\n', [("1", 'x "q" y')]),
        (b'a,b\r\n1,"x\r\ny\nz"\r\n2,w\r\n', [("1", "x\r\ny\nz"), ("2", "w")]),
        (b"a,b\n1,C:\\x\\\n2,\\\n", [("1", "C:\\x\\"), ("2", "\\")]),
        (b'a,b\n1, x \n2," y "\n', [("1", " x "), ("2", " y ")]),
        (b'a,b\n1,\n2,""\n', [("1", ""), ("2", "")]),
        (b'a,b\n1,5" pipe\n', [("1", '5" pipe')]),
        (b"\xef\xbb\xbfa,b\n1,x\n", [("1", "x")]),
        (b"a,b\n\n1,x\n\r\n2,y", [("1", "x"), ("2", "y")]),
        ("a,b\n1,e\u0301\n2,\u00e9\n".encode(), [("1", "e\u0301"), ("2", "\u00e9")]),
        (b"a,b\n1,x\x00y\n", [("1", "x\x00y")]),
        (b"a,b\n", []),
        (b"a,b", []),
    ],
)
def test_cells_are_what_they_say(tmp_path: Path, data: bytes, rows: list[tuple[str, str]]) -> None:
    path = write(tmp_path, data)
    assert read_header(path) == ("a", "b")
    assert rows_of(path, ("a", "b")) == rows
    assert tables_of(path, ("a", "b")) == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1,x\n2\n", r"x\.csv, line 3: 1 cells where the header has 2"),
        (b'a,b\n1,"x\ny"\n2,y,z\n', r"line 4: 3 cells where the header has 2"),
        (b"a,b\n1,x\n2,caf\xe9\n", r"line 3: byte 0xe9 at position 6 is not UTF-8"),
        (b'a,b\n1,"x\n2,y\n', r"line 3: unexpected end of data"),
        (b'a,b\n1,"x"y\n', r"line 2: .* expected after"),
        (b"a,b\r1,x\r", r"line 1: new-line character"),
        ("a,b\n1,x\n".encode("utf-16"), r"line 1: byte 0xff at position 1"),
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\n\n", "the file is empty"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path, data)
    for read in (rows_of, tables_of):
        with pytest.raises(DataError, match=message):
            read(path, ("a",))


def test_a_long_cell_is_no_error(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert rows_of(write(tmp_path, f"a,b\n1,{text}\n".encode()), ("b",)) == [(text,)]


def test_columns_come_in_the_order_asked(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path, b"a,b,c\n1,2,3\n"), ("c", "a")) == [("3", "1")]


def test_rows_are_found_by_the_line_where_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path, b'a,b\n\n1,"x\ny"\n2,y\n\n3,"z\n"\n')
    assert lines_of(path, [0, 1, 2]) == [3, 5, 7]
    assert lines_of(path, [2, 0]) == [3, 7]
    assert lines_of(path, [7]) == []


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@given(st.lists(st.tuples(texts, texts), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_wrote_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), out.getvalue().encode())
    assert rows_of(path, ("a", "b")) == rows


def told(read: Any, path: Path, columns: tuple[str, ...]) -> Any:
    try:
        return read(path, columns)
    except DataError as error:
        return str(error)


# What matters to a reader of CSV, and little else: most of it is wrong, and some is not what it looks like.
snippets = st.lists(
    st.sampled_from(
        ['"', '""', ",", "\n", "\r\n", "\r", "x", " ", "\\", "\x00", "\ufeff", "NA", "1", "\u2028", "\xe9"]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=400)
@given(snippets, st.sampled_from(["a,b\n", "a\n", '"a",b\r\n']))
def test_the_fast_reader_reads_what_the_strict_one_does(
    tmp_path_factory: pytest.TempPathFactory, body: str, header: str
) -> None:
    """Equal cells, or both refuse."""
    path = write(tmp_path_factory.mktemp("csv"), (header + body).encode())
    columns = ("a", "b") if "b" in header else ("a",)
    read = [told(rows_of, path, columns), told(tables_of, path, columns)]
    assert read[0] == read[1]


def test_what_is_plain_is_what_a_pattern_of_the_dialect_says() -> None:
    odd = re.compile(rb"\r(?!\n)|\x00")
    quoted = re.compile(rb'(?<![^,\n])"(?:[^"]++|"")*+"(?=,|\r?\n|\Z)')
    told = set()
    for mark in (b"", b"\xef\xbb\xbf"):
        for cells in (
            bytes(some) for size in range(7) for some in itertools.product(b'",\n\ra', repeat=size)
        ):
            plain = odd.search(cells) is None and b'"' not in quoted.sub(b"", cells)
            assert _is_plain(mark + cells) == plain, mark + cells
            told.add(plain)
    assert told == {True, False}
