"""How numbers are told to people: counts with their noun, sizes, seconds, money, and tables of them.

Knows no command; what goes to programs is never rounded here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["counted", "counts_table", "shown_seconds", "shown_size", "shown_usd", "table"]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def shown_size(size: float) -> str:
    """Bytes."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def shown_seconds(seconds: float | None) -> str:
    """Two or three digits in the unit that fits: `19 us`, `5.1 ms`, `1.2 s`, `4.5 min`, `3.2 h`."""
    if seconds is None:
        return "?"
    if seconds == 0:
        return "0 s"
    for unit, one in (("h", 3600), ("min", 60), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= one * (1 if one <= 1 else 2):
            number = seconds / one
            return f"{number:.1f} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def shown_usd(usd: float | None) -> str:
    """Without the unit; `?` where nobody knows."""
    return "?" if usd is None else f"{usd:.4f}" if 0 < usd < 1 else f"{usd:.2f}"


def table(rows: Sequence[Sequence[str]], *, align: str = "<") -> Iterator[str]:
    """One line per row, the first of which is the header. `align`: `<` or `>` for each column; the rest are `>`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sides = align.ljust(len(row), ">")
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        yield "  ".join(cells).rstrip()


_COUNTS = ("hit", "computed", "updated", "error", "calls", "seconds")


def counts_table(builders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What a run did, a line per builder; those that it did not look at are left out, and counted."""
    columns = [name for name in _COUNTS if any(name in counts for counts in builders.values())]
    looked_at = {name: counts for name, counts in builders.items() if any(counts.get(c) for c in columns)}
    rows = [
        (
            f"  {name}",
            *(
                f"{counts.get(column) or 0:.2f}" if column == "seconds" else str(counts.get(column) or 0)
                for column in columns
            ),
        )
        for name, counts in looked_at.items()
    ]
    if rows:
        yield from table([("  builder", *columns), *rows])
    if len(looked_at) < len(builders):
        others = "other builder" if rows else "builder"
        yield f"  {counted(len(builders) - len(looked_at), others)}: not looked at, as nothing asked for them"
