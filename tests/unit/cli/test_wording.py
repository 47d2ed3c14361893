"""Numbers as people read them."""

from __future__ import annotations

import pytest

from featurekit_spark.cli.wording import (
    counted,
    counts_table,
    shown_seconds,
    shown_size,
    shown_usd,
    table,
)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "?"),
        (0, "0 s"),
        (1.9e-05, "19 us"),
        (0.0278, "27.8 ms"),
        (0.25, "250 ms"),
        (1.184, "1.2 s"),
        (61, "61.0 s"),
        (119.4, "119 s"),
        (270, "4.5 min"),
        (7199, "120 min"),
        (11_520, "3.2 h"),
    ],
)
def test_seconds(seconds: float | None, said: str) -> None:
    assert shown_seconds(seconds) == said


def test_counts_sizes_and_money() -> None:
    assert [counted(n, "entry", "entries") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
    assert counted(2, "row") == "2 rows"
    assert [shown_size(n) for n in (0, 999, 1000, 2_500_000, 3e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 MB",
        "3.0 GB",
    ]
    assert [shown_usd(n) for n in (None, 0, 0.0005, 12.345)] == ["?", "0.00", "0.0005", "12.35"]


def test_a_table_is_aligned() -> None:
    assert list(table([("name", "n"), ("a", "10"), ("longer", "7")])) == [
        "name     n",
        "a       10",
        "longer   7",
    ]
    assert list(table([("n", "name"), ("10", "a")], align="><")) == [" n  name", "10  a"]


def test_builders_that_nobody_asked_for_are_only_counted() -> None:
    counts = {
        "A": {"hit": 0, "seconds": 0.0},
        "B": {"hit": 3, "seconds": 1.25},
        "C": {"hit": 0, "seconds": 0.0},
    }
    assert list(counts_table(counts)) == [
        "  builder  hit  seconds",
        "  B          3     1.25",
        "  2 other builders: not looked at, as nothing asked for them",
    ]
    assert list(counts_table({})) == []
