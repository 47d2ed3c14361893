"""The builders of product recommendations over embeddings that are paid for.

The same features under the same names and identities as in `builders`; only the texts' vectors come from a builder that
counts each of them as a call. Which of the two a run uses is decided by the embedder.
"""

from __future__ import annotations

from typing import Any, ClassVar

from featurekit_spark.apps.product_recs import builders, outside
from featurekit_spark.apps.product_recs.builders import LLMSuggestions, ProductEmbeddingString, ProductIds
from featurekit_spark.builder import each
from featurekit_spark.embed.text import HostedTextEmbedding

__all__ = [
    "IndexSearcher",
    "LLMLogic",
    "ProductEmbedding",
    "ProductEmbeddingDB",
    "ProductEmbeddingSearcher",
    "SimilarInIndex",
    "SimilarProducts",
]


class ProductEmbedding(HostedTextEmbedding):
    """text -> its vector, paid for once."""

    version = "1"


class ProductEmbeddingDB(builders.ProductEmbeddingDB):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (ProductEmbedding.on(text=ProductEmbeddingString).over(ProductIds),)
    version = "1"


class ProductEmbeddingSearcher(builders.ProductEmbeddingSearcher):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (ProductEmbeddingDB, ProductEmbedding)
    follows = ProductEmbeddingDB
    version = "1"


class LLMLogic(builders.LLMLogic):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (
        ProductEmbeddingString,
        LLMSuggestions,
        ProductEmbeddingSearcher.on(text=each(LLMSuggestions)),
    )
    version = "1"


class SimilarProducts(builders.SimilarProducts):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (ProductEmbeddingSearcher.on(text=ProductEmbeddingString),)
    version = "1"


class IndexSearcher(outside.IndexSearcher):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (ProductEmbedding,)
    version = "1"


class SimilarInIndex(outside.SimilarInIndex):
    """As the local one."""

    deps: ClassVar[tuple[Any, ...]] = (IndexSearcher.on(text=ProductEmbeddingString),)
    version = "1"
