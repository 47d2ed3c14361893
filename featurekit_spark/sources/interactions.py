"""Who was shown which product, and how they reacted: the protocol, and its file and Delta sources.

Owns the schema of interactions, the reading of times and the order of rows. Knows nothing of what is
computed from them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from featurekit_spark.errors import DataError, UsageError
from featurekit_spark.sources.arrowtypes import plain_type
from featurekit_spark.sources.base import BLANKS, Layout
from featurekit_spark.sources.csvfile import lines_of, read_columns, read_header
from featurekit_spark.sources.deltatable import (
    column_names,
    equal_to,
    identifier,
    literal,
    open_table,
    select,
)
from featurekit_spark.sources.folder import find_parts

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

__all__ = ["COLUMNS", "DeltaInteractionDB", "FileInteractionDB", "InteractionDataDB", "interaction_schema"]

COLUMNS = ("entity_id", "product_id", "kind", "served_at", "reacted_at")
_TEXTS = COLUMNS[:3]
_ORDER = [(name, "ascending") for name in ("served_at", *_TEXTS, "reacted_at")]


def interaction_schema() -> pa.Schema:
    """entity_id, product_id, kind: string; served_at, reacted_at: timestamp(us, UTC), the last nullable."""
    import pyarrow as pa

    moment = pa.timestamp("us", "UTC")
    texts = [pa.field(name, pa.string(), nullable=False) for name in _TEXTS]
    return pa.schema([*texts, pa.field("served_at", moment, nullable=False), pa.field("reacted_at", moment)])


class InteractionDataDB(Protocol):
    """What entities (users, sessions, devices) were served and when they reacted, if they did."""

    async def get_interactions(
        self,
        merchant: str,
        market: str,
        *,
        entity_ids: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> pa.Table:
        """Rows of `interaction_schema()` with since <= served_at < until, sorted by served_at, then the rest.

        `entity_ids` None means everybody. Naive times, in the data and in the arguments, are UTC.
        Raises DataError for a row among them without an id, kind or time, or with a time that is none.
        """
        ...


@dataclass(frozen=True)
class FileInteractionDB:
    """Interactions in `{merchant}_{market}.csv` or `.parquet` in a folder, or part files in folders so named.

    CSV times are ISO 8601 (`2026-01-31T12:00:00Z`, also with a blank for the T, an offset, or a date alone).
    """

    path: str | Path

    async def get_interactions(
        self,
        merchant: str,
        market: str,
        *,
        entity_ids: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> pa.Table:
        wanted = _Wanted.of(entity_ids, since, until)
        return await asyncio.to_thread(self._read, merchant, market, wanted)

    def _read(self, merchant: str, market: str, wanted: _Wanted) -> pa.Table:
        import pyarrow as pa

        parts = find_parts(str(self.path), merchant=merchant, market=market, what="interaction_data_db")
        read = _csv_part if parts.format == "csv" else _parquet_part
        tables = [read(path, wanted) for path in parts.files]
        return pa.concat_tables(tables).sort_by(_ORDER)


@dataclass(frozen=True)
class DeltaInteractionDB:
    """Interactions in one Delta table; its columns `merchant` and `market`, if any, choose the rows."""

    path: str | Path

    async def get_interactions(
        self,
        merchant: str,
        market: str,
        *,
        entity_ids: Collection[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> pa.Table:
        wanted = _Wanted.of(entity_ids, since, until)
        return await asyncio.to_thread(self._read, merchant, market, wanted)

    def _read(self, merchant: str, market: str, wanted: _Wanted) -> pa.Table:
        table = open_table(self.path, what="interaction_data_db")
        names = column_names(table)
        _require(names, str(self.path))
        owner = {k: v for k, v in {"merchant": merchant, "market": market}.items() if k in names}
        timed = {field.name: str(field.type.to_json()).strip('"') for field in table.schema().fields}
        conditions = [equal_to(owner)] if owner else []
        conditions += wanted.sql(timed=timed["served_at"].startswith("timestamp"))
        found = select(table, {name: name for name in COLUMNS}, where=" AND ".join(conditions))
        return _checked(found, str(self.path), wanted).sort_by(_ORDER)


@dataclass(frozen=True)
class _Wanted:
    entity_ids: frozenset[str] | None
    since: datetime | None
    until: datetime | None

    @classmethod
    def of(
        cls, entity_ids: Collection[str] | None, since: datetime | None, until: datetime | None
    ) -> _Wanted:
        if isinstance(entity_ids, str):
            raise UsageError(f"entity_ids {entity_ids!r} is one text; give a collection of ids.")
        ids = None if entity_ids is None else frozenset(entity_ids)
        return cls(ids, since and _utc(since), until and _utc(until))

    def sql(self, *, timed: bool) -> list[str]:
        """Conditions to push down; rows with nulls pass, so that they are found to be bad."""
        entity, moment = identifier("entity_id"), identifier("served_at")
        conditions = []
        if self.entity_ids is not None:
            listed = ", ".join(literal(entity_id) for entity_id in sorted(self.entity_ids)) or "NULL"
            conditions.append(f"({entity} IN ({listed}) OR {entity} IS NULL)")
        for sign, bound in ((">=", self.since), ("<", self.until)):
            if timed and bound is not None:
                value = f"TIMESTAMP {literal(bound.isoformat())}"
                conditions.append(f"({moment} {sign} {value} OR {moment} IS NULL)")
        return conditions

    def expression(self, schema: pa.Schema) -> pc.Expression | None:
        """The same for Parquet; only what the file's types allow."""
        import pyarrow as pa
        import pyarrow.compute as pc

        entity, moment = pc.field("entity_id"), pc.field("served_at")
        conditions = []
        if self.entity_ids is not None and pa.types.is_string(schema.field("entity_id").type):
            ids = pa.array(sorted(self.entity_ids), pa.string())
            conditions.append(entity.isin(ids) | entity.is_null())
        kind = schema.field("served_at").type
        if pa.types.is_timestamp(kind):
            if self.since is not None:
                conditions.append((moment >= _scalar(self.since, kind)) | moment.is_null())
            if self.until is not None:
                conditions.append((moment < _scalar(self.until, kind)) | moment.is_null())
        return reduce(and_, conditions) if conditions else None

    def among(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        moment = pa.timestamp("us", "UTC")
        if self.entity_ids is not None:
            ids = pa.array(sorted(self.entity_ids), pa.string())
            table = table.filter(pc.is_in(table["entity_id"], value_set=ids))
        if self.since is not None:
            table = table.filter(pc.greater_equal(table["served_at"], pa.scalar(self.since, moment)))
        if self.until is not None:
            table = table.filter(pc.less(table["served_at"], pa.scalar(self.until, moment)))
        return table


def _csv_part(path: Path, wanted: _Wanted) -> pa.Table:
    import pyarrow as pa

    _require(read_header(path), str(path))
    text = pa.schema([(name, pa.string()) for name in COLUMNS])
    chunks = [pa.record_batch(cells, schema=text) for cells in read_columns(path, COLUMNS)]
    table = pa.Table.from_batches(chunks, text)
    return _checked(table, str(path), wanted, lambda row: f"line {lines_of(path, [row])[0]}")


def _parquet_part(path: Path, wanted: _Wanted) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        _require(tuple(schema.names), str(path))
        wanted_only = wanted.expression(schema)
        if wanted_only is not None:
            # A bad row's number is known only where all rows are read, which a bad file is worth.
            with suppress(DataError):
                return _checked(_parquet_rows(path, wanted_only), str(path), wanted)
        table = _parquet_rows(path, None)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write the file again.") from None
    return _checked(table, str(path), wanted)


def _parquet_rows(path: Path, wanted: pc.Expression | None) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=list(COLUMNS), filters=wanted, partitioning=None).select(COLUMNS)


def _require(names: tuple[str, ...], where: str) -> None:
    layout = Layout(names, where=where)
    for name in COLUMNS:
        layout.require(name)


def _checked(
    table: pa.Table, where: str, wanted: _Wanted, place: Callable[[int], str] = lambda row: f"row {row + 1}"
) -> pa.Table:
    """`table` in the schema of interactions, checked row by row, then only the rows that are wanted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [_text(table[name], name, where) for name in _TEXTS]
    columns += [_moments(table[name], name, where, place) for name in ("served_at", "reacted_at")]
    for name, column in zip(COLUMNS[:4], columns, strict=False):
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise DataError(
                f"{where}, {place(row)}: no {name}; every interaction needs one ({column.null_count} rows "
                "have none)."
            )
    return wanted.among(pa.table(columns, schema=interaction_schema()))


def _text(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = plain_type(column.type)
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise DataError(
            f"{where}: column {name!r} is of type {column.type}; it must be a string or an integer."
        )
    text = column.cast(kind).cast(pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim(text, characters=BLANKS), ""), pa.scalar(None, pa.string()), text)


def _moments(column: pa.ChunkedArray, name: str, where: str, place: Callable[[int], str]) -> pa.ChunkedArray:
    import pyarrow as pa

    moment = pa.timestamp("us", "UTC")
    kind = plain_type(column.type)
    if pa.types.is_string(kind):
        texts = enumerate(column.cast(kind).to_pylist())
        moments = [_parse(text, row, name, where, place) for row, text in texts]
        return pa.chunked_array([pa.array(moments, moment)])
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        # A naive time is UTC here, and a cast to UTC keeps its figures. Below a microsecond is cut off.
        return column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(moment)
    raise DataError(
        f"{where}: column {name!r} is of type {column.type}; it must be a timestamp or ISO 8601 text."
    )


def _parse(text: str | None, row: int, name: str, where: str, place: Callable[[int], str]) -> datetime | None:
    text = (text or "").strip(BLANKS)
    if not text:
        return None
    try:
        return _utc(datetime.fromisoformat(text))
    except ValueError:
        raise DataError(
            f"{where}, {place(row)}: {name} {text!r} is no time; write it like 2026-01-31T12:00:00Z."
        ) from None


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _scalar(bound: datetime, kind: pa.TimestampType) -> pa.Scalar:
    import pyarrow as pa

    return pa.scalar(bound if kind.tz else bound.replace(tzinfo=None), kind)
