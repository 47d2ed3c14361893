"""Recommendations as a Delta table: the current result of every merchant and market, history by time travel.

Owns the table's schema and its atomic replacement. Arrow rows are committed through `deltalake`, without a
JVM; a DataFrame is written by its own Spark session. It must not know how the rows were computed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from deltalake import CommitProperties, DeltaTable, QueryBuilder, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.locks import local_path, table_lock
from featurekit_spark.sinks.base import Publication, PublishedState, SinkResult
from featurekit_spark.sinks.history import Held, commit_note, held_by, runs_in

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

__all__ = ["DeltaSink"]

_PARTITIONS = ["merchant", "market"]
_SPARK_TYPES = {
    "merchant": "string",
    "market": "string",
    "product_id": "string",
    "logic_builder": "string",
    "recs": "array<string>",
    "scores": "array<float>",
    "ts": "timestamp",
    "run_id": "string",
}
_COMMIT_TRIES = 5
_SPARK_CONFLICTS = ("DELTA_CONCURRENT_", "DELTA_METADATA_CHANGED", "DELTA_PROTOCOL_CHANGED")


def recommendations_schema() -> pa.Schema:
    """The table's columns; the first two are its partitions."""
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            ("merchant", text),
            ("market", text),
            ("product_id", text),
            ("logic_builder", text),
            ("recs", pa.list_(text)),
            ("scores", pa.list_(pa.float32())),
            ("ts", pa.timestamp("us", "UTC")),
            ("run_id", text),
        ]
    )


class DeltaSink:
    """The table at `path` (made when first published to): one row per product and logic builder.

    Each replacement is one commit: readers see the old or the new result of a merchant and market, no mix.
    """

    layout = "1"  # the schema is the same for every table

    def __init__(self, path: str, *, name: str = "delta") -> None:
        self.name = name
        local = local_path(path)
        # Absolute, so that Spark with another default file system still means the same folder.
        self.path = path if local is None else str(local.resolve())
        self._local = local is not None

    def __repr__(self) -> str:
        return f"DeltaSink({self.path!r})"

    def check(self) -> None:
        """ConfigError if the path cannot be written or holds something else; ServiceError if unreachable."""
        folder = local_path(self.path)
        if folder is not None and folder.is_file():
            raise ConfigError(f"{self.path!r} is a file: give the sink the path of a folder of its own.")
        table = self._open()
        if table is not None:
            found = {field.name for field in table.schema().fields}
            partitions = table.metadata().partition_columns
            if not set(_SPARK_TYPES) <= found or partitions != _PARTITIONS:
                raise ConfigError(
                    f"{self.path!r} is another table: it has {', '.join(sorted(found))}, partitioned by "
                    f"{', '.join(partitions) or 'nothing'}. Give the sink a path of its own."
                )
        if folder is None:
            return
        if table is None and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{self.path!r} holds files and no Delta table: give the sink a path of its own."
            )
        # The lock file lies beside the table, so the folder above it must be writable too.
        for place in (folder, folder.parent):
            while not place.exists():
                place = place.parent
            if not os.access(place, os.W_OK | os.X_OK):
                raise ConfigError(f"{self.path!r} cannot be written: {str(place)!r} is not writable.")

    def state(self, merchant: str, market: str) -> PublishedState | None:
        """What is published now, from two columns of this merchant and market.

        Not from the log's statistics: Spark cuts texts there to 32 characters, which is shorter than a UUID.
        """
        table = self._open()
        if table is None:
            return None
        query = (
            "SELECT max(run_id) AS run_id, count(*) AS n, "
            "count(CASE WHEN cardinality(recs) > 0 THEN 1 END) AS covered "
            f"FROM recommendations WHERE {_where(merchant, market, _sql_text)}"
        )
        try:
            found = QueryBuilder().register("recommendations", table).execute(query).read_all()
        except Exception as error:  # the query engine raises no type of its own
            raise ServiceError(f"{self.path!r} cannot be read: {error}") from error
        run_id, rows, covered = (found.column(name)[0].as_py() for name in ("run_id", "n", "covered"))
        return PublishedState(run_id, rows, covered) if rows else None

    def publish(self, publication: Publication) -> SinkResult:
        """Replace the rows of the publication's merchant and market in one commit."""
        started = time.monotonic()
        import pyarrow as pa

        rows = publication.rows
        owner = f"run {publication.run_id}"
        for tries in range(1, _COMMIT_TRIES + 1):
            try:
                with table_lock(self.path, owner=owner):
                    self._create()
                    if isinstance(rows, pa.Table):
                        self._replace(publication, rows)
                    else:
                        self._replace_by_spark(publication, rows)
                break
            except (CommitFailedError, _CommitLost) as error:
                if tries == _COMMIT_TRIES:
                    raise ServiceError(
                        f"Lost {tries} commits to {self.path!r} to other writers; run again. Last: {error}"
                    ) from error
                time.sleep(random.uniform(0.5, 1.0) * 2 ** (tries - 1))
            except (DeltaError, OSError) as error:
                raise ServiceError(f"{self.path!r} cannot be written: {error}") from error
        state = self.state(publication.merchant, publication.market)
        return SinkResult(
            self.name,
            rows=state.rows if state else 0,
            seconds=time.monotonic() - started,
            detail={"path": self.path, "covered": state.covered if state else 0},
        )

    def earlier(self, merchant: str, market: str, run_id: str) -> Held | None:
        """What a run published last for a merchant and market, if the table's history still has it."""
        table = self._open()
        return held_by(table, merchant, market, run_id) if table is not None else None

    def runs(self, merchant: str, market: str) -> list[str]:
        """The runs whose publications the table's history names, newest first."""
        table = self._open()
        return list(runs_in(table, merchant, market)) if table is not None else []

    def _open(self) -> DeltaTable | None:
        try:
            return DeltaTable(self.path)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise ServiceError(f"{self.path!r} cannot be read: {error}") from error

    def _create(self) -> None:
        """An empty, typed table where there is none; by default at protocol (1, 2), which Spark knows too."""
        if self._open() is None:
            DeltaTable.create(self.path, recommendations_schema(), mode="ignore", partition_by=_PARTITIONS)

    def _replace(self, publication: Publication, rows: pa.Table) -> None:
        import pyarrow as pa

        schema = recommendations_schema()
        fixed = {
            "merchant": publication.merchant,
            "market": publication.market,
            "ts": publication.ts,
            "run_id": publication.run_id,
        }
        columns = [
            pa.repeat(pa.scalar(fixed[field.name], field.type), rows.num_rows)
            if field.name in fixed
            else rows.column(field.name).cast(field.type)
            for field in schema
        ]
        write_deltalake(
            self.path,
            pa.table(columns, schema=schema),
            mode="overwrite",
            predicate=_where(publication.merchant, publication.market, _sql_text),
            commit_properties=CommitProperties(custom_metadata={"userMetadata": _note_of(publication)}),
        )

    def _replace_by_spark(self, publication: Publication, rows: DataFrame) -> None:
        from pyspark.errors import PySparkException
        from pyspark.sql import functions as F

        fixed = {
            "merchant": publication.merchant,
            "market": publication.market,
            "ts": publication.ts,
            "run_id": publication.run_id,
        }
        columns = [
            (F.lit(fixed[name]) if name in fixed else F.col(name)).cast(kind).alias(name)
            for name, kind in _SPARK_TYPES.items()
        ]
        where = _where(publication.merchant, publication.market, _spark_text)
        writer = rows.select(*columns).write.format("delta").mode("overwrite").option("replaceWhere", where)
        writer = writer.option("userMetadata", _note_of(publication))
        conflicts = _typed_conflicts()
        try:
            writer.save(f"file:{self.path}" if self._local else self.path)
        except conflicts as error:
            raise _CommitLost(str(error)) from error
        except PySparkException as error:
            # Spark Connect knows a conflict by its condition only.
            if (error.getCondition() or "").startswith(_SPARK_CONFLICTS):
                raise _CommitLost(str(error)) from error
            raise


def _note_of(publication: Publication) -> str:
    return commit_note(publication.merchant, publication.market, publication.run_id)


def _where(merchant: str, market: str, quote: Callable[[str], str]) -> str:
    return f"merchant = {quote(merchant)} AND market = {quote(market)}"


def _sql_text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _spark_text(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _typed_conflicts() -> tuple[type[Exception], ...]:
    """Delta's conflicts in Python; importing `captured` is what makes Spark raise them."""
    try:
        import delta.exceptions.captured
    except ImportError:
        return ()
    return (
        delta.exceptions.ConcurrentAppendException,
        delta.exceptions.ConcurrentDeleteDeleteException,
        delta.exceptions.ConcurrentDeleteReadException,
        delta.exceptions.ConcurrentTransactionException,
        delta.exceptions.ConcurrentWriteException,
        delta.exceptions.DeltaConcurrentModificationException,
        delta.exceptions.MetadataChangedException,
        delta.exceptions.ProtocolChangedException,
    )


class _CommitLost(Exception):
    """Another writer's commit came first; the replacement may be tried again."""
