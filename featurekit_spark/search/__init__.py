"""Exact vector search, and the store of the matrices that are searched."""

from __future__ import annotations

from featurekit_spark.search.kernel import FlatIndex, top_k
from featurekit_spark.search.matrix import Matrix, MatrixRef, MatrixStore

__all__ = ["FlatIndex", "Matrix", "MatrixRef", "MatrixStore", "top_k"]
