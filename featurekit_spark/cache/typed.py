"""Cached rows as their builder's types: key fields, value, ts. Pure."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.values import typed_column, value_type

__all__ = ["typed_rows"]


def typed_rows(rows: pa.Table, builder: type[FeatureBuilder[Any]]) -> pa.Table:
    """ENTRY_SCHEMA rows of one builder as a typed table: its key fields, value, ts, value_hash, config_hash, run_id.

    A vector is a list of float32; a codec's value stays the bytes that its `encode` made.
    """
    kind = value_type(builder.value)
    keys = [json.loads(text) for text in rows["key"].to_pylist()]
    payloads = rows["value"].to_pylist()
    columns: dict[str, Any] = {
        field: pa.array([key[i] for key in keys], None if keys else pa.string())
        for i, field in enumerate(builder.key)
    }
    if kind.kind == "codec":
        columns["value"] = pa.array(payloads, pa.binary())
    else:
        columns["value"] = typed_column([None if p is None else kind.decode(p) for p in payloads], kind)
    return pa.table(
        {**columns, **{name: rows[name] for name in ("ts", "value_hash", "config_hash", "run_id")}}
    )
