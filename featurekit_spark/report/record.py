"""The JSON document of one run: what was planned, done, counted, timed and said, with what software and settings.

Reads results, executions and settings; must not know pipelines, nor where documents are kept. Imports nothing slow:
a document is made at the end of every run, also of one that had nothing to do.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import featurekit_spark
from featurekit_spark.masks import masked

if TYPE_CHECKING:
    from featurekit_spark.settings import Settings

__all__ = ["DOCUMENT_SCHEMA", "KEPT_ERRORS", "computed_facts", "run_document", "settings_facts", "versions"]

DOCUMENT_SCHEMA: Final = 1
KEPT_ERRORS: Final = 100
"""How many failed keys a document holds; all of them are in the cache."""

_LIBRARIES = ("pyspark", "delta-spark", "deltalake", "pyarrow", "pandas", "numpy", "redis", "openai")


def run_document(
    facts: Mapping[str, Any],
    *,
    started: datetime,
    ended: datetime,
    execution: Any = None,
    errors: Mapping[str, str] | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """`facts` (run_id, merchant, market, status, counts, sinks ...: what the command prints) with all that is known
    beside them. `execution` may have ended anywhere, or never have begun; `errors`: failed keys and why."""
    failed = errors or {}
    kept = [{"key": key, "error": masked(text)} for key, text in list(failed.items())[:KEPT_ERRORS]]
    document: dict[str, Any] = {
        "schema": DOCUMENT_SCHEMA,
        **facts,
        "started": _instant(started),
        "ended": _instant(ended),
        "engine": settings.engine.kind if settings is not None else None,
        **computed_facts(execution),
        "errors": {"total": len(failed), "first": kept},
        "versions": versions(),
        "settings": settings_facts(settings) if settings is not None else [],
    }
    if document.get("error"):
        document["error"] = masked(str(document["error"]))
    return document


def computed_facts(execution: Any) -> dict[str, Any]:
    """`plan` (text), `stages` (label and seconds, in the order in which they ran) and `identities` of the builders: as
    far as an execution came. Nothing of what it holds is read from a cache."""
    plan = getattr(execution, "plan", None)
    seconds = getattr(execution, "seconds", {})
    return {
        "plan": plan.explain() if plan is not None else None,
        "stages": [{"stage": label, "seconds": round(spent, 4)} for label, spent in seconds.items()],
        "identities": _identities(execution),
    }


def settings_facts(settings: Settings) -> list[dict[str, Any]]:
    """Every setting with its value and origin, secrets masked."""
    return [
        {"key": leaf.key, "value": _masked_deep(leaf.value), "origin": masked(leaf.origin)}
        for leaf in settings.leaves()
    ]


def versions() -> dict[str, str]:
    """Versions by name. Of libraries that are installed, whether they were loaded or not; Java's where it is known
    without starting one."""
    found = {"featurekit_spark": featurekit_spark.__version__, "python": platform.python_version()}
    installed = _installed()
    for name in _LIBRARIES:
        module = name.replace("-", "_")
        version = getattr(sys.modules.get(module), "__version__", None) or installed.get(module)
        if version is not None:
            found[name] = str(version)
    java = _java_version()
    if java is not None:
        found["java"] = java
    return found


def _masked_deep(value: object) -> object:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, list):
        return [_masked_deep(item) for item in value]
    if isinstance(value, dict):
        return {key: _masked_deep(item) for key, item in value.items()}
    return value


def _identities(execution: Any) -> dict[str, dict[str, str]]:
    """By builder what its entries are found by: value type, version, config and its hash."""
    bindings = getattr(getattr(execution, "job", None), "bindings", None)
    if bindings is None:
        return {}
    found = {}
    for builder in execution.graph:
        bound = bindings[builder]
        found[builder.name] = {
            "type": bound.type.text,
            "version": bound.version,
            "config_hash": bound.config_hash,
            "config": masked(repr(bound.config)),
        }
    return found


def _installed() -> dict[str, str]:
    """Versions by the names of their folders: `importlib.metadata` loads a mail reader and parses a file for each."""
    found: dict[str, str] = {}
    for place in sys.path:
        try:
            names = os.listdir(place or ".")  # noqa: PTH208 - names are all that is wanted
        except OSError:
            continue  # a zip file, or nothing
        for name, dash, version in (
            n.removesuffix(".dist-info").partition("-") for n in names if "dist-info" in n
        ):
            if dash:
                found.setdefault(name.lower(), version)
    return found


def _java_version() -> str | None:
    """From the `release` file that every JDK has."""
    home = os.environ.get("JAVA_HOME")
    java = None if home else shutil.which("java")
    folder = Path(home) if home else Path(java).resolve().parent.parent if java else None
    if folder is None:
        return None
    try:
        text = (folder / "release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r'^JAVA_VERSION="?([^"\n]+)', text, re.MULTILINE)
    return found[1] if found else None


def _instant(ts: datetime) -> str:
    return ts.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
