"""Recommendations by a search in a vector index outside of this process, `context.vector_index`.

Owns what such an answer depends on: the index as an export (`featurekit vectors export`) left it. The index is that of
the merchant and market.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurekit_spark.apps.product_recs.builders import (
    PER_PRODUCT,
    RANKED,
    ProductEmbedding,
    ProductEmbeddingString,
    Ranked,
    top_k,
    without_itself,
)
from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.errors import ContextError, ServiceError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["IndexSearcher", "SimilarInIndex"]


class IndexSearcher(FeatureBuilder[Ranked]):
    """text -> the nearest products in the index with their scores, best first, equal ones by id.

    The content of the index, by the hash that an export left, is part of the identity: an export that changed anything
    asks for every list again. One that is being changed, or was changed row by row, has no such hash, and is refused.
    """

    hosted = "featurekit_spark.apps.product_recs.hosted:IndexSearcher"
    key = ("merchant", "market", "text")
    deps = (ProductEmbedding,)
    value = RANKED
    version = "1"
    needs = ("vector_index",)

    @dataclass(frozen=True)
    class Config:
        """One product more than `top_k` is searched, so that `top_k` are left without the product itself."""

        content: str
        source: str
        metric: str
        exact: bool
        top_k: int = 10

    def default_config(self, context: Any) -> Config:
        state = None if context.vector_index is None else context.vector_index.describe()
        if state is None or state.content is None:
            found = (
                "none" if context.vector_index is None else "an empty one" if state is None else state.store
            )
            raise ContextError(
                f"{self.name} searches an index as an export left it, and context.vector_index is {found}, which is "
                "not whole. Export to it first: featurekit vectors export."
            )
        if state.spec.source != context.embedder.identity:
            raise ContextError(
                f"{state.store} holds vectors of {state.spec.source!r}, and context.embedder is "
                f"{context.embedder.identity!r}: export to it anew, or give the context the embedder it was made with."
            )
        return self.Config(state.content, state.spec.source, state.spec.metric, state.exact, top_k(context))

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[Ranked]:
        found = context.vector_index.search(np.stack(list(inputs["ProductEmbedding"])), config.top_k + 1)
        state = context.vector_index.describe()
        if state is None or state.content != config.content:
            raise ServiceError(
                "the index was changed while it was searched; run again, which searches it as it is"
            )
        return [[{"product_id": hit.id, "score": hit.score} for hit in hits] for hits in found]


class SimilarInIndex(FeatureBuilder[Ranked]):
    """product_id -> the products with the nearest titles in the index and their scores, never itself."""

    hosted = "featurekit_spark.apps.product_recs.hosted:SimilarInIndex"
    key = PER_PRODUCT
    deps = (IndexSearcher.on(text=ProductEmbeddingString),)
    value = RANKED
    version = "1"
    light = True

    @dataclass(frozen=True)
    class Config:
        """How many products are recommended."""

        top_k: int = 10

    def default_config(self, context: Any) -> Config:
        return self.Config(top_k(context))

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[Ranked]:
        return without_itself(inputs["product_id"], inputs["IndexSearcher"], config.top_k)
