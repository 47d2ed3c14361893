"""Names of indexes that every store takes."""

from __future__ import annotations

import re

from featurekit_spark.errors import UsageError

__all__ = ["checked_name", "name_from", "name_of"]

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def checked_name(name: str) -> str:
    """`name`; UsageError where a store would not take it, or could take it for a part of another."""
    if not _NAME.fullmatch(name) or "--" in name or len(name) > 100:
        raise UsageError(
            f"index name {name!r}: give at most 100 letters, digits, _, . and single -, not . or - at its ends"
        )
    return name


def name_of(*fields: str) -> str:
    """A name for what these fields say, such as merchant and market; no two lists of fields share one.

    >>> name_of("abt", "US"), name_of("a-b", "Zürich")
    ('abt-US', 'a_2d_b-Z_c3bc_rich')
    """
    return "-".join(
        re.sub(r"[^A-Za-z0-9]+", lambda odd: f"_{odd[0].encode().hex()}_", name) for name in fields
    )


def name_from(template: str, **fields: str) -> str:
    """A name by a template. No two lists of fields share one where - or . is between its fields.

    >>> name_from("shop-{merchant}.{market}", merchant="a-b", market="US")
    'shop-a_2d_b.US'
    """
    return template.format(**{name: name_of(value) for name, value in fields.items()})
