"""Exact vector search, and the store of the matrices that are searched."""

from __future__ import annotations

from featurekit_spark.search.incremental import OldLists, merge_top_k
from featurekit_spark.search.kernel import FlatIndex, top_k
from featurekit_spark.search.matrix import Matrix, MatrixRef, MatrixStore
from featurekit_spark.search.options import SearchOptions

__all__ = [
    "FlatIndex",
    "Matrix",
    "MatrixRef",
    "MatrixStore",
    "OldLists",
    "SearchOptions",
    "merge_top_k",
    "top_k",
]
