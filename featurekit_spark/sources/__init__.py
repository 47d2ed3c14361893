"""Where products and interactions come from: the protocols, and their file, Delta and in-memory sources.

Knows nothing of features, caches or configuration; the one composition place chooses among these.
"""

from __future__ import annotations

from featurekit_spark.sources.base import (
    Dimension,
    ProductDB,
    ProductScan,
    ScannableProductDB,
    resolve_dimension,
)
from featurekit_spark.sources.delta import DeltaProductDB
from featurekit_spark.sources.files import FileProductDB
from featurekit_spark.sources.interactions import DeltaInteractionDB, FileInteractionDB, InteractionDataDB
from featurekit_spark.sources.memory import InMemoryProductDB

__all__ = [
    "DeltaInteractionDB",
    "DeltaProductDB",
    "Dimension",
    "FileInteractionDB",
    "FileProductDB",
    "InMemoryProductDB",
    "InteractionDataDB",
    "ProductDB",
    "ProductScan",
    "ScannableProductDB",
    "resolve_dimension",
]
