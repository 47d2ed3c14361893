"""Embedders, and the builder of text embeddings."""

from __future__ import annotations

from featurekit_spark.embed.base import Embedder
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.embed.text import TextEmbedding

__all__ = ["Embedder", "HashingEmbedder", "TextEmbedding"]
