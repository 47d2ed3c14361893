"""The small job whose loaded classes scripts/setup keeps: a pandas UDF, Arrow, Delta writes and reads."""

from __future__ import annotations

import sys

import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F


def main(folder: str) -> None:
    spark = SparkSession.builder.config("spark.sql.shuffle.partitions", 2).getOrCreate()
    table = f"{folder}/table"
    catalog = f"{folder}/catalog.csv"

    @F.pandas_udf("string")
    def lower(titles: pd.Series) -> pd.Series:
        return titles.str.lower()

    frame = pd.DataFrame({"product_id": ["a", "b"], "title": ["A kettle", "A lamp"]})
    frame.to_csv(catalog, index=False)
    products = spark.createDataFrame(frame).union(spark.read.csv(catalog, header=True)).repartition(2)
    rows = products.select("product_id", lower("title").alias("title"), F.current_timestamp().alias("ts"))
    for mode in ("overwrite", "append"):
        rows.write.format("delta").mode(mode).partitionBy("product_id").save(table)
    stored = spark.read.format("delta").load(table)
    stored.mapInPandas(lambda batches: batches, stored.schema).toPandas()
    stored.join(products, "product_id", "left_anti").groupBy("title").count().collect()
    spark.stop()


if __name__ == "__main__":
    main(sys.argv[1])
