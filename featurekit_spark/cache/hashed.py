"""Keys of which only a hash is kept: how they are written, and how a look-up by the text still finds their rows.

Pure functions of keys and rows. Which keys are hashed, and when, is `retention`'s affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import pyarrow as pa

from featurekit_spark.fingerprint import payload_hash

__all__ = ["HASHED_KEY_SQL", "hashed_key", "is_hashed", "named"]

_HASHED: Final = re.compile(r'\["sha256:[0-9a-f]{32}"\]')
HASHED_KEY_SQL: Final = """concat('["sha256:', substr(sha2(concat('key:', key), 256), 1, 32), '"]')"""
"""`hashed_key` of a column `key`, for Spark."""


def hashed_key(key: str) -> str:
    """What stands in place of a key (canonical JSON) of one text: the same for the same text, everywhere."""
    return f'["sha256:{payload_hash("key", key.encode())}"]'


def is_hashed(key: str) -> bool:
    """Whether this stands in place of a key."""
    return _HASHED.fullmatch(key) is not None


def named(rows: pa.Table, keys: Mapping[str, str]) -> pa.Table:
    """Rows with their keys in place of the hashes of these keys, as whoever asks for them knows them."""
    if not keys or not len(rows):
        return rows
    column: Iterable[str] = rows["key"].to_pylist()
    place = rows.column_names.index("key")
    texts = pa.array([keys.get(key, key) for key in column], pa.string())
    return rows.set_column(place, rows.schema.field(place), texts)
