"""Products held in memory, for tests, notebooks and small fixed catalogs.

Owns nothing but the values it is given; behaves like the file and Delta sources otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import DataError
from featurekit_spark.sources.base import (
    AttributeId,
    Dimension,
    IngestionDimensionKey,
    ProductId,
    ProductScan,
    check_asked,
    dimension_of,
    is_blank,
    resolve_dimension,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["InMemoryProductDB"]


class InMemoryProductDB:
    """`products` maps id to attribute to a plain value, or to a dict of values by dimension key.

    The attributes are those that any product has. `version` None means that every run reads again.

    >>> InMemoryProductDB({"p1": {"title": "Lamp"}, "p2": {"title": {(("locale", "de_DE"),): "Lampe"}}})
    InMemoryProductDB(2 products)
    """

    def __init__(
        self, products: Mapping[ProductId, Mapping[AttributeId, Any]], version: str | None = None
    ) -> None:
        self._version = version
        self._products = {
            product_id: {attribute: _by_dimension(value) for attribute, value in attributes.items()}
            for product_id, attributes in products.items()
        }
        self._attributes = {attribute for values in self._products.values() for attribute in values}
        if any(is_blank(product_id) for product_id in self._products):
            raise DataError("InMemoryProductDB: a product has no product_id; give every product an id.")

    def __repr__(self) -> str:
        return f"InMemoryProductDB({len(self._products)} products)"

    def version(self) -> str | None:
        return self._version

    async def get_product_attribute_dimensions(self) -> dict[AttributeId, Dimension]:
        return {
            attribute: dimension_of(
                key for values in self._products.values() for key in values.get(attribute, {})
            )
            for attribute in sorted(self._attributes)
        }

    async def get_products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None = None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        self._require(attribute_ids)
        return {
            product_id: {attribute: dict(values.get(attribute, {})) for attribute in sorted(attribute_ids)}
            for product_id, values in self._products.items()
            if product_ids is None or product_id in product_ids
        }

    def scan(self, attribute_ids: Sequence[AttributeId], *, dimensions: Mapping[str, str]) -> ProductScan:
        check_asked(attribute_ids)
        self._require(attribute_ids)
        columns = {
            attribute: [
                resolve_dimension(values.get(attribute, {}), dimensions) for values in self._products.values()
            ]
            for attribute in attribute_ids
        }
        return _MemoryScan(list(self._products), columns, self._version)

    def _require(self, attribute_ids: Sequence[AttributeId] | set[AttributeId]) -> None:
        for attribute in sorted(attribute_ids):
            # Without products there are no attributes either, and an empty catalog is a fine catalog.
            if self._products and attribute not in self._attributes:
                found = ", ".join(map(repr, sorted(self._attributes)))
                raise DataError(f"InMemoryProductDB: no attribute {attribute!r}; the attributes are {found}.")


def _by_dimension(value: Any) -> dict[IngestionDimensionKey, Any]:
    values = value if isinstance(value, Mapping) else {(): value}
    return {tuple(sorted(key)): v for key, v in values.items() if not is_blank(v)}


class _MemoryScan:
    def __init__(
        self, ids: list[ProductId], columns: dict[AttributeId, list[Any]], version: str | None
    ) -> None:
        self._ids = ids
        self._columns = columns
        self.version = version
        self.bytes = sum(len(str(value)) for values in (ids, *columns.values()) for value in values)

    def to_arrow(self) -> pa.Table:
        import pyarrow as pa

        arrays = [pa.array(self._ids, pa.string())]
        for attribute, values in self._columns.items():
            try:
                array = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"InMemoryProductDB: attribute {attribute!r} has values of different types ({error})."
                ) from None
            arrays.append(array.cast(pa.string()) if pa.types.is_null(array.type) else array)
        return pa.table(arrays, names=["product_id", *self._columns])

    def to_spark(self, spark: SparkSession) -> DataFrame:
        return spark.createDataFrame(self.to_arrow())

    def quality(self) -> dict[str, int]:
        n = len(self._ids)
        counts = {"rows": n, "products": n, "duplicates_dropped": 0}
        return counts | {f"missing_{a}": values.count(None) for a, values in self._columns.items()}
