"""Exports the vectors of a merchant and market, with attributes of the products, to a vector index.

Owns which payload a product has. Takes a matrix, a catalog and an index; must not know where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurekit_spark.errors import DataError
from featurekit_spark.search.blocks import PartedMatrix
from featurekit_spark.search.export import Exported, export_vectors
from featurekit_spark.search.filters import FieldKind
from featurekit_spark.search.index import VectorIndex
from featurekit_spark.search.matrix import Matrix
from featurekit_spark.sources.base import ScannableProductDB, is_blank

__all__ = ["ProductPayloads", "export_matrix"]

_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def export_matrix(
    index: VectorIndex,
    matrix: Matrix | PartedMatrix,
    products: ScannableProductDB,
    *,
    dimensions: Mapping[str, str],
    batch: int = 1000,
    in_place: float = 0.2,
    dry_run: bool = False,
) -> Exported:
    """`export_vectors` of a matrix; the index's fields are attributes of the products, resolved for `dimensions`."""
    payloads = (
        ProductPayloads(products, matrix.ids, index.spec.fields, dimensions) if index.spec.fields else None
    )
    return export_vectors(
        index, matrix.ids, matrix.vectors, payloads, batch=batch, in_place=in_place, dry_run=dry_run
    )


class ProductPayloads:
    """Attributes of the products `ids`, read once as columns and given as mappings part by part.

    A product that left the catalog since its vector was made, and a value that is missing or blank, give null. Raises
    DataError for a value that is not of its field's type.
    """

    def __init__(
        self,
        products: ScannableProductDB,
        ids: Sequence[str],
        fields: Mapping[str, FieldKind],
        dimensions: Mapping[str, str],
    ) -> None:
        self._ids, self._fields = ids, fields
        self._table = products.scan(list(fields), dimensions=dimensions).to_arrow()
        self._row_of = {name: row for row, name in enumerate(self._table["product_id"].to_pylist())}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, part: slice) -> Sequence[Mapping[str, Any]]:
        import pyarrow as pa

        names = self._ids[part]
        rows = pa.array([self._row_of.get(name) for name in names], pa.int64())
        columns = {
            field: [
                _value(name, field, value, kind)
                for name, value in zip(names, self._table[field].take(rows).to_pylist(), strict=True)
            ]
            for field, kind in self._fields.items()
        }
        return [{field: columns[field][place] for field in columns} for place in range(len(names))]


def _value(name: str, field: str, value: Any, kind: FieldKind) -> Any:
    if is_blank(value):
        return None
    try:
        match kind:
            case "str":
                return value if isinstance(value, str) else str(value)
            case "int":
                if isinstance(value, float) and not value.is_integer():
                    raise ValueError
                return int(value)
            case "float":
                return float(value)
            case "bool":
                return value if isinstance(value, bool) else _TRUTH[str(value).strip().lower()]
    except (ValueError, TypeError, KeyError, OverflowError):
        raise DataError(
            f"product {name!r}: {field!r} is {value!r}, and vector_index.fields says that it is {kind}; mend the "
            "catalog, or declare the field str"
        ) from None
