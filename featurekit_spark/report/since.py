"""What is different from the run before: configs and code of builders, settings, software and the number of products.

A function of two documents. Must not know why single keys were computed: `featurekit explain` tells that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["since"]

Change = dict[str, Any]

_PARTS = ("type", "version", "config")


def since(before: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """`run_id`, `status`, `started` and `products` of `before`, and `changes`: what, before, now. Values are those of
    the documents, so that secrets are masked already."""
    told: dict[str, Any] = {name: before.get(name) for name in ("run_id", "status", "started", "products")}
    told["changes"] = [
        *_builders(before, document),
        *_settings(before, document),
        *_versions(before, document),
    ]
    return told


def _builders(before: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Change]:
    old, new = before.get("identities") or {}, document.get("identities") or {}
    if not old or not new:
        return  # one of them did not come so far
    for name in dict.fromkeys([*new, *old]):
        if name not in old or name not in new:
            yield _change(
                f"builder {name}", "there" if name in old else None, "there" if name in new else None
            )
        elif old[name].get("config_hash") != new[name].get("config_hash"):
            parts = [part for part in _PARTS if old[name].get(part) != new[name].get(part)] or ["config_hash"]
            for part in parts:
                told = f"{part.replace('_', ' ')} of {name}"
                yield _change(told, old[name].get(part), new[name].get(part))


def _settings(before: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Change]:
    old = {setting["key"]: setting["value"] for setting in before.get("settings") or []}
    new = {setting["key"]: setting["value"] for setting in document.get("settings") or []}
    yield from _pairs("setting", old, new)


def _versions(before: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Change]:
    yield from _pairs("version of", before.get("versions") or {}, document.get("versions") or {})


def _pairs(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    if old and new:
        for name in dict.fromkeys([*new, *old]):
            if old.get(name) != new.get(name):
                yield _change(f"{kind} {name}", old.get(name), new.get(name))


def _change(what: str, before: object, now: object) -> Change:
    return {"what": what, "before": before, "now": now}
