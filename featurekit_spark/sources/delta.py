"""Products from one Delta table, of one merchant or of many.

Owns which rows and columns of the table are asked for. The rules for ids, duplicates and dimensions are
catalog.py's, the in-process reader is deltatable.py's; Spark reads by its own Delta source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import ConfigError
from featurekit_spark.sources.base import (
    AttributeId,
    Dimension,
    Duplicates,
    IngestionDimensionKey,
    Layout,
    ProductId,
    ProductScan,
)
from featurekit_spark.sources.catalog import TableScan, load_cached
from featurekit_spark.sources.deltatable import column_names, equal_to, open_table, select, size, table_uri

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["DeltaProductDB"]


@dataclass(frozen=True)
class DeltaProductDB:
    """One merchant's and market's products in a Delta table.

    Rows are those with the merchant in `merchant_column` and the market in `market_column`; None takes a
    column named `merchant` or `market` if the table has one, else the whole table counts. Rows of a Delta
    table have no order, so `duplicates="keep_last"` needs `order_by`, a column whose greatest value is last.
    Columns may be variants; Delta's own spelling is `title[locale:de_DE]`.
    """

    path: str | Path
    _: KW_ONLY
    merchant: str
    market: str
    duplicates: Duplicates = "fail"
    order_by: str | None = None
    id_column: str = "product_id"
    merchant_column: str | None = None
    market_column: str | None = None

    def __post_init__(self) -> None:
        if self.duplicates == "keep_last" and self.order_by is None:
            raise ConfigError(
                "product_db.duplicates 'keep_last': rows of a Delta table have no order; "
                "give product_db.order_by, the column that says which row is last, or use 'fail'."
            )

    def version(self) -> str:
        """`delta:<table id>:<table version>`; reads the log only."""
        return _version(self._table())

    async def get_product_attribute_dimensions(self) -> dict[AttributeId, Dimension]:
        return await asyncio.to_thread(lambda: self._open().layout.dimensions())

    async def get_products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None = None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        def read() -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
            snapshot = self._open()
            catalog = load_cached(self, snapshot, snapshot.layout.needed(sorted(attribute_ids)))
            return catalog.products(attribute_ids, product_ids)

        return await asyncio.to_thread(read)

    def scan(self, attribute_ids: Sequence[AttributeId], *, dimensions: Mapping[str, str]) -> ProductScan:
        return TableScan(self._open(), attribute_ids, dimensions=dimensions, key=self)

    def _table(self) -> DeltaTable:
        return open_table(self.path, what="product_db")

    def _open(self) -> _DeltaSnapshot:
        return _DeltaSnapshot(self, self._table())


def _version(table: DeltaTable) -> str:
    return f"delta:{table.metadata().id}:{table.version()}"


class _DeltaSnapshot:
    """The table at one version, which both readers pin."""

    def __init__(self, db: DeltaProductDB, table: DeltaTable) -> None:
        self._db = db
        self._table = table
        self.version = _version(table)
        self.duplicates = db.duplicates

    @cached_property
    def layout(self) -> Layout:
        names = column_names(self._table)
        reserved = [self._db.id_column, self._db.order_by, *self._owner]
        layout = Layout(names, where=str(self._db.path), reserved=tuple(name for name in reserved if name))
        for name in (self._db.id_column, self._db.order_by, self._db.merchant_column, self._db.market_column):
            if name is not None:
                layout.require(name)
        return layout

    @cached_property
    def bytes(self) -> int:
        return size(self._table, self._owner)

    @cached_property
    def _owner(self) -> dict[str, str]:
        """The values that make a row this merchant's and market's, by column."""
        names = column_names(self._table)
        owner = {
            self._db.merchant_column or "merchant": self._db.merchant,
            self._db.market_column or "market": self._db.market,
        }
        return {name: value for name, value in owner.items() if name in names}

    def _columns(self, columns: Sequence[str]) -> dict[str, str]:
        chosen = {"product_id": self.layout.require(self._db.id_column)}
        chosen |= {f"c{i}": name for i, name in enumerate(columns)}
        return chosen | ({"_order": self._db.order_by} if self._db.order_by else {})

    def read_arrow(self, columns: Sequence[str]) -> pa.Table:
        chosen = self._columns(columns)
        rows = select(self._table, chosen, where=equal_to(self._owner))
        if not rows.num_rows:
            self._check_owner()
        # The query engine reads files side by side; the same snapshot should give the same table.
        return rows.sort_by("product_id")

    def read_spark(self, spark: SparkSession, columns: Sequence[str]) -> DataFrame:
        from pyspark.sql import functions as F

        chosen = self._columns(columns)
        table = spark.read.format("delta").option("versionAsOf", self._table.version())
        rows = table.load(table_uri(self._db.path))
        for name, value in self._owner.items():
            rows = rows.where(_column(name) == F.lit(value))
        return rows.select(*(_column(old).alias(new) for new, old in chosen.items()))

    def ids_on_spark(self, spark: SparkSession) -> DataFrame:
        from pyspark.sql import functions as F

        self._check_owner()
        return self.read_spark(spark, ()).select("product_id", F.lit(None).cast("string").alias("problem"))

    def locate(self, rows: Sequence[int]) -> str:
        return ""

    def _check_owner(self) -> None:
        """ConfigError if the table has only rows of others: that is a wrong name, not an empty catalog."""
        chosen = self._columns(())
        if not self._owner or select(self._table, chosen, where=equal_to(self._owner), limit=1).num_rows:
            return
        others = select(self._table, {name: name for name in self._owner}, distinct=True)
        known = sorted({", ".join(map(str, row.values())) for row in others.to_pylist()})
        if known:
            raise ConfigError(
                f"product_db: {self._db.path} has no rows of {', '.join(self._owner.values())!r}; "
                f"it has those of {len(known)} others, such as: {'; '.join(known[:5])}."
            )


def _column(name: str) -> Any:
    from pyspark.sql import functions as F

    return F.col("`" + name.replace("`", "``") + "`")
