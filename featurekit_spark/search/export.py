"""Brings vectors to an index: finds what differs from what is there, and sends only that.

Owns the choice between changing rows in place and writing a new generation. Ids and hashes are held, vectors pass in
batches. Knows the protocol of an index, and no store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, Protocol

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.search.index import Row, VectorIndex, checked_rows

__all__ = ["Exported", "Payloads", "export_vectors"]


class Payloads(Protocol):
    """A payload for each row, in their order; a list will do, and what reads a part when it is asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Exported:
    """What an export did. `how`: nothing differed; rows changed in place; or all written anew and then switched to.

    `rows` are in the index now; `sent`, `same` and `removed` say how they came there.
    """

    how: Literal["unchanged", "changed", "replaced"]
    rows: int
    sent: int
    same: int
    removed: int
    generation: str
    content: str
    seconds: float


def export_vectors(
    index: VectorIndex,
    ids: Sequence[str],
    vectors: Any,
    payloads: Payloads | None = None,
    *,
    batch: int = 1000,
    in_place: float = 0.2,
    dry_run: bool = False,
) -> Exported:
    """Make `index` hold exactly these rows: vectors float32 [len(ids), dim], which may be memory-mapped.

    Where at most the share `in_place` of the rows differ, they are changed in the generation that is searched: each is
    the old or the new one. Else, and where the index was made for other vectors, all go to a new generation, and a
    search sees the old whole or the new whole. Killed, it is run again: what was sent is not sent twice.

    One export per index at a time. Raises what VectorIndex says; before anything is sent where rows are refused.
    """
    started = time.monotonic()
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"id {twice!r} is given twice; ids must be distinct")
    for what, given in (("vectors", vectors), ("payloads", payloads)):
        if given is not None and len(given) != len(ids):
            raise UsageError(f"{len(given)} {what} for {len(ids)} ids; give one per id")
    rows = _Rows(index, ids, vectors, payloads, batch)
    hashes = {row.id: row.hash for some in rows.batches() for row in some}
    content = _content(hashes)
    state = index.describe()
    fits = state is not None and state.spec == index.spec
    if state is not None and fits and state.content == content:
        return Exported(
            "unchanged", len(ids), 0, len(ids), 0, state.generation, content, time.monotonic() - started
        )
    there = dict(index.hashes()) if fits else {}
    changed = {name for name, own in hashes.items() if there.get(name) != own}
    gone = [name for name in there if name not in hashes]
    how: Literal["changed", "replaced"] = (
        "changed" if fits and there and len(changed) + len(gone) <= in_place * len(there) else "replaced"
    )
    generation = "" if state is None else state.generation
    if dry_run:
        sent, same, removed = (
            (len(changed), len(ids) - len(changed), len(gone)) if how == "changed" else (len(ids), 0, 0)
        )
    elif how == "changed":
        index.change(rows.batches(changed), gone, content)
        sent, same, removed = len(changed), len(ids) - len(changed), len(gone)
    else:
        written = index.replace(rows.batches(), content)
        sent, same, removed = written.sent, written.same, written.removed
        now = index.describe()
        generation = "" if now is None else now.generation
    return Exported(how, len(ids), sent, same, removed, generation, content, time.monotonic() - started)


@dataclass(frozen=True)
class _Rows:
    index: VectorIndex
    ids: Sequence[str]
    vectors: Any
    payloads: Payloads | None
    batch: int

    def batches(self, among: set[str] | None = None) -> Iterator[list[Row]]:
        """All rows, or those among these ids; of these as many at once as of all, however far apart they are."""
        gathered: list[Row] = []
        for start in range(0, len(self.ids), self.batch):
            part = slice(start, start + self.batch)
            names = self.ids[part]
            if among is not None and among.isdisjoint(names):
                continue
            payloads = None if self.payloads is None else self.payloads[part]
            rows = checked_rows(self.index.spec, names, self.vectors[part], payloads)
            gathered += rows if among is None else [row for row in rows if row.id in among]
            if len(gathered) >= self.batch or among is None:
                yield gathered
                gathered = []
        if gathered:
            yield gathered


def _content(hashes: Mapping[str, str]) -> str:
    image = sha256(b"vector rows\n")
    for name in sorted(hashes):
        image.update(f"{len(name)} {name} {hashes[name]}\n".encode())
    return image.hexdigest()[:32]
