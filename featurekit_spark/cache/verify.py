"""Whether every entry is what it says: its identity, its key and its value hashed again. Reads only.

A file that cannot be read is damage like any other and ends nothing. Types come from the builder's class where it is
given, else from what runs recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.cache import files
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.hashed import is_hashed
from featurekit_spark.cache.rows import run_records
from featurekit_spark.errors import CacheError, FeaturekitError
from featurekit_spark.fingerprint import entry_id, key_json, payload_hash
from featurekit_spark.values import NULL_HASH, value_type

__all__ = ["Damage", "Verified", "hash_by_type", "recorded_types", "verify"]

_COLUMNS = ("builder", "key", "config_hash", "value", "entry_id", "inputs_hash", "value_hash", "status")


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong; `key` is None where the whole file is."""

    file: str
    builder: str
    key: str | None
    what: str


@dataclass(frozen=True)
class Verified:
    """`rows` were looked at, of which `values` were hashed again; `untyped` have a type that nothing tells."""

    rows: int
    values: int
    untyped: int
    dangling: int
    damage: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "damage": [asdict(found) for found in self.damage]}


def verify(
    cache: DeltaCache,
    builders: Mapping[str, type[FeatureBuilder[Any]]] | None = None,
    *,
    only: str | None = None,
) -> Verified:
    """Every entry, hashed again. `builders`: classes by name; `only`: one builder's entries. `dangling` counts traces
    that name no entry: harmless, their keys are computed again."""
    counts = {"rows": 0, "values": 0, "untyped": 0}
    damage: list[Damage] = []
    try:
        table = cache.table("entries")
        types, hand = recorded_types(cache), _by_hand(cache)
    except CacheError as error:
        return Verified(0, 0, 0, 0, (Damage(cache.table_path("entries"), only or "", None, str(error)),))
    hashes = {name: _hash_of(cls) for name, cls in (builders or {}).items()}
    alive: set[str] = set()
    for file in files.data_files(table) if table is not None else ():
        if only is not None and file.builder != only:
            continue
        where = f"{cache.table_path('entries')}/{file.path}"
        seen = 0
        try:
            for rows in files.file_rows(cache, "entries", file, _COLUMNS):
                seen += len(rows)
                for row in rows.to_pylist():
                    if row["status"] == "ok":
                        alive.add(row["entry_id"])
                    hashed = hashes.get(file.builder) or types.get((file.builder, row["config_hash"]))
                    counts["values" if hashed is not None else "untyped"] += row["status"] == "ok"
                    damage += [
                        Damage(where, file.builder, row["key"], what)
                        for what in _wrong(row, hashed, by_hand=file.builder in hand)
                    ]
        except CacheError as error:
            damage.append(Damage(where, file.builder, None, str(error)))
        else:
            if seen != file.rows:
                damage.append(
                    Damage(where, file.builder, None, f"has {seen} rows, the table's log says {file.rows}")
                )
        counts["rows"] += seen
    dangling = 0 if damage else _dangling(cache, alive, only)
    return Verified(**counts, dangling=dangling, damage=tuple(damage))


def recorded_types(cache: DeltaCache) -> dict[tuple[str, str], Any]:
    """(builder, config_hash) -> how its values are hashed, as far as runs recorded their types."""
    types = {}
    for run in run_records(cache):
        for name, facts in (run.record.get("builders") or {}).items():
            if "type" in facts and "config_hash" in facts:
                types[name, facts["config_hash"]] = hash_by_type(facts["type"])
    return types


def hash_by_type(text: str) -> Any:
    """payload -> value_hash, for a type as run records and config hashes write it."""
    if text.startswith("float32["):
        grid = float(text.partition("@")[2])

        def vector_hash(payload: bytes) -> str:
            steps = np.rint(np.frombuffer(payload, "<f4").astype(np.float64) / grid).astype("<i8")
            return payload_hash("vector", steps.tobytes())

        return vector_hash
    kind = kind_of(text)
    return lambda payload: payload_hash(kind, payload)


def kind_of(text: str) -> str:
    """The tag of a value type's hashes, from its text."""
    if text.startswith("codec<"):
        return "codec"
    if "<" in text:
        return "json"
    if text.startswith(("int", "uint")):
        return "int"
    return text.split("[")[0].split("(")[0]


def _hash_of(cls: type[FeatureBuilder[Any]]) -> Any:
    kind = value_type(cls.value)
    if kind.grid is None:
        return lambda payload: payload_hash(kind.kind, payload)
    return lambda payload: kind.hash(kind.decode(payload))


def _wrong(row: Mapping[str, Any], hashed: Any, *, by_hand: bool) -> Iterator[str]:
    try:
        canonical = key_json(tuple(json.loads(row["key"])))
    except (ValueError, TypeError, FeaturekitError) as error:
        yield f"its key is no JSON array of plain fields: {error}"
        return
    if canonical != row["key"]:
        yield f"its key is not canonical: {canonical} is"
    if row["status"] not in ("ok", "error", "expired"):
        yield f"its status is {row['status']!r}"
    if row["entry_id"] is not None and row["inputs_hash"] is not None and not is_hashed(row["key"]):
        expected = entry_id(row["builder"], row["config_hash"], row["key"], row["inputs_hash"])
        if expected != row["entry_id"]:
            yield f"its entry_id is {row['entry_id']}, its parts make {expected}"
    if row["status"] != "ok":
        return
    if row["value"] is None:
        # A hand-written get may hash its value as it likes.
        if row["value_hash"] != NULL_HASH and not by_hand:
            yield "it has no value, and its value_hash is not that of none"
        return
    if hashed is not None and not by_hand:
        try:
            found = hashed(row["value"])
        except Exception as error:
            yield f"its value cannot be decoded: {type(error).__name__}: {error}"
            return
        if found != row["value_hash"]:
            yield f"its value hashes to {found}, and its value_hash is {row['value_hash']}"


def _by_hand(cache: DeltaCache) -> set[str]:
    """Builders with a hand-written get: their pointers keep what it read."""
    pointers = files.rows_of(cache, "traces", ("builder", "kind", "reads"))
    kinds, reads = pointers["kind"].to_pylist(), pointers["reads"].to_pylist()
    names = pointers["builder"].to_pylist()
    return {
        name
        for name, kind, read in zip(names, kinds, reads, strict=True)
        if kind == "pointer" and read is not None
    }


def _dangling(cache: DeltaCache, alive: set[str], only: str | None) -> int:
    named = files.rows_of(cache, "traces", ("builder", "entry_id"), None if only is None else {only})
    ids: pa.ChunkedArray = named["entry_id"]
    return sum(1 for i in ids.to_pylist() if i is not None and i not in alive)
