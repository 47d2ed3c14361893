"""Cached values for people and other programs: one key's entries decoded, a builder's current values as a file.

Reads only. Types come from the builder's class where it is given, else from what runs recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache.base import ENTRY_SCHEMA
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import hashed_key, named
from featurekit_spark.cache.invalidate import known_builders
from featurekit_spark.cache.rows import run_records
from featurekit_spark.cache.typed import typed_rows
from featurekit_spark.errors import UsageError, known_names
from featurekit_spark.fingerprint import key_json
from featurekit_spark.values import value_type

__all__ = ["export", "parse_key_text", "show"]

_SHOWN_NUMBERS = 8


def parse_key_text(text: str) -> str:
    """A key as it is typed, `["abt","US","p1"]` or one field as it is, as canonical JSON. Raises UsageError."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    fields = found if isinstance(found, list) else [text]
    if not fields or not all(isinstance(field, str | int) for field in fields):
        raise UsageError(
            f'key {text!r} is none: write a JSON array of its fields, such as \'["abt","US","p1"]\''
        )
    return key_json(fields)


def show(
    cache: DeltaCache, builder: str, key: str, cls: type[FeatureBuilder[Any]] | None = None
) -> dict[str, Any]:
    """Everything about one key (canonical JSON): its entries newest first, decoded, and which of them is current.

    Raises UsageError where there is none, naming keys that exist.
    """
    rows = cache.history(builder)
    if not len(rows):
        raise UsageError(
            f"builder {builder!r} has no entries in {cache.path}. {known_names(builder, known_builders(cache))}"
        )
    hashed = hashed_key(key)
    own = rows.filter(pc.is_in(rows["key"], pa.array([key, hashed], pa.string())))
    own = named(own, {hashed: key}).sort_by([("recorded", "descending")])
    if not len(own):
        some = sorted(set(rows["key"].slice(0, 1000).to_pylist()))[:3]
        raise UsageError(f"{builder} has no entry for the key {key}. Some that it has: {', '.join(some)}")
    types = _types(cache, builder)
    now = set(_current(cache, builder, own))
    entries = []
    for row in own.to_pylist():
        entries.append(
            {
                "current": row["status"] == "ok" and row["entry_id"] in now,
                "status": row["status"],
                "value": decoded(row["value"], types.get(row["config_hash"]), cls)
                if row["status"] == "ok"
                else decoded(row["value"], None, None),
                "error": row["error"],
                "ts": row["ts"],
                "seconds": row["seconds"],
                "tokens": row["tokens"],
                "usd": row["usd"],
                "run_id": row["run_id"],
                "config_hash": row["config_hash"],
                "inputs_hash": row["inputs_hash"],
                "value_hash": row["value_hash"],
                "entry_id": row["entry_id"],
            }
        )
    return {"builder": builder, "key": key, "entries": entries}


def export(cache: DeltaCache, builder: str, to: Path, cls: type[FeatureBuilder[Any]] | None = None) -> int:
    """Write a builder's current values to PATH.parquet, .csv or .jsonl; how many rows.

    Typed with the builder's class; without it the key's fields are one column and the values what run records make
    of them. Raises UsageError.
    """
    if to.suffix not in (".parquet", ".csv", ".jsonl"):
        raise UsageError(f"{str(to)!r} cannot be written: give a name that ends in .parquet, .csv or .jsonl")
    newest = cache.newest(builder)
    if not len(newest):
        raise UsageError(
            f"builder {builder!r} has no entries in {cache.path}. {known_names(builder, known_builders(cache))}"
        )
    newest = newest.sort_by("key")
    rows = typed_rows(newest, cls) if cls is not None else _untyped(newest, _types(cache, builder))
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part")
    try:
        _write(rows, part, to.suffix)
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)
    return len(rows)


def decoded(payload: bytes | None, text: str | None, cls: type[FeatureBuilder[Any]] | None) -> Any:
    """A value as plain Python for showing; what nothing tells the type of as text, else as hex."""
    if payload is None:
        return None
    if cls is not None:
        kind = value_type(cls.value)
        if kind.kind != "vector":
            return kind.decode(payload)
        text = "float32["
    if text is not None and text.startswith("float32["):
        found = np.frombuffer(payload, "<f4")
        first = ", ".join(f"{number:.6g}" for number in found[:_SHOWN_NUMBERS])
        return f"float32[{len(found)}] [{first}{', ...' if len(found) > _SHOWN_NUMBERS else ''}]"
    if text in ("binary", "large_binary") or (text is not None and text.startswith("codec<")):
        return payload.hex()
    try:
        plain = payload.decode()
    except UnicodeDecodeError:
        return payload.hex()
    if text is None or text in ("string", "large_string"):
        return plain
    try:
        return json.loads(plain)
    except ValueError:
        return plain


def _types(cache: DeltaCache, builder: str) -> dict[str, str]:
    """config_hash -> type, as runs recorded it."""
    types = {}
    for run in run_records(cache):
        facts = (run.record.get("builders") or {}).get(builder, {})
        if "type" in facts and "config_hash" in facts:
            types[facts["config_hash"]] = facts["type"]
    return types


def _current(cache: DeltaCache, builder: str, rows: pa.Table) -> list[str]:
    (key,) = rows["key"].unique().to_pylist()
    found = []
    for config in rows["config_hash"].unique().to_pylist():
        hits = cache.current(builder, config, [key])
        found += [hit.entry.entry_id for hit in hits.values()]
    return found


def _untyped(rows: pa.Table, types: Mapping[str, str]) -> pa.Table:
    configs, payloads = rows["config_hash"].to_pylist(), rows["value"].to_pylist()
    values = []
    for config, payload in zip(configs, payloads, strict=True):
        text = types.get(config, "")
        if payload is not None and text.startswith("float32["):
            values.append(np.frombuffer(payload, "<f4").tolist())
        else:
            values.append(decoded(payload, types.get(config), None))
    kept = [name for name in ("ts", "value_hash", "config_hash", "run_id") if name in ENTRY_SCHEMA.names]
    try:
        column = pa.array(values)
    except pa.ArrowException:  # types that changed between configs
        column = pa.array([json.dumps(value, ensure_ascii=False, default=str) for value in values])
    return pa.table({"key": rows["key"], "value": column, **{name: rows[name] for name in kept}})


def _write(rows: pa.Table, to: Path, form: str) -> None:
    if form == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(rows, to)
    elif form == ".jsonl":
        with to.open("w", encoding="utf-8") as file:
            for batch in rows.to_batches(max_chunksize=10_000):
                for row in batch.to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
    else:
        from pyarrow import csv

        columns = {}
        for name in rows.column_names:
            column = rows[name]
            if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
                texts = [
                    None if value is None else json.dumps(value, ensure_ascii=False, default=_plain)
                    for value in column.to_pylist()
                ]
                column = pa.array(texts, pa.string())
            columns[name] = column
        csv.write_csv(pa.table(columns), to)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
