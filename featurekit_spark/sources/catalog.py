"""From the raw rows of a catalog table to products: ids checked, duplicates settled, dimensions resolved.

Owns those rules in-process (catalog_spark.py has them for Spark) and the per-process cache of loaded
catalogs. Knows no file format: a `Snapshot` reads the raw rows. Raw tables have the columns `product_id`,
then `c0`, `c1` ... for the columns asked for, then `_order` where rows carry their own order.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from featurekit_spark.sources.arrowtypes import plain_type
from featurekit_spark.sources.base import (
    BLANKS,
    AttributeId,
    Duplicates,
    IngestionDimensionKey,
    Layout,
    ProductId,
    check_asked,
)
from featurekit_spark.sources.problems import (
    SHOWN,
    duplicate_ids,
    missing_ids,
    mixed_types,
    undecided,
    untyped_id,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["LoadedCatalog", "Snapshot", "TableScan", "load", "load_cached"]


class Snapshot(Protocol):
    """One state of a catalog table, opened for reading."""

    @property
    def layout(self) -> Layout: ...
    @property
    def bytes(self) -> int: ...
    @property
    def version(self) -> str | None: ...
    @property
    def duplicates(self) -> Duplicates: ...

    def read_arrow(self, columns: Sequence[str]) -> pa.Table:
        """The raw rows, in the table's own order if it has one."""
        ...

    def read_spark(self, spark: SparkSession, columns: Sequence[str]) -> DataFrame:
        """The raw rows by Spark; `_order` (any sortable type) is there wherever the rows have an order."""
        ...

    def ids_on_spark(self, spark: SparkSession) -> DataFrame:
        """product_id of every row, and `problem`: null, or why the row cannot be read."""
        ...

    def locate(self, rows: Sequence[int]) -> str:
        """Where the rows with these indices of `read_arrow` are, for a message; may be empty."""
        ...


@dataclass(frozen=True)
class LoadedCatalog:
    """A catalog in memory: one row per product, blank texts as null, columns by their own names."""

    ids: pa.ChunkedArray
    columns: Mapping[str, pa.ChunkedArray]
    layout: Layout
    rows: int

    @cached_property
    def row_of(self) -> dict[ProductId, int]:
        return {product_id: row for row, product_id in enumerate(self.ids.to_pylist())}

    def products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        """As `ProductDB.get_products`; products in the catalog's order."""
        import pyarrow as pa

        rows = None
        if product_ids is not None:
            rows = sorted(self.row_of[product_id] for product_id in product_ids if product_id in self.row_of)

        def values(column: pa.ChunkedArray) -> list[Any]:
            picked = column if rows is None else column.take(pa.array(rows, pa.int64()))
            return list(picked.to_pylist())

        found: dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]] = {
            product_id: {attribute: {} for attribute in sorted(attribute_ids)}
            for product_id in values(self.ids)
        }
        for attribute in sorted(attribute_ids):
            for key, name in self.layout.variants(attribute).items():
                for product, value in zip(found.values(), values(self.columns[name]), strict=True):
                    if value is not None:
                        product[attribute][key] = value
        return found

    def resolved(self, attributes: Sequence[AttributeId], wanted: Mapping[str, str]) -> pa.Table:
        """product_id and one column per attribute, each resolved for the dimension values `wanted`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        arrays = [self.ids]
        for attribute in attributes:
            columns = [self.columns[name] for name in self.layout.variants(attribute).values()]
            types = {column.type for column in columns}
            if len(types) > 1:
                raise mixed_types(self.layout, attribute, map(str, types))
            tried = [self.columns[name] for name in self.layout.resolution(attribute, wanted)]
            nothing = pa.nulls(len(self.ids), columns[0].type)
            arrays.append(pc.coalesce(*tried) if tried else pa.chunked_array([nothing]))
        return pa.table(arrays, names=["product_id", *attributes])


def load(snapshot: Snapshot, columns: Sequence[str]) -> LoadedCatalog:
    """Read `columns` in-process; DataError for missing ids and, by policy, for duplicate ones."""
    import pyarrow.compute as pc

    layout = snapshot.layout
    raw = snapshot.read_arrow(columns)
    ids = _text_ids(raw["product_id"], layout)
    missing = pc.fill_null(pc.equal(pc.utf8_trim(ids, characters=BLANKS), ""), True)
    if pc.any(missing).as_py():
        rows = pc.indices_nonzero(missing).to_pylist()
        raise missing_ids(layout, len(rows), snapshot.locate(rows[:SHOWN]))
    table = raw.set_column(0, "product_id", ids)
    unique = _unique(table, snapshot)
    return LoadedCatalog(
        unique["product_id"],
        {name: _without_blanks(unique[f"c{i}"]) for i, name in enumerate(columns)},
        layout,
        rows=len(table),
    )


def _text_ids(ids: pa.ChunkedArray, layout: Layout) -> pa.ChunkedArray:
    import pyarrow as pa

    kind = plain_type(ids.type)
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise untyped_id(layout, str(ids.type))
    return ids.cast(kind).cast(pa.string())


def _unique(table: pa.Table, snapshot: Snapshot) -> pa.Table:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = table.select(["product_id"]).group_by("product_id").aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if not repeated.num_rows:
        return table
    extra = pc.sum(repeated["count_all"]).as_py() - repeated.num_rows
    if snapshot.duplicates == "fail":
        first = repeated["product_id"].take(pc.sort_indices(repeated["product_id"])).to_pylist()[:SHOWN]
        raise duplicate_ids(snapshot.layout, repeated.num_rows, extra, first)
    if "_order" not in table.column_names:
        numbered = pa.table({"id": table["product_id"], "row": np.arange(len(table))})
        last = numbered.group_by("id").aggregate([("row", "max")])["row_max"]
        return table.take(pc.take(last, pc.sort_indices(last)))
    # A row without order is older than any with one; rank has nulls last.
    order = pc.if_else(pc.is_null(table["_order"]), 0, pc.rank(table["_order"], tiebreaker="dense"))
    ranked = pa.table({"product_id": table["product_id"], "rank": order, "row": np.arange(len(table))})
    best = ranked.group_by("product_id").aggregate([("rank", "max")])
    kept = ranked.join(best, ["product_id"]).filter(pc.field("rank") == pc.field("rank_max"))
    if len(kept) > len(best):
        raise undecided(snapshot.layout, len(kept) - len(best))
    return table.take(pc.take(kept["row"], pc.sort_indices(kept["row"])))


def _without_blanks(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.cast(plain_type(column.type))
    if not pa.types.is_string(column.type):
        return column
    blank = pc.equal(pc.utf8_trim(column, characters=BLANKS), "")
    return pc.if_else(blank, pa.scalar(None, pa.string()), column)


class TableScan:
    """A `ProductScan` over one snapshot. `key`: the source's settings; counts of a reading are kept under it."""

    def __init__(
        self,
        snapshot: Snapshot,
        attributes: Sequence[AttributeId],
        *,
        dimensions: Mapping[str, str],
        key: Hashable = None,
    ) -> None:
        check_asked(attributes)
        self._key = key
        self._snapshot = snapshot
        self._attributes = tuple(attributes)
        self._wanted = dict(dimensions)
        self._columns = snapshot.layout.needed(self._attributes)
        self.bytes = snapshot.bytes
        self.version = snapshot.version

    @cached_property
    def _read(self) -> tuple[pa.Table, dict[str, int]]:
        catalog = load(self._snapshot, self._columns)
        table = catalog.resolved(self._attributes, self._wanted)
        counts = {
            "rows": catalog.rows,
            "products": len(table),
            "duplicates_dropped": catalog.rows - len(table),
        }
        counts |= {f"missing_{name}": table[name].null_count for name in self._attributes}
        with _guard:
            _counted[self._slot] = counts
            while len(_counted) > KEPT:
                _counted.popitem(last=False)
        return table, counts

    @property
    def _slot(self) -> Hashable:
        return self._key, self.version, self._attributes, tuple(sorted(self._wanted.items()))

    def to_arrow(self) -> pa.Table:
        return self._read[0]

    def quality(self) -> dict[str, int]:
        with _guard:
            known = _counted.get(self._slot) if self._key is not None and self.version is not None else None
        return dict(self._read[1] if known is None else known)

    def to_spark(self, spark: SparkSession) -> DataFrame:
        from featurekit_spark.sources.catalog_spark import products_on_spark

        return products_on_spark(spark, self._snapshot, self._columns, self._attributes, self._wanted)


KEPT = 4
_counted: OrderedDict[Hashable, dict[str, int]] = OrderedDict()
_loaded: OrderedDict[Hashable, tuple[str, LoadedCatalog]] = OrderedDict()
_guard = threading.Lock()
_loading: dict[Hashable, threading.Lock] = {}


def load_cached(key: Hashable, snapshot: Snapshot, columns: Sequence[str]) -> LoadedCatalog:
    """`load`, once per process, `key` (the source's settings), columns and version; the last few are kept."""
    slot = (key, tuple(columns))
    with _guard:
        lock = _loading.setdefault(slot, threading.Lock())
    with lock:
        with _guard:
            held = _loaded.get(slot)
            if held is not None and held[0] == snapshot.version:
                _loaded.move_to_end(slot)
                return held[1]
        catalog = load(snapshot, columns)
        if snapshot.version is not None:
            with _guard:
                _loaded[slot] = (snapshot.version, catalog)
                _loaded.move_to_end(slot)
                while len(_loaded) > KEPT:
                    _loaded.popitem(last=False)
        return catalog
