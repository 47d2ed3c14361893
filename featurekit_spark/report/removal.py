"""Taking somebody out of the documents and pages that runs left, with `[purged]` in their place.

Knows where they lie and that a page is made from its document. Must not know who has to go: it is given the words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from featurekit_spark.locks import local_path
from featurekit_spark.report.lists import list_page, neighbours
from featurekit_spark.report.page import run_page

__all__ = ["remove_from_documents"]


def remove_from_documents(warehouse: str, clean: Callable[[str], str | None], *, dry_run: bool) -> int:
    """Documents below `{warehouse}/runs` that `clean` changes (None: nothing to change), written anew with their
    pages; how many. Only on local paths."""
    root = local_path(f"{warehouse.rstrip('/')}/runs")
    if root is None or not root.is_dir():
        return 0
    found = 0
    for path in sorted(root.glob("*/*/*.json")):
        try:
            text = clean(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # no document of a run
        if text is None:
            continue
        found += 1
        if not dry_run:
            document = json.loads(text)
            listed = path.name.startswith(".")
            merchant, market = path.parent.parent.name, path.parent.name
            if listed:
                page = list_page(merchant, market, document["runs"])
            else:
                before, after = _around(path)
                page = run_page(document, before=before, after=after)
            _replace(path, text)
            _replace(path.with_name("index.html") if listed else path.with_suffix(".html"), page)
    return found


def _around(path: Path) -> tuple[str | None, str | None]:
    """The runs before and after one, as the list beside its document has them."""
    try:
        runs = json.loads(path.with_name(".index.json").read_text(encoding="utf-8"))["runs"]
        return neighbours(runs).get(path.stem, (None, None))
    except (OSError, ValueError, KeyError, TypeError):
        return None, None  # no list, or none that can be read


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # noqa: PTH105 - says that an existing file is replaced
