"""What can be wrong with a catalog's rows, in the same words from Arrow and from Spark.

Owns messages only; never looks at data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from featurekit_spark.errors import DataError
from featurekit_spark.sources.base import Layout

__all__ = ["SHOWN", "duplicate_ids", "missing_ids", "mixed_types", "undecided", "untyped_id"]

SHOWN = 5
"""How many ids or rows a message gives."""


def missing_ids(layout: Layout, count: int, places: str) -> DataError:
    where = f" ({places})" if places else ""
    return DataError(
        f"{layout.where}: {count} rows have no product_id{where}; give every product an id or drop the rows."
    )


def duplicate_ids(layout: Layout, ids: int, extra: int, first: Sequence[str]) -> DataError:
    shown = ", ".join(map(repr, first)) + (", ..." if ids > len(first) else "")
    return DataError(
        f"{layout.where}: {ids} product_ids are there more than once ({extra} rows too many): {shown}. "
        "Make them unique, or set product_db.duplicates to keep_last."
    )


def undecided(layout: Layout, extra: int) -> DataError:
    return DataError(
        f"{layout.where}: {extra} duplicate rows are as new as the row they compete with, so there is no "
        "last one to keep; make their product_ids unique, or order them by a column that tells them apart."
    )


def untyped_id(layout: Layout, kind: str) -> DataError:
    return DataError(
        f"{layout.where}: product_id is of type {kind}; it must be a string or an integer, because other "
        "types have more than one spelling for the same id."
    )


def mixed_types(layout: Layout, attribute: str, kinds: Iterable[str]) -> DataError:
    return DataError(
        f"{layout.where}: the columns of attribute {attribute!r} have different types "
        f"({', '.join(sorted(kinds))}); give all its dimension variants one type."
    )
