"""One Arrow type for each kind of value, the one that Spark has too.

Owns that mapping only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["plain_type"]


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that Spark has for the same values: no dictionaries, views, large or nanosecond types."""
    import pyarrow as pa

    t = pa.types
    if t.is_dictionary(kind):
        return plain_type(kind.value_type)
    if t.is_large_string(kind) or t.is_string_view(kind):
        return pa.string()
    if t.is_large_binary(kind) or t.is_binary_view(kind):
        return pa.binary()
    if t.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz else None)
    if t.is_list(kind) or t.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind
