"""A vector index in LanceDB: tables in a folder or on an object store, no server.

Owns the layout there: a table per generation, `{name}--{generation}`; the table `{name}--live` has a row per switch,
the last of which says what is searched. Adding a row is one commit, so a reader sees the switch before or after.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import pyarrow as pa

from featurekit_spark.errors import ConfigError, ContextError, FeaturekitError, ServiceError
from featurekit_spark.search.arguments import Floats
from featurekit_spark.search.filters import And, Equals, Filter, In, Or, Range, Scalar
from featurekit_spark.search.generation_store import Candidates, GenerationGoneError, Live
from featurekit_spark.search.generations import StoredIndex
from featurekit_spark.search.index import IndexSpec, Row
from featurekit_spark.search.stores.names import checked_name

__all__ = ["LanceIndex"]

_PAGE = 2000
_OLD = timedelta(hours=1)  # a reader of the state before has ended by then
_SWITCHES = 16  # rows of the live table before it is shortened
_FRAGMENTS = (
    64  # of a generation that is changed in place, before they are made one: all its rows are written for it
)
_VERSIONS = 16  # of it that nobody reads any more, before they are removed
_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class LanceIndex(StoredIndex):
    """The index `name` in the LanceDB database `uri`, a folder or an address such as s3://bucket/path.

    All rows are compared. `exact=False` builds an inverted file over each generation of at least 10,000 rows and
    searches `nprobes` of its lists: faster, and may miss neighbours.
    """

    def __init__(
        self,
        name: str,
        spec: IndexSpec | None = None,
        *,
        uri: str | Path,
        exact: bool = True,
        nprobes: int = 20,
        storage_options: dict[str, str] | None = None,
    ) -> None:
        super().__init__(_Store(checked_name(name), str(uri), exact, nprobes, storage_options), spec)
        self._made = partial(
            type(self), name, spec, uri=uri, exact=exact, nprobes=nprobes, storage_options=storage_options
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made, ()  # who gets a copy opens it for himself


class _Store:
    def __init__(
        self, name: str, uri: str, exact: bool, nprobes: int, storage_options: dict[str, str] | None
    ) -> None:
        if uri.startswith("db://"):
            raise ConfigError(
                f"{uri!r} is LanceDB's own service; give a folder, or an address such as s3://bucket/path"
            )
        try:
            import lancedb
        except ImportError as error:
            raise ContextError("LanceDB needs lancedb: pip install 'featurekit-spark[vector]'.") from error
        self.name, self.exact, self._nprobes = name, exact, nprobes
        self.place = f"LanceDB in {uri!r}, {name}"
        with self._asking():
            self._db: Any = lancedb.connect(
                uri, read_consistency_interval=timedelta(0), storage_options=storage_options
            )

    def live(self) -> Live | None:
        rows = self._switches()
        if not rows:
            return None
        last = max(rows, key=lambda row: (row["number"], row["generation"]))
        spec = IndexSpec.from_json(json.loads(last["spec"]))
        return Live(last["generation"], spec, last["content"], last["before"])

    def publish(self, live: Live) -> None:
        schema = pa.schema(
            [("number", pa.int64())]
            + [(name, pa.string()) for name in ("generation", "spec", "content", "before")]
        )
        number = max((row["number"] for row in self._switches()), default=0) + 1
        row = {
            "number": number,
            "generation": live.generation,
            "spec": json.dumps(live.spec.to_json()),
            "content": live.content,
            "before": live.before,
        }
        with self._asking():
            table = self._db.create_table(f"{self.name}--live", schema=schema, exist_ok=True)
            table.add(pa.Table.from_pylist([row], schema=schema))
            if table.count_rows() > _SWITCHES:
                table.delete(f"number < {number}")
                table.optimize(cleanup_older_than=_OLD)

    def generations(self) -> list[str]:
        start = f"{self.name}--"
        names = [name.removeprefix(start) for name in self._tables() if name.startswith(start)]
        return [name for name in names if name != "live"]

    def create(self, generation: str, spec: IndexSpec) -> None:
        with self._asking():
            self._db.create_table(self._name(generation), schema=_schema(spec), exist_ok=True)

    def drop(self, generation: str) -> None:
        with self._asking():
            self._db.drop_table(self._name(generation), ignore_missing=True)

    def finish(self, generation: str, spec: IndexSpec) -> None:
        with self._asking(generation):
            table = self._db.open_table(self._name(generation))
            table.optimize(cleanup_older_than=timedelta(milliseconds=1))  # nobody reads it yet
            rows = table.count_rows()
            if not self.exact and rows >= 10_000:
                table.create_index(
                    metric=_distance(spec),
                    vector_column_name="vector",
                    index_type="IVF_FLAT",
                    num_partitions=max(1, round(math.sqrt(rows))),
                )

    def tidy(self, generation: str) -> None:
        with self._asking(generation):
            table = self._db.open_table(self._name(generation))
            fragments = table.stats()["fragment_stats"]["num_fragments"]
            # Without a time zone they are local.
            until = datetime.now().astimezone() - _OLD
            old = sum(version["timestamp"].astimezone() < until for version in table.list_versions())
            if fragments > _FRAGMENTS or old > _VERSIONS:
                table.optimize(cleanup_older_than=_OLD)

    def put(self, generation: str, spec: IndexSpec, rows: Sequence[Row]) -> None:
        schema = _schema(spec)
        columns: dict[str, Any] = {
            "id": pa.array([row.id for row in rows], pa.string()),
            "hash": pa.array([row.hash for row in rows], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(np.concatenate([row.vector for row in rows])), spec.dim
            ),
        }
        for name, kind in spec.fields.items():
            columns[f"p_{name}"] = pa.array([row.payload[name] for row in rows], _TYPES[kind])
        with self._asking(generation):
            merge = self._db.open_table(self._name(generation)).merge_insert("id")
            merge.when_matched_update_all().when_not_matched_insert_all().execute(
                pa.table(columns, schema=schema)
            )

    def remove(self, generation: str, ids: Sequence[str]) -> None:
        with self._asking(generation):
            table = self._db.open_table(self._name(generation))
            for start in range(0, len(ids), _PAGE):
                table.delete(_one_of("id", ids[start : start + _PAGE]))

    def hashes(self, generation: str, ids: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        pages = [None] if ids is None else [ids[start : start + _PAGE] for start in range(0, len(ids), _PAGE)]
        for page in pages:
            with self._asking(generation):
                query = self._db.open_table(self._name(generation)).search().select(["id", "hash"])
                if page is not None:
                    query = query.where(_one_of("id", page))
                batches = query.to_batches(batch_size=_PAGE)
                for batch in batches:
                    yield from zip(batch["id"].to_pylist(), batch["hash"].to_pylist(), strict=True)

    def count(self, generation: str, wanted: Filter | None) -> int:
        with self._asking(generation):
            table = self._db.open_table(self._name(generation))
            return int(table.count_rows(None if wanted is None else _sql(wanted)))

    def check(self, wanted: Filter) -> None:
        pass  # it can do all of them

    def candidates(
        self, generation: str, spec: IndexSpec, queries: Floats, limit: int, wanted: Filter | None
    ) -> list[Candidates]:
        with self._asking(generation):
            search = self._db.open_table(self._name(generation)).search(
                queries, vector_column_name="vector", query_type="vector"
            )
            search = search.distance_type(_distance(spec)).limit(limit)
            search = search.bypass_vector_index() if self.exact else search.nprobes(self._nprobes)
            if wanted is not None:
                search = search.where(_sql(wanted), prefilter=True)
            found = search.to_arrow()
        return _by_query(found, spec, len(queries))

    def close(self) -> None:
        pass  # it holds nothing open

    def _switches(self) -> list[dict[str, Any]]:
        name = f"{self.name}--live"
        if name not in self._tables():
            return []
        with self._asking():
            rows: list[dict[str, Any]] = self._db.open_table(name).to_arrow().to_pylist()
        return rows

    def _tables(self) -> list[str]:
        names: list[str] = []
        token = None
        with self._asking():
            while True:
                page = self._db.list_tables(page_token=token, limit=1000)
                names += page.tables
                token = page.page_token
                if not token:
                    return names

    def _name(self, generation: str) -> str:
        return f"{self.name}--{generation}"

    @contextmanager
    def _asking(self, generation: str | None = None) -> Iterator[None]:
        """LanceDB's errors translated into ours: it has none of its own."""
        try:
            yield
        except FeaturekitError:
            raise
        except (ValueError, RuntimeError, OSError, FileNotFoundError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            if generation is not None and "not found" in told.lower():
                raise GenerationGoneError(
                    f"{self.place}: generation {generation} is gone; search again"
                ) from error
            if isinstance(error, PermissionError):
                raise ConfigError(f"{self.place} cannot be used: {told}") from error
            raise ServiceError(f"{self.place} failed: {told}") from error


def _schema(spec: IndexSpec) -> pa.Schema:
    own = [("id", pa.string()), ("hash", pa.string()), ("vector", pa.list_(pa.float32(), spec.dim))]
    return pa.schema([*own, *((f"p_{name}", _TYPES[kind]) for name, kind in spec.fields.items())])


def _distance(spec: IndexSpec) -> str:
    return "cosine" if spec.metric == "cosine" else "dot"


def _by_query(found: pa.Table, spec: IndexSpec, queries: int) -> list[Candidates]:
    numbers = (
        found["query_index"].to_numpy() if "query_index" in found.column_names else np.zeros(len(found), int)
    )
    scores = 1.0 - found["_distance"].to_numpy().astype(np.float64)
    vectors = found["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, spec.dim)
    ids = np.array(found["id"].to_pylist(), dtype=object)
    payloads = (
        found.select([f"p_{name}" for name in spec.fields]).rename_columns(list(spec.fields)).to_pylist()
    )
    answers = []
    for number in range(queries):
        places = np.flatnonzero(numbers == number)
        places = places[np.argsort(-scores[places], kind="stable")]
        own = [payloads[place] for place in places] if spec.fields else [{} for _ in places]
        answers.append(Candidates(ids[places].tolist(), flat[places], scores[places], own))
    return answers


def _sql(wanted: Filter) -> str:
    match wanted:
        case Equals(name, value):
            return f"(`p_{name}` = {_literal(value)})"
        case In(name, values):
            return f"({_one_of(f'`p_{name}`', values)})"
        case Range(name):
            return (
                "("
                + " AND ".join(
                    f"`p_{name}` {_SIGNS[side]} {_literal(v)}" for side, v in wanted.bounds.items()
                )
                + ")"
            )
        case And(parts):
            return "(" + " AND ".join(map(_sql, parts)) + ")"
        case Or(parts):
            return "(" + " OR ".join(map(_sql, parts)) + ")"
    assert_never(wanted)


def _one_of(column: str, values: Sequence[Scalar]) -> str:
    return f"{column} IN ({', '.join(map(_literal, values))})"


def _literal(value: Scalar) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case float():
            return repr(value)
        case int():
            return str(value)
    assert_never(value)
