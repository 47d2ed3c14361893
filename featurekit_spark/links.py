"""Where the keys of a reader lead: to one key of a dep, to many, to a whole group, or to a result that already decides.

Knows declarations and results; resolves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from featurekit_spark.batch import decided, fold
from featurekit_spark.builder import Dep, Each, Gathered
from featurekit_spark.fingerprint import group_hash, key_json
from featurekit_spark.results import Result

__all__ = ["Link", "gathered", "links_of"]

Key = tuple[Any, ...]
Link: TypeAlias = Key | list[Key | None] | Result
"""A key, a list of keys (None: a null item), or a result that already decides (null, failed)."""


def links_of(
    dep: Dep, fields: tuple[str, ...], keys: Sequence[Key], columns: Mapping[str, Sequence[Result]]
) -> list[Link]:
    """Where each reader key leads, by `columns`: for each field of the dep's key that is a value, the results."""
    wanted = dep.builder.key
    if not dep.on_fields:
        if wanted == fields:
            return list(keys)
        at = [fields.index(field) for field in wanted]
        return [tuple(key[i] for i in at) for key in keys]
    fan = next((wanted.index(field) for field, source in dep.on_fields if isinstance(source, Each)), None)
    # Each field of the dep's key: a column of values, or a place in the reader's key.
    parts = [(columns.get(f), None if f in columns else fields.index(f)) for f in wanted]
    cells = list(columns.values())
    links: list[Link] = []
    for row, key in enumerate(keys):
        found = decided([column[row] for column in cells])
        if found is not None:
            links.append(found)
            continue
        base = tuple(key[at] if at is not None else column[row].value for column, at in parts)  # type: ignore[index]
        if fan is None:
            links.append(base)
        else:
            head, tail = base[:fan], base[fan + 1 :]
            links.append([None if item is None else (*head, item, *tail) for item in base[fan]])
    return links


def gathered(group: Key, members: Sequence[Any], column: Sequence[Result]) -> Result:
    """A group's results as one: its value is Gathered, its hash that of all members; which failed is in both."""
    rows = sorted(zip(members, column, strict=True), key=lambda row: key_json((row[0],)))
    good = [(member, result) for member, result in rows if not result.failed]
    folded = fold([result for _, result in good], listed=False)
    folded._value = Gathered(
        tuple(member for member, _ in good),
        [result.value for _, result in good],
        tuple(member for member, result in rows if result.failed),
    )
    folded.value_hash = group_hash(
        (key_json((*group, member)), "failed" if result.failed else result.value_hash or "")
        for member, result in rows
    )
    # What a gather reads is proven by the group's trace; a list of it in every reader's trace would be as long
    # as the group.
    folded.reads = ()
    return folded
