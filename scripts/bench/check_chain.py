"""The features that scripts/bench/check runs: a chain without search over a catalog whose version nobody tells.

Key set and source offer a scan and no version, so that every run reads them again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from featurekit_spark import FeatureBuilder, KeySet, Source

PER_PRODUCT = ("merchant", "market", "product_id")


class Scan:
    """A reading of the catalog's file: `columns` under new names. It tells no version."""

    def __init__(self, scan: Any, columns: Mapping[str, str]) -> None:
        self._scan, self._columns = scan, columns

    @property
    def bytes(self) -> int:
        return int(self._scan.bytes)

    def to_arrow(self) -> pa.Table:
        table = self._scan.to_arrow()
        return pa.table({new: table[old] for new, old in self._columns.items()}).sort_by("product_id")

    def to_spark(self, spark: Any) -> Any:
        return self._scan.to_spark(spark).selectExpr(
            *(f"`{old}` as {new}" for new, old in self._columns.items())
        )


class Rows(KeySet):
    key = ("merchant", "market")
    of = "product_id"
    value = pa.list_(pa.string())
    needs = ("product_db",)

    async def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> list[list[str]]:
        return [sorted(await context.product_db.get_products(set()))] * len(inputs)

    def scan(self, group: Mapping[str, Any], config: Any, context: Any) -> Scan:
        return Scan(context.product_db.scan([], dimensions={}), {"product_id": "product_id"})


class Title(Source[str]):
    key = PER_PRODUCT
    value = pa.string()
    needs = ("product_db",)

    async def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> list[str | None]:
        products = await context.product_db.get_products({"title"}, set(inputs["product_id"]))
        return [products.get(product, {}).get("title", {}).get(()) for product in inputs["product_id"]]

    def scan(self, group: Mapping[str, Any], config: Any, context: Any) -> Scan:
        columns = {"product_id": "product_id", "value": "title"}
        return Scan(context.product_db.scan(["title"], dimensions={}), columns)


class Plain(FeatureBuilder[str]):
    """The title without case and punctuation."""

    key = PER_PRODUCT
    deps = (Title,)
    value = pa.string()

    def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> pd.Series:
        return inputs["Title"].str.casefold().str.replace(",", "", regex=False)


class Words(FeatureBuilder[list[str]]):
    """The longest words of the plain title."""

    key = PER_PRODUCT
    deps = (Plain,)
    value = pa.list_(pa.string())

    def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> list[list[str]]:
        return [
            sorted(set(text.split()), key=lambda word: (-len(word), word))[:3] for text in inputs["Plain"]
        ]
