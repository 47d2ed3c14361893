"""Products from a folder of `{merchant}_{market}.csv` or `.parquet`, one file or a folder of part files each.

Owns how a catalog file's columns are read, in-process and on Spark. The rules for ids, duplicates and
dimensions are catalog.py's, the CSV dialect is csvfile.py's, and the names of files are folder.py's.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurekit_spark.errors import DataError, ServiceError
from featurekit_spark.sources.arrowtypes import plain_type
from featurekit_spark.sources.base import (
    AttributeId,
    Dimension,
    Duplicates,
    IngestionDimensionKey,
    Layout,
    ProductId,
    ProductScan,
)
from featurekit_spark.sources.catalog import TableScan, load_cached
from featurekit_spark.sources.csvfile import lines_of, read_columns, read_header, read_tables
from featurekit_spark.sources.folder import PartFiles, find_parts

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["FileProductDB"]


@dataclass(frozen=True)
class FileProductDB:
    """One merchant's and market's products in files.

    CSV is read as text (no types are guessed), Parquet keeps its types; in both a text of nothing but
    white space is a missing value. Columns may be variants: `title[locale=de_DE]`. A loaded catalog is kept
    per process until its files change.
    """

    path: str | Path
    _: KW_ONLY
    merchant: str
    market: str
    duplicates: Duplicates = "fail"
    id_column: str = "product_id"

    def version(self) -> str:
        """A hash over path, size and times of the files; opens none of them."""
        return self._find().version

    async def get_product_attribute_dimensions(self) -> dict[AttributeId, Dimension]:
        return await asyncio.to_thread(lambda: self._open().layout.dimensions())

    async def get_products(
        self, attribute_ids: set[AttributeId], product_ids: set[ProductId] | None = None
    ) -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
        def read() -> dict[ProductId, dict[AttributeId, dict[IngestionDimensionKey, Any]]]:
            snapshot = self._open()
            catalog = load_cached(self, snapshot, snapshot.layout.needed(sorted(attribute_ids)))
            return catalog.products(attribute_ids, product_ids)

        return await asyncio.to_thread(read)

    def scan(self, attribute_ids: Sequence[AttributeId], *, dimensions: Mapping[str, str]) -> ProductScan:
        return TableScan(self._open(), attribute_ids, dimensions=dimensions, key=self)

    def _find(self) -> PartFiles:
        return find_parts(str(self.path), merchant=self.merchant, market=self.market, what="product_db")

    def _open(self) -> _FileSnapshot:
        return _FileSnapshot(self, self._find())


class _FileSnapshot:
    """The files as they were found; reading them after they changed is an error."""

    def __init__(self, db: FileProductDB, parts: PartFiles) -> None:
        self._db = db
        self._parts = parts
        self.version = parts.version
        self.bytes = parts.bytes
        self.duplicates = db.duplicates

    @cached_property
    def layout(self) -> Layout:
        first = self._parts.files[0]
        layout = Layout(_names(first), where=str(self._parts.root), reserved=(self._db.id_column,))
        layout.require(self._db.id_column)
        return layout

    def read_arrow(self, columns: Sequence[str]) -> pa.Table:
        import pyarrow as pa

        named = [self._db.id_column, *columns]
        names = _raw_names(columns)
        if self._parts.format == "csv":
            text = pa.schema([(name, pa.string()) for name in names])
            parts = [list(_csv_tables(path, named)) for path in self._parts.files]
            lengths = [sum(map(len, part)) for part in parts]
            tables = [part.rename_columns(names) for whole in parts for part in whole]
            table = pa.concat_tables(tables) if tables else text.empty_table()
        else:
            tables = [_parquet_part(path, named) for path in self._parts.files]
            lengths = [len(part) for part in tables]
            table = _concat(tables, self._parts.files).rename_columns(names)
        self._begins = [0, *accumulate(lengths)]
        self._check_unchanged()
        return table

    def read_spark(self, spark: SparkSession, columns: Sequence[str]) -> DataFrame:
        from pyspark.sql import functions as F

        named = [self._db.id_column, *columns]
        names = _raw_names(columns)
        for path in self._parts.files:
            _require_all(path, named)
        if self._parts.format == "csv":
            return _csv_on_spark(spark, self._parts.files, named, names)
        prefix = "file:" if str(self._db.path).startswith("file:") else ""
        paths = [prefix + re.sub(r"([*?\[\]{}\\])", r"\\\1", str(path)) for path in self._parts.files]
        quoted = ["`" + name.replace("`", "``") + "`" for name in named]
        selected = [F.col(old).alias(new) for old, new in zip(quoted, names, strict=True)]
        order = F.struct("_metadata.file_name", "_metadata.row_index").alias("_order")
        return spark.read.parquet(*paths).select(*selected, order)

    def ids_on_spark(self, spark: SparkSession) -> DataFrame:
        from pyspark.sql import functions as F

        if self._parts.format == "csv":
            return _csv_ids_on_spark(spark, self._parts.files, self._db.id_column)
        return self.read_spark(spark, ()).select("product_id", F.lit(None).cast("string").alias("problem"))

    def locate(self, rows: Sequence[int]) -> str:
        places = []
        for row in rows:
            part = bisect_right(self._begins, row) - 1
            path, inner = self._parts.files[part], row - self._begins[part]
            csv = self._parts.format == "csv"
            place = f"line {lines_of(path, [inner])[0]}" if csv else f"row {inner + 1}"
            places.append(place if len(self._parts.files) == 1 else f"{path.name} {place}")
        return ", ".join(places)

    def _check_unchanged(self) -> None:
        if self._db._find().version != self.version:
            raise ServiceError(
                f"{self._parts.root}: changed while it was read; run again, and write catalogs under "
                "another name before renaming them into place."
            )


def _raw_names(columns: Sequence[str]) -> list[str]:
    return ["product_id", *(f"c{i}" for i in range(len(columns)))]


def _names(path: Path) -> tuple[str, ...]:
    if path.suffix == ".csv":
        return read_header(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return tuple(pq.read_schema(path).names)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write the file again.") from None


def _require_all(path: Path, named: Sequence[str]) -> None:
    layout = Layout(_names(path), where=str(path))
    for name in named:
        layout.require(name)


def _csv_tables(path: Path, named: Sequence[str]) -> Iterator[pa.Table]:
    _require_all(path, named)
    yield from read_tables(path, named)


def _parquet_part(path: Path, named: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require_all(path, named)
    try:
        table = pq.ParquetFile(path).read(columns=list(dict.fromkeys(named)))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write the file again.") from None
    plain = [table[name].cast(plain_type(table[name].type), safe=False) for name in named]
    return pa.table(plain, names=list(map(str, range(len(named)))))


def _concat(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    import pyarrow as pa

    for table, path in zip(tables, files, strict=True):
        if table.schema != tables[0].schema:
            raise DataError(f"{path}: column types unlike those of {files[0].name}; write all parts alike.")
    return pa.concat_tables(tables)


# Spark's own CSV reader knows no row numbers, replaces bytes that are no UTF-8, and differs from other
# readers in small ways. A file whose cells may hold line ends is one task there too, so nothing is lost.
def _csv_on_spark(
    spark: SparkSession, files: Sequence[Path], named: Sequence[str], names: Sequence[str]
) -> DataFrame:
    def read(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        import pyarrow as pa

        for part in (part for batch in batches for part in batch.column(0).to_pylist()):
            done = 0
            for rows in (batch for table in _csv_tables(files[part], named) for batch in table.to_batches()):
                numbers = pa.array(range(done, done + len(rows)), pa.int64())
                parts = pa.array([part] * len(rows), pa.int64())
                order = pa.StructArray.from_arrays([parts, numbers], names=["part", "row"])
                yield pa.record_batch([*rows.columns, order], names=[*names, "_order"])
                done += len(rows)

    schema = ", ".join(f"{name} string" for name in names) + ", _order struct<part: bigint, row: bigint>"
    return _one_task_per_file(spark, files).mapInArrow(read, schema)


# A bad line comes back as a row: raised in a task, it would be tried again and end as a worker's traceback.
def _csv_ids_on_spark(spark: SparkSession, files: Sequence[Path], id_column: str) -> DataFrame:
    def read(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        import pyarrow as pa

        schema = pa.schema([("product_id", pa.string()), ("problem", pa.string())])
        for part in (part for batch in batches for part in batch.column(0).to_pylist()):
            try:
                for (ids,) in read_columns(files[part], [id_column]):
                    yield pa.record_batch([ids, pa.nulls(len(ids), pa.string())], schema=schema)
            except DataError as error:
                yield pa.record_batch([[None], [str(error)]], schema=schema)

    return _one_task_per_file(spark, files).mapInArrow(read, "product_id string, problem string")


def _one_task_per_file(spark: SparkSession, files: Sequence[Path]) -> DataFrame:
    return spark.range(0, len(files), 1, len(files))
