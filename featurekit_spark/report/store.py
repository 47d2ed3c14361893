"""Where the documents and pages of runs lie: `{warehouse}/runs/{merchant}/{market}/{run_id}.json` and `.html`.

Owns names, whole writes (a reader never sees half a file) and the lists of runs. Must not know how a run is carried
out. Local folders need nothing but the standard library; other storage goes through pyarrow.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from featurekit_spark.config import check_name
from featurekit_spark.errors import DataError, UsageError, known_names
from featurekit_spark.locks import file_lock, local_path
from featurekit_spark.report.lists import groups_page, list_page, neighbours
from featurekit_spark.report.page import run_page
from featurekit_spark.report.since import since
from featurekit_spark.report.spending import by_day

__all__ = ["LISTED", "RunStore", "check_run_id"]

LISTED: Final = 200
"""How many runs of a merchant and market the lists name, newest first. Older ones keep their documents."""

_LIST = ".index.json"  # no run has a name that begins with a dot
_LOOKED_BACK: Final = 5  # runs that failed early tell little of what changed
_TAKEN = ("index", "latest")
_SUMMARY = (
    *("run_id", "merchant", "market", "run_date", "status", "started", "wall_seconds"),
    *("products", "unchanged", "error"),
)


def check_run_id(run_id: str) -> str:
    """`run_id` if a run can be called that, else UsageError."""
    if run_id in _TAKEN:
        raise UsageError(
            f"run id {run_id!r} cannot be used: the lists of runs are called that; give another."
        )
    return check_name("run id", run_id)


class RunStore:
    """The runs below a warehouse (a folder, or an address that pyarrow knows)."""

    def __init__(self, warehouse: str) -> None:
        self.root = f"{warehouse.rstrip('/')}/runs"
        local = local_path(self.root)
        self._files: _Local | _Remote = _Local(local) if local is not None else _Remote(self.root)

    def write(self, document: Mapping[str, Any]) -> str:
        """Keep a run's document and page, and put it on the lists; the page's place. A run of the same name before it
        is replaced, and told of under `earlier`. Runs before and after it link to it from now on."""
        merchant, market, run_id = document["merchant"], document["market"], document["run_id"]
        folder = f"{merchant}/{market}"
        before = self._document(f"{folder}/{run_id}.json")
        if before:
            told = {name: before.get(name) for name in ("status", "started", "ended", "error")}
            document = {**document, "earlier": [*before.get("earlier", []), told]}
        known = self._others(folder, run_id)
        document = {**document, **self._since(folder, document, known)}
        days = by_day([_summary(document), *known])
        document |= {"spending": days} if days else {}
        around = neighbours(_newest_first([_summary(document), *known]))[run_id]
        self._files.write(f"{folder}/{run_id}.json", _json(document))
        self._write_page(folder, document, around)
        with self._files.lock(folder):
            known = self._others(folder, run_id)
            first = not known
            old = neighbours(_newest_first([*known, _summary(before)] if before else known))
            runs = _newest_first([_summary(document), *known])
            for name, moved in neighbours(runs).items():
                if moved != (around if name == run_id else old.get(name)):
                    self._write_page(folder, self._document(f"{folder}/{name}.json"), moved)
            runs = runs[:LISTED]
            self._files.write(f"{folder}/{_LIST}", _json({"runs": runs}))
            self._files.write(f"{folder}/index.html", list_page(merchant, market, runs))
        if first:
            self._files.write("index.html", groups_page(self.groups()))
        return f"{self.root}/{folder}/{run_id}.html"

    def groups(self) -> list[tuple[str, str]]:
        """Every (merchant, market) that has runs."""
        return [
            (merchant, market)
            for merchant in self._files.folders("")
            for market in self._files.folders(merchant)
        ]

    def runs(self, merchant: str, market: str) -> list[dict[str, Any]]:
        """Summaries of the runs of one merchant and market, newest first."""
        return self._listed(f"{merchant}/{market}")

    def read(self, merchant: str, market: str, run_id: str) -> dict[str, Any]:
        """The document of a run; `latest` is the newest. Raises UsageError for one that is unknown."""
        folder = f"{merchant}/{market}"
        runs = self._listed(folder)
        if run_id == "latest" and runs:
            run_id = runs[0]["run_id"]
        check_name("run id", run_id)
        found = self._document(f"{folder}/{run_id}.json")
        if found == {}:
            raise DataError(f"{self.root}/{folder}/{run_id}.json is no document of a run; move it away.")
        if found is None:
            known = known_names(run_id, [run["run_id"] for run in runs[:10]])
            raise UsageError(f"no run {run_id!r} of {merchant} in {market} below {self.root!r}. {known}")
        return found

    def page(self, merchant: str, market: str, run_id: str) -> str:
        """Where a run's page lies."""
        return f"{self.root}/{merchant}/{market}/{run_id}.html"

    def _since(self, folder: str, document: Mapping[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
        """`since`: what is different from the run before that came as far as a plan, where there is one."""
        started = document.get("started") or ""
        earlier = (run for run in known if (run.get("started") or "") <= started)
        for run in islice(earlier, _LOOKED_BACK):
            before = self._document(f"{folder}/{run['run_id']}.json")
            if before and before.get("identities"):
                return {"since": since(before, document)}
        return {}

    def _write_page(
        self, folder: str, document: Mapping[str, Any] | None, around: tuple[str | None, str | None]
    ) -> None:
        if document:
            page = run_page(document, before=around[0], after=around[1])
            self._files.write(f"{folder}/{document['run_id']}.html", page)

    def _others(self, folder: str, run_id: str) -> list[dict[str, Any]]:
        return [run for run in self._listed(folder) if run["run_id"] != run_id]

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        text = self._files.read(f"{folder}/{_LIST}")
        try:
            runs = None if text is None else list(json.loads(text)["runs"])
        except (ValueError, KeyError, TypeError):
            runs = None  # a list can always be made again from the documents
        if runs is None:
            names = (name for name in self._files.files(folder) if name.endswith(".json") and name != _LIST)
            documents = (self._document(f"{folder}/{name}") for name in names)
            runs = _newest_first([_summary(found) for found in documents if found])[:LISTED]
        return runs

    def _document(self, name: str) -> dict[str, Any] | None:
        """None where there is none, empty where it is damaged."""
        text = self._files.read(name)
        if text is None:
            return None
        try:
            found: dict[str, Any] = json.loads(text)
            return {**found, "run_id": found["run_id"]}
        except (ValueError, KeyError, TypeError):
            return {}


class _Local:
    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            part.write_bytes(text.encode("utf-8", "replace"))
            os.replace(part, path)  # noqa: PTH105 - says that an existing file is replaced
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> str | None:
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def files(self, folder: str) -> list[str]:
        return self._names(folder, folders=False)

    def folders(self, folder: str) -> list[str]:
        return self._names(folder, folders=True)

    def lock(self, folder: str) -> Any:
        # Not the run's own lock: a run that was refused because of that one is on the list as well.
        return file_lock(self.root / folder / ".lock", timeout_s=10)

    def _names(self, folder: str, *, folders: bool) -> list[str]:
        path = self.root / folder
        if not path.is_dir():
            return []
        return sorted(p.name for p in path.iterdir() if p.is_dir() is folders and not p.name.startswith("."))


class _Remote:
    """Object stores make a whole object or none when a stream is closed, and have no locks."""

    def __init__(self, root: str) -> None:
        from featurekit_spark.cache.storage import storage_of

        self._fs = storage_of(root, {})

    def write(self, name: str, text: str) -> None:
        self._fs.create_dir(name.rpartition("/")[0] or ".", recursive=True)
        with self._fs.open_output_stream(name) as stream:
            stream.write(text.encode("utf-8", "replace"))

    def read(self, name: str) -> str | None:
        if not self._fs.get_file_info(name).is_file:
            return None
        with self._fs.open_input_stream(name) as stream:
            return str(stream.read().decode())

    def files(self, folder: str) -> list[str]:
        return [info.base_name for info in self._infos(folder) if info.is_file]

    def folders(self, folder: str) -> list[str]:
        return [info.base_name for info in self._infos(folder) if not info.is_file]

    def lock(self, folder: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def _infos(self, folder: str) -> list[Any]:
        from pyarrow import fs

        found = self._fs.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return sorted(found, key=lambda info: info.base_name)


def _summary(document: Mapping[str, Any]) -> dict[str, Any]:
    summary = {name: document.get(name) for name in _SUMMARY}
    builders = document.get("builders") or {}
    summary["failed_keys"] = (document.get("errors") or {}).get("total")
    for name in ("hit", "updated", "computed", "empty", "error", "calls", "tokens", "failed_attempts"):
        summary[f"{name}_total"] = sum(counts.get(name) or 0 for counts in builders.values())
    amounts = [counts.get("usd", 0) for counts in builders.values()]
    summary["usd_total"] = None if None in amounts else round(sum(amounts), 6)
    return summary


def _newest_first(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda run: run.get("started") or "", reverse=True)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, default=str) + "\n"
