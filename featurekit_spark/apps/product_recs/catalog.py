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
    """All titles: the columns `product_id` and `value`, null where a title is missing or white space.

    Titles that are no text are given as they are, and refused by the type check as those from `build` are.
    """

    scan: ProductScan
    attribute: str

    @property
    def bytes(self) -> int:
        return self.scan.bytes

    def to_arrow(self) -> pa.Table:
        table = self.scan.to_arrow()
        titles: Any = table[self.attribute]
        if pa.types.is_string(titles.type) or pa.types.is_large_string(titles.type):
            titles = pc.if_else(pc.equal(pc.utf8_trim(titles, BLANKS), ""), None, titles)
        return pa.table({"product_id": table["product_id"], "value": titles})

    def to_spark(self, spark: SparkSession) -> DataFrame:
        from pyspark.sql import functions as F

        name = self.attribute.replace("`", "``")
        title = F.col(f"`{name}`")
        blank = F.trim(F.translate(title.cast("string"), BLANKS, " " * len(BLANKS))) == ""
        return self.scan.to_spark(spark).select("product_id", F.when(~blank, title).alias("value"))
