"""The main job as an expert would write it by hand in plain PySpark: two passes, a broadcast matrix, no cache.

Same embedder, model stand-in, search kernel and merging rule as the library's job, so that only the way they are put
together differs. `spark-submit scripts/bench/handwritten_job.py CATALOG.csv WAREHOUSE MERCHANT MARKET`
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

TOP_K = 10
TEMPLATE = "get recommendations for {title}"


def embed_titles(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    from featurekit_spark.embed.hashing import HashingEmbedder

    embedder = HashingEmbedder(dim=384)
    for batch in batches:
        vectors = embedder.embed(batch["title"].tolist())
        yield pd.DataFrame({"product_id": batch["product_id"], "vector": [row.tobytes() for row in vectors]})


def main(catalog: str, warehouse: str, merchant: str, market: str) -> None:
    spark = SparkSession.builder.appName("handwritten").getOrCreate()
    products = (
        spark.read.csv(catalog, header=True, multiLine=True, escape='"')
        .select("product_id", "title")
        .where("trim(title) <> ''")
        .repartition(2 * spark.sparkContext.defaultParallelism)
    )
    rows = products.mapInPandas(embed_titles, "product_id string, vector binary").toPandas()
    rows = rows.sort_values("product_id")
    ids = rows["product_id"].to_numpy()
    matrix = np.frombuffer(b"".join(rows["vector"]), dtype=np.float32).reshape(len(rows), -1)
    shared = spark.sparkContext.broadcast((ids, matrix))
    calls = spark.sparkContext.accumulator(0)

    def recommend(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        from featurekit_spark.apps.product_recs.suggestions import parse_suggestions
        from featurekit_spark.embed.hashing import HashingEmbedder
        from featurekit_spark.llm.completion import LIST_INSTRUCTION
        from featurekit_spark.llm.offline import OfflineLLM
        from featurekit_spark.search.kernel import FlatIndex

        embedder, model = HashingEmbedder(dim=384), OfflineLLM()
        all_ids, all_vectors = shared.value
        index = FlatIndex(all_vectors, ids=list(all_ids))

        async def ask(prompts: list[str]) -> list[str]:
            answers = await asyncio.gather(*(model.complete(p, system=LIST_INSTRUCTION) for p in prompts))
            return [answer.text for answer in answers]

        for batch in batches:
            prompts = [TEMPLATE.format(title=title) for title in batch["title"]]
            calls.add(len(prompts))
            suggestions = [parse_suggestions(text, limit=10) for text in asyncio.run(ask(prompts))]
            texts = list(dict.fromkeys(text for found in suggestions for text in found))
            scores, hits = index.search(embedder.embed(texts), TOP_K + 1)
            found = {text: (hits[i], scores[i]) for i, text in enumerate(texts)}
            recs = []
            for product_id, wanted in zip(batch["product_id"], suggestions, strict=True):
                best: dict[str, float] = {}
                for text in wanted:
                    for row, score in zip(*found[text], strict=True):
                        if row >= 0 and score > best.get(all_ids[row], -np.inf):
                            best[all_ids[row]] = float(score)
                best.pop(product_id, None)
                recs.append(
                    [p for p, _ in sorted(best.items(), key=lambda item: (-item[1], item[0]))[:TOP_K]]
                )
            yield pd.DataFrame({"product_id": batch["product_id"], "recs": recs})

    out = products.mapInPandas(recommend, "product_id string, recs array<string>").select(
        F.lit(merchant).alias("merchant"),
        F.lit(market).alias("market"),
        "product_id",
        F.lit("LLMLogic").alias("logic_builder"),
        "recs",
        F.lit(None).cast("array<float>").alias("scores"),
        F.lit(datetime.now(UTC)).alias("ts"),
        F.lit(uuid.uuid4().hex).alias("run_id"),
    )
    (
        out.write.format("delta")
        .mode("overwrite")
        .partitionBy("merchant", "market")
        .option("replaceWhere", f"merchant = '{merchant}' AND market = '{market}'")
        .save(f"{warehouse}/recommendations")
    )
    print(json.dumps({"llm_calls": calls.value}))
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:5])
