"""Calls that were handed in as batches and whose answers are not in the cache yet, by the group whose run asked.

Reads what is written down of batches and of runs; asks no provider, and changes nothing. Must not know how sums are
shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.storage import storage_of
from featurekit_spark.llm.batch_records import Stage
from featurekit_spark.masks import mask_password

__all__ = ["OnTheWay", "batches_folder", "on_the_way"]

_PIECE: Final = 1 << 20
_WAITED_FOR: Final = (Stage.CREATING, Stage.SUBMITTED, Stage.ANSWERED)


@dataclass(frozen=True)
class OnTheWay:
    """`group`: of the run that handed them in (None: it left no record); `model`: who answers them. `answered`: calls
    whose answers have come, and wait for a run to take them in; `since`: when the oldest batch was handed in."""

    group: tuple[Any, ...] | None
    model: str
    batches: int
    calls: int
    answered: int
    since: datetime

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "group": None if self.group is None else list(self.group),
            "model": self.model,
            "batches": self.batches,
            "calls": self.calls,
            "answered": self.answered,
            "since": self.since.isoformat(timespec="seconds"),
        }


def batches_folder(cache_path: str) -> str:
    """Where batches are written down, beside the cache."""
    return f"{cache_path.rstrip('/')}/batches"


def on_the_way(
    folder: str, records: Sequence[RunRecord], options: Mapping[str, str] | None = None
) -> list[OnTheWay]:
    """By group and model. What was written down and never handed in is left out: a run hands it in anew."""
    storage = storage_of(folder, options or {})
    groups = {record.run_id: tuple(json.loads(record.group)) for record in records}
    found: dict[tuple[Any, str], OnTheWay] = {}
    for tag, told in _submissions(storage):
        group, model = groups.get(told["run_id"]), mask_password(told["identity"])
        came = told["stage"] == Stage.ANSWERED
        calls = _lines(storage, f"{tag}.{'answers' if came else 'requests'}.jsonl")
        since = datetime.fromtimestamp(told.get("since") or told["at"], UTC)
        before = found.get((group, model)) or OnTheWay(group, model, 0, 0, 0, since)
        found[group, model] = OnTheWay(
            group,
            model,
            before.batches + 1,
            before.calls + calls,
            before.answered + calls * came,
            min(before.since, since),
        )
    return [found[place] for place in sorted(found, key=lambda place: (place[0] is None, str(place)))]


def _submissions(storage: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and record of each that may be at the provider, or was answered."""
    from pyarrow import fs

    infos = storage.get_file_info(fs.FileSelector("", allow_not_found=True))
    for name in sorted(info.base_name for info in infos if info.extension == "json"):
        try:
            with storage.open_input_file(name) as file:
                told = json.loads(file.read())
            if not name.startswith(".") and Stage(told["stage"]) in _WAITED_FOR:
                yield name.removesuffix(".json"), {**told, "run_id": told["run_id"], "at": told["at"]}
        # A run has just taken it in; or it is damaged, which the next run says, and what to do.
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue


def _lines(storage: Any, name: str) -> int:
    lines = 0
    try:
        with storage.open_input_stream(name) as stream:
            while piece := stream.read(_PIECE):
                lines += piece.count(b"\n")
    except FileNotFoundError:
        return lines
    return lines
