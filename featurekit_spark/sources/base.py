"""What a source of products offers, and how values that vary by dimension are named and chosen.

Owns the protocols, the header form `title[locale=de_DE]` and the rule that picks one value. Knows
nothing of files, tables, merchants' configuration or features; imports neither pyarrow nor pyspark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from featurekit_spark.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = [
    "BLANKS",
    "AttributeId",
    "Dimension",
    "Duplicates",
    "IngestionDimensionKey",
    "Layout",
    "ProductDB",
    "ProductId",
    "ProductScan",
    "ScannableProductDB",
    "is_blank",
    "parse_column",
    "resolve_dimension",
]

AttributeId: TypeAlias = str
ProductId: TypeAlias = str
IngestionDimensionKey: TypeAlias = tuple[tuple[str, str], ...]
"""(dimension, value) pairs sorted by dimension; `()` is the value without dimensions."""

Duplicates: TypeAlias = Literal["fail", "keep_last"]

# Spelled out because Python, Arrow and Java each have their own idea of white space.
BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def is_blank(value: object) -> bool:
    """Missing: None, or a text with nothing but white space in it."""
    return value is None or (isinstance(value, str) and not value.strip(BLANKS))


@dataclass(frozen=True)
class Dimension:
    """What an attribute may vary by: the dimensions' names, and for each the values seen, all sorted."""

    names: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()


class ProductDB(Protocol):
    """Products by id, as they were ingested: every attribute with all its variants."""

    async def get_product_attribute_dimensions(self) -> dict[AttributeId, Dimension]: ...

    async def get_products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None = None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        """The products among `product_ids` (None: all) that exist, each with exactly `attribute_ids`.

        A missing value is left out, so an attribute without any value is an empty dict.
        Raises DataError for an attribute that the source does not have.
        """
        ...


class ProductScan(Protocol):
    """One reading of all products: columns product_id (string) and one per attribute, unique by id.

    Row order is not part of the result. `to_arrow` and `to_spark` give the same rows and values.
    """

    @property
    def bytes(self) -> int:
        """Size in storage of what will be read."""
        ...

    @property
    def version(self) -> str | None:
        """The snapshot that this scan reads."""
        ...

    def to_arrow(self) -> pa.Table:
        """Read here, without a JVM."""
        ...

    def to_spark(self, spark: SparkSession) -> DataFrame:
        """Let Spark read; rows do not pass through this process. Ids are checked by one job first."""
        ...

    def quality(self) -> dict[str, int]:
        """Counts of this reading: rows, products, duplicates_dropped, and missing_{attribute} for each.

        Reads the catalog in-process if `to_arrow` has not done so yet.
        """
        ...


@runtime_checkable
class ScannableProductDB(ProductDB, Protocol):
    """A product DB that can also give its whole catalog at once, and say which snapshot it is at."""

    def version(self) -> str | None:
        """Changes whenever the products may have changed; None where that is unknown. Reads no product."""
        ...

    def scan(self, attribute_ids: Sequence[AttributeId], *, dimensions: Mapping[str, str]) -> ProductScan:
        """All products, each attribute resolved for `dimensions` as `resolve_dimension` does."""
        ...


def resolve_dimension(values: Mapping[IngestionDimensionKey, Any], wanted: Mapping[str, str]) -> Any | None:
    """The value whose key says most of what is `wanted` and nothing else; None if there is none.

    More pairs beat fewer, the value without dimensions comes last, equal counts go by the sorted key.
    A missing value never hides a less specific one.

    >>> resolve_dimension({(): "Lamp", (("locale", "de_DE"),): "Lampe"}, {"locale": "de_DE"})
    'Lampe'
    """
    for key in matching_keys(values, wanted):
        if not is_blank(values[key]):
            return values[key]
    return None


def matching_keys(
    keys: Iterable[IngestionDimensionKey], wanted: Mapping[str, str]
) -> list[IngestionDimensionKey]:
    """The keys that say nothing but what is `wanted`, in the order in which they are tried."""
    matching = [key for key in keys if all(wanted.get(name) == value for name, value in key)]
    return sorted(matching, key=lambda key: (-len(key), key))


_VARIANT = re.compile(r"(?P<attribute>[^\[\]]+)\[(?P<pairs>[^\[\]]*[=:][^\[\]]*)\]")


def parse_column(name: str) -> tuple[AttributeId, IngestionDimensionKey]:
    """The attribute and dimension key that a column's name stands for.

    `title` is the value without dimensions, `price[locale=de_DE;warehouse=w1]` the one for that locale
    and warehouse. Delta allows neither `=` nor `;` in column names: `price[locale:de_DE|warehouse:w1]` is
    the same. Any other name (`weight [kg]`) is an attribute of that name.

    >>> parse_column("price[warehouse=w1;locale=de_DE]")
    ('price', (('locale', 'de_DE'), ('warehouse', 'w1')))
    """
    match = _VARIANT.fullmatch(name)
    if match is None:
        return name, ()
    key: dict[str, str] = {}
    for pair in re.split(r"[;|]", match["pairs"]):
        dimension, *rest = re.split(r"[=:]", pair, maxsplit=1)
        value = rest[0] if rest else ""
        if not dimension or not value or dimension in key:
            raise DataError(
                f"column {name!r}: {pair!r} is not one dimension=value, each dimension once; "
                "write it like title[locale=de_DE;warehouse=w1]."
            )
        key[dimension] = value
    return match["attribute"], tuple(sorted(key.items()))


@dataclass(frozen=True)
class Layout:
    """Which columns of a table hold which attributes.

    `names` are the table's columns (an unnamed one is ignored), `where` names the table in errors,
    `reserved` are columns that are no attributes.
    """

    names: tuple[str, ...]
    where: str
    reserved: tuple[str, ...] = ()
    columns: Mapping[AttributeId, Mapping[IngestionDimensionKey, str]] = field(init=False)

    def __post_init__(self) -> None:
        columns: dict[AttributeId, dict[IngestionDimensionKey, str]] = {}
        for name in self.names:
            if not name:
                continue
            if self.names.count(name) > 1:
                raise DataError(f"{self.where}: column {name!r} is there twice; rename or drop one.")
            if name in self.reserved:
                continue
            try:
                attribute, key = parse_column(name)
            except DataError as error:
                raise DataError(f"{self.where}: {error}") from None
            other = columns.setdefault(attribute, {}).setdefault(key, name)
            if other != name:
                raise DataError(f"{self.where}: columns {other!r} and {name!r} mean the same; drop one.")
        object.__setattr__(self, "columns", columns)

    def require(self, name: str) -> str:
        """`name` itself if it is a column, else DataError with the columns found."""
        if name not in self.names:
            found = ", ".join(repr(column) for column in self.names)
            raise DataError(
                f"{self.where}: no column {name!r}; the columns found are {found or 'none'}. Add it, or rename the one "
                "that is meant (another column can be the title: product_db.title_attribute)."
            )
        return name

    def variants(self, attribute: AttributeId) -> Mapping[IngestionDimensionKey, str]:
        """The columns of one attribute by dimension key; DataError if it has none."""
        return self.columns.get(attribute) or {(): self.require(attribute)}

    def needed(self, attributes: Iterable[AttributeId]) -> tuple[str, ...]:
        """Every column that holds one of `attributes`, each once, in a stable order."""
        return tuple(dict.fromkeys(name for a in attributes for name in self.variants(a).values()))

    def resolution(self, attribute: AttributeId, wanted: Mapping[str, str]) -> tuple[str, ...]:
        """The columns to try for `attribute`, first the most specific."""
        variants = self.variants(attribute)
        return tuple(variants[key] for key in matching_keys(variants, wanted))

    def dimensions(self) -> dict[AttributeId, Dimension]:
        return {attribute: dimension_of(keys) for attribute, keys in sorted(self.columns.items())}


def dimension_of(keys: Iterable[IngestionDimensionKey]) -> Dimension:
    """What the keys of one attribute vary by."""
    seen: dict[str, set[str]] = {}
    for key in keys:
        for name, value in key:
            seen.setdefault(name, set()).add(value)
    names = tuple(sorted(seen))
    return Dimension(names, tuple(tuple(sorted(seen[name])) for name in names))


def check_asked(attributes: Sequence[AttributeId]) -> None:
    """UsageError if the columns of a scan for `attributes` would not have names of their own."""
    if len({*attributes, "product_id"}) != len(attributes) + 1:
        raise UsageError(
            f"attributes {list(attributes)!r} of one scan: ask for each once, and not for product_id, "
            "which is always there."
        )
