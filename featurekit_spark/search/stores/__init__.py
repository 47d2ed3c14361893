"""Vector indexes: in this process, in Qdrant, in LanceDB. Each imports its store's package when it is made."""

from __future__ import annotations

from featurekit_spark.search.stores.flat import FlatVectorIndex
from featurekit_spark.search.stores.lance import LanceIndex
from featurekit_spark.search.stores.qdrant import QdrantIndex

__all__ = ["FlatVectorIndex", "LanceIndex", "QdrantIndex"]
