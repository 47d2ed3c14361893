"""The steps of the main job over whole columns in one process, for the peers that call them.

Same embedder, model stand-in, search kernel and merging rule as the library's job, so that only the way the steps are
put together differs. Counts the model's calls in `llm_calls`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from featurekit_spark.apps.product_recs.suggestions import parse_suggestions
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.llm.completion import LIST_INSTRUCTION
from featurekit_spark.llm.offline import OfflineLLM
from featurekit_spark.search.kernel import FlatIndex

TOP_K = 10
DIM = 384
TEMPLATE = "get recommendations for {title}"
MERCHANT, MARKET = "demo", "US"

llm_calls: Counter[str] = Counter()


def read_products(catalog: str) -> pd.DataFrame:
    """All columns of the catalog as text."""
    return pd.read_csv(catalog, dtype=str, keep_default_na=False)


def titles_of(products: pd.DataFrame) -> pd.Series:
    """product_id -> title, in order of ids; products without one are left out."""
    titles = products.set_index("product_id")["title"]
    return titles[titles.str.strip() != ""].sort_index()


def embed(titles: pd.Series) -> np.ndarray:
    """One row for each title."""
    return HashingEmbedder(dim=DIM).embed(titles.tolist())


def suggest(titles: pd.Series) -> pd.Series:
    """What the model suggests for each title; tuples, because a cache has to hash them."""
    model = OfflineLLM()

    async def ask(prompts: list[str]) -> list[str]:
        answers = await asyncio.gather(*(model.complete(p, system=LIST_INSTRUCTION) for p in prompts))
        return [answer.text for answer in answers]

    prompts = [TEMPLATE.format(title=title) for title in titles]
    llm_calls.update(prompts)
    answers = asyncio.run(ask(prompts))
    return pd.Series([tuple(parse_suggestions(text, limit=10)) for text in answers], titles.index)


def recommend(vectors: np.ndarray, suggestions: pd.Series) -> pd.DataFrame:
    """product_id and recs, best first: what is nearest to the suggestions, each text searched once."""
    ids = suggestions.index.to_numpy()
    texts = list(dict.fromkeys(text for found in suggestions for text in found))
    scores, rows = FlatIndex(vectors, ids=list(ids)).search(HashingEmbedder(dim=DIM).embed(texts), TOP_K + 1)
    found = dict(zip(texts, zip(rows.tolist(), scores.tolist(), strict=True), strict=True))
    recs = []
    for product_id, wanted in suggestions.items():
        best: dict[str, float] = {}
        for text in wanted:
            for row, score in zip(*found[text], strict=True):
                if row >= 0 and score > best.get(ids[row], -np.inf):
                    best[ids[row]] = score
        best.pop(str(product_id), None)
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:TOP_K]
        recs.append(tuple(product for product, _ in ranked))
    return pd.DataFrame({"product_id": ids, "recs": recs})


def publish(recommendations: pd.DataFrame, warehouse: str) -> int:
    """The recommendations table, as the library's sink lays it out; returns its rows."""
    import pyarrow as pa
    from deltalake import write_deltalake

    size = len(recommendations)
    table = pa.table(
        {
            "merchant": [MERCHANT] * size,
            "market": [MARKET] * size,
            "product_id": recommendations["product_id"].tolist(),
            "logic_builder": ["LLMLogic"] * size,
            "recs": pa.array(recommendations["recs"].tolist(), pa.list_(pa.string())),
            "scores": pa.nulls(size, pa.list_(pa.float32())),
            "ts": pa.array([datetime.now(UTC)] * size, pa.timestamp("us", tz="UTC")),
            "run_id": [uuid.uuid4().hex] * size,
        }
    )
    path = Path(warehouse) / "recommendations"
    write_deltalake(str(path), table, mode="overwrite", partition_by=["merchant", "market"])
    return size
