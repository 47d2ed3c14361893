"""The rules of catalog.py for rows that Spark reads: the same products, values and refusals.

Owns their Spark form; a large catalog never comes to the driver, only counts and the first few bad ids do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from featurekit_spark.errors import DataError
from featurekit_spark.sources.base import BLANKS, AttributeId, Layout
from featurekit_spark.sources.problems import (
    SHOWN,
    duplicate_ids,
    missing_ids,
    mixed_types,
    undecided,
    untyped_id,
)

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from featurekit_spark.sources.catalog import Snapshot

__all__ = ["products_on_spark"]


def products_on_spark(
    spark: SparkSession,
    snapshot: Snapshot,
    columns: Sequence[str],
    attributes: Sequence[AttributeId],
    wanted: Mapping[str, str],
) -> DataFrame:
    """product_id and one column per attribute, as `LoadedCatalog.resolved` gives them.

    One job over the ids runs here, so that bad rows are an error before any work starts.
    """
    repeated = _check_ids(snapshot.ids_on_spark(spark), snapshot)
    rows = snapshot.read_spark(spark, columns)
    rows = rows.withColumn("product_id", rows["product_id"].cast("string"))
    if repeated:
        rows = _newest(rows, snapshot.layout)
    return _resolved(rows, snapshot.layout, columns, attributes, wanted)


def _check_ids(ids: DataFrame, snapshot: Snapshot) -> bool:
    """Whether ids repeat, where that is allowed; DataError for everything that is not."""
    from pyspark.sql import functions as F
    from pyspark.sql.types import IntegralType, StringType

    layout, kind = snapshot.layout, ids.schema["product_id"].dataType
    if not isinstance(kind, (StringType, IntegralType)):
        raise untyped_id(layout, kind.simpleString())
    ids = ids.withColumn("product_id", F.col("product_id").cast("string"))
    counts = ids.groupBy("product_id").agg(F.count("*").alias("n"), F.min("problem").alias("problem"))
    blank = F.coalesce(F.btrim("product_id", F.lit(BLANKS)) == "", F.lit(True))
    many = F.col("n") > 1
    found = counts.agg(
        F.min("problem").alias("problem"),
        F.coalesce(F.sum(F.when(blank, F.col("n"))), F.lit(0)).alias("blank"),
        F.count_if(many).alias("ids"),
        F.coalesce(F.sum(F.when(many, F.col("n") - 1)), F.lit(0)).alias("extra"),
    ).collect()[0]
    if found["problem"] is not None:
        raise DataError(found["problem"])
    if found["blank"]:
        raise missing_ids(layout, found["blank"], "")
    if found["ids"] and snapshot.duplicates == "fail":
        first = counts.where(many).orderBy("product_id").limit(SHOWN).collect()
        raise duplicate_ids(layout, found["ids"], found["extra"], [row["product_id"] for row in first])
    return bool(found["ids"])


def _newest(rows: DataFrame, layout: Layout) -> DataFrame:
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    order = Window.partitionBy("product_id").orderBy(F.col("_order").desc_nulls_last())
    kept = rows.withColumn("_rank", F.rank().over(order)).where("_rank = 1").drop("_rank")
    tied = kept.groupBy("product_id").count().agg(F.sum(F.col("count") - 1)).collect()[0][0]
    if tied:
        raise undecided(layout, tied)
    return kept


def _resolved(
    rows: DataFrame,
    layout: Layout,
    columns: Sequence[str],
    attributes: Sequence[AttributeId],
    wanted: Mapping[str, str],
) -> DataFrame:
    from pyspark.sql import functions as F
    from pyspark.sql.types import StringType

    raw = {name: f"c{i}" for i, name in enumerate(columns)}

    def value(name: str) -> Column:
        column = rows[raw[name]]
        if not isinstance(rows.schema[raw[name]].dataType, StringType):
            return column
        return F.when(F.btrim(column, F.lit(BLANKS)) != "", column)

    selected = [rows["product_id"]]
    for attribute in attributes:
        types = {rows.schema[raw[name]].dataType for name in layout.variants(attribute).values()}
        if len(types) > 1:
            raise mixed_types(layout, attribute, (kind.simpleString() for kind in types))
        tried = [value(name) for name in layout.resolution(attribute, wanted)]
        column = F.coalesce(*tried) if tried else F.lit(None).cast(types.pop())
        selected.append(column.alias(attribute))
    return rows.select(*selected)
