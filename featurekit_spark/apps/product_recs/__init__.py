"""Product recommendations for a merchant and market: similar products, and what a language model suggests."""

from __future__ import annotations

from featurekit_spark.apps.product_recs.builders import (
    LLMLogic,
    LLMProductPrompt,
    LLMSuggestions,
    ProductEmbedding,
    ProductEmbeddingDB,
    ProductEmbeddingSearcher,
    ProductEmbeddingString,
    ProductIds,
    SimilarProducts,
)
from featurekit_spark.llm.completion import LLMCompletion

__all__ = [
    "LLMCompletion",
    "LLMLogic",
    "LLMProductPrompt",
    "LLMSuggestions",
    "ProductEmbedding",
    "ProductEmbeddingDB",
    "ProductEmbeddingSearcher",
    "ProductEmbeddingString",
    "ProductIds",
    "SimilarProducts",
]
