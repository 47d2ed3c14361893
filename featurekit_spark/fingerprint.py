"""Tagged hashes: every identity in the library is a sha256 over a pre-image that starts with its kind.

Pure functions of text and bytes. A digest is the first 16 bytes of sha256, written as 32 hex characters,
so that SQL can show, join and recompute it. The digests are part of the cache's format: tests pin them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from json.encoder import encode_basestring
from pathlib import PurePath
from typing import Any

from featurekit_spark.errors import DefinitionError

__all__ = [
    "GROUP_BUCKETS",
    "bucket_digests",
    "bucket_of",
    "canonical_json",
    "config_hash",
    "digest",
    "entry_id",
    "group_hash",
    "inputs_hash",
    "key_json",
    "payload_hash",
]

GROUP_BUCKETS = 256
quote: Callable[[str], str] = encode_basestring


def digest(kind: str, *parts: str) -> str:
    """Hash `parts` under the tag `kind`; each part carries its length, so that no two lists collide."""
    image = [kind]
    image += [f"{len(part)}:{part}" for part in parts]
    return sha256("\n".join(image).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def payload_hash(kind: str, payload: bytes) -> str:
    """Hash a value's canonical bytes. For plain columns Spark SQL computes the same:
    `substr(sha2(concat('string:', column), 256), 1, 32)`."""
    return sha256(kind.encode() + b":" + payload).hexdigest()[:32]


def entry_id(builder: str, config: str, key: str, inputs: str) -> str:
    """Identity of one cached value. The key comes last, the other parts cannot hold a newline."""
    return sha256(f"entry\n{builder}\n{config}\n{inputs}\n{key}".encode()).hexdigest()[:32]


def inputs_hash(keyed: Sequence[str], group: Sequence[str] = ()) -> str:
    """Hash of what a build reads: its keyed inputs' value hashes in dep order, then its gathered groups'."""
    return sha256(f"inputs\n{','.join(keyed)}\n{','.join(group)}".encode()).hexdigest()[:32]


def bucket_of(key: str) -> str:
    """The bucket of a member in the tree of `group_hash`."""
    return sha256(key.encode()).hexdigest()[:2]


def group_hash(pairs: Iterable[tuple[str, str]], buckets: Iterable[str] | None = None) -> str:
    """Hash over (member key, value hash) pairs in any order.

    A two-level tree: each member falls into one of 256 buckets by its key, a bucket's digest is over
    its sorted pairs, the result over the buckets' digests. Spark computes the buckets in parallel
    and only their digests meet on the driver. `buckets`: those of the keys, where they are known.
    """
    found: dict[str, list[str]] = {}
    if buckets is None:
        for key, value in pairs:
            found.setdefault(bucket_of(key), []).append(f"{key}={value}")
    else:
        for (key, value), bucket in zip(pairs, buckets, strict=True):
            found.setdefault(bucket, []).append(f"{key}={value}")
    return bucket_digests(
        (name, sha256(",".join(sorted(members)).encode()).hexdigest()[:32]) for name, members in found.items()
    )


def bucket_digests(digests: Iterable[tuple[str, str]]) -> str:
    """Close the tree of `group_hash` over (bucket, digest) pairs."""
    return digest("group", *(f"{name}={value}" for name, value in sorted(digests)))


def key_json(key: Sequence[Any]) -> str:
    """A key as canonical JSON: an array of its fields, no spaces, text as it is (never normalised)."""
    try:
        return f"[{','.join(map(quote, key))}]"
    except TypeError:
        return _mixed_key_json(key)


def member_texts(group: Sequence[Any], members: Sequence[Any]) -> list[str]:
    """`key_json` of every member's key: the group's fields, then the member. Plain text takes one pass for all."""
    if members and all(type(member) is str for member in members):
        from pyarrow import array, compute

        plain = array(members)
        if not compute.any(compute.match_substring_regex(plain, r'["\\\x00-\x1f]')).as_py():
            tail = '"]'
            head = key_json((*group, "")).removesuffix(tail)
            texts: list[str] = compute.binary_join_element_wise(head, plain, tail, "").to_pylist()
            return texts
    return [key_json((*group, member)) for member in members]


def _mixed_key_json(key: Sequence[Any]) -> str:
    parts = []
    for field in key:
        match field:
            case str():
                parts.append(quote(field))
            case bool():
                parts.append("true" if field else "false")
            case int():
                parts.append(str(field))
            case _:
                raise DefinitionError(
                    f"key field {field!r} is a {type(field).__name__}; keys hold text, integers and booleans. "
                    "Convert it to text in the builder that yields it."
                )
    return f"[{','.join(parts)}]"


def canonical_json(value: Any) -> str:
    """A config value as canonical JSON: sorted mappings, tagged dataclasses, no address or order of chance."""
    return json.dumps(_plain(value, "config"), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _plain(value: Any, path: str) -> Any:
    match value:
        case Enum():  # before text and numbers, which an enum may be too
            return _plain(value.value, path)
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return {"bytes": value.hex()}
        case datetime() | date():
            return {"time": value.isoformat()}
        case timedelta():
            return {"seconds": value.total_seconds()}
        case Decimal() | PurePath():
            return {type(value).__name__.lower(): str(value)}
        case Mapping():
            return {str(name): _plain(item, f"{path}.{name}") for name, item in value.items()}
        case set() | frozenset():
            return {"set": sorted(json.dumps(_plain(item, path), sort_keys=True) for item in value)}
        case list() | tuple():
            return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name), f"{path}.{field.name}") for field in fields}
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"), path)
    raise DefinitionError(
        f"{path} is a {type(value).__name__}, which has no stable hash. Use plain values, dataclasses, "
        "mappings and sequences in a config; clients and connections belong in the context."
    )


def config_hash(builder: str, value_type: str, version: str, config: Any) -> str:
    """Identity of a builder as it is configured: name, value type, version, own config."""
    return digest("config", builder, value_type, version, canonical_json(config))
