"""The main job in Hamilton, a node for each step over whole columns, kept by Hamilton's own cache below the warehouse.

`python peer_hamilton.py CATALOG.csv WAREHOUSE`. Only the catalog's file is read anew each time; what comes of it is
compared by content, so that a node runs again where an input of it changed.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import peer_steps
from hamilton import driver


def products(catalog: str) -> pd.DataFrame:
    return peer_steps.read_products(catalog)


def titles(products: pd.DataFrame) -> pd.Series:
    return peer_steps.titles_of(products)


def vectors(titles: pd.Series) -> np.ndarray:
    return peer_steps.embed(titles)


def suggestions(titles: pd.Series) -> pd.Series:
    return peer_steps.suggest(titles)


def recommendations(vectors: np.ndarray, suggestions: pd.Series) -> pd.DataFrame:
    return peer_steps.recommend(vectors, suggestions)


def published(recommendations: pd.DataFrame, warehouse: str) -> int:
    return peer_steps.publish(recommendations, warehouse)


def main(catalog: str, warehouse: str) -> None:
    nodes = sys.modules[__name__]
    cached = (
        driver.Builder().with_modules(nodes).with_cache(path=f"{warehouse}/hamilton", recompute=["products"])
    )
    cached.build().execute(["published"], inputs={"catalog": catalog, "warehouse": warehouse})
    print(json.dumps({"llm_calls": peer_steps.llm_calls.total()}))


if __name__ == "__main__":
    main(*sys.argv[1:3])
