"""How a whole catalog reaches the builders: a product DB's scan, in the columns that sources and key sets
give.

Knows ProductScan's shape; no files, no tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.sources.base import BLANKS, ProductScan

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["IdScan", "TitleScan"]


@dataclass(frozen=True)
class IdScan:
    """All product ids: one column, `product_id`."""

    scan: ProductScan

    @property
    def bytes(self) -> int:
        return self.scan.bytes

    def to_arrow(self) -> pa.Table:
        # Sorted, as `build` gives them: the same ids must be the same value.
        return self.scan.to_arrow().select(["product_id"]).sort_by("product_id")

    def to_spark(self, spark: SparkSession) -> DataFrame:
        return self.scan.to_spark(spark).select("product_id")


@dataclass(frozen=True)
class TitleScan:
    """All titles: the columns `product_id` and `value`, null where a title is missing or white space."""

    scan: ProductScan
    attribute: str

    @property
    def bytes(self) -> int:
        return self.scan.bytes

    def to_arrow(self) -> pa.Table:
        table = self.scan.to_arrow()
        titles: Any = table[self.attribute].cast(pa.string())
        blank = pc.equal(pc.utf8_trim(titles, BLANKS), "")
        return pa.table({"product_id": table["product_id"], "value": pc.if_else(blank, None, titles)})

    def to_spark(self, spark: SparkSession) -> DataFrame:
        from pyspark.sql import functions as F

        title = F.col(f"`{self.attribute}`").cast("string")
        blank = F.trim(F.translate(title, BLANKS, " " * len(BLANKS))) == ""
        return self.scan.to_spark(spark).select("product_id", F.when(~blank, title).alias("value"))
