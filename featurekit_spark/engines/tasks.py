"""What runs inside Spark's Python workers: functions from Arrow batches to Arrow batches around the evaluator.

Each holds only what its stage needs and knows no session. An error of the run (a spent budget, a context that lacks
something) is told in the library's own words on the driver, not in a Java stack trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark import errors
from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Dep, FeatureBuilder, KeySet, keys_of
from featurekit_spark.cache.journal import Journal
from featurekit_spark.cache.staged import Staging
from featurekit_spark.controller import HandController
from featurekit_spark.engines.lookup import CACHED_SCHEMA, from_table
from featurekit_spark.errors import CacheError, FeaturekitError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.failures import Failures
from featurekit_spark.fingerprint import key_json
from featurekit_spark.flight import SingleFlight
from featurekit_spark.results import (
    ROW_SCHEMA,
    Counts,
    Origin,
    Result,
    count_rows,
    plain_entries,
    results_by_key,
    to_rows,
    without_known,
)
from featurekit_spark.values import ValueType, typed_column

__all__ = [
    "CHUNK_ANSWER",
    "GIVEN_SCHEMA",
    "ChunkTask",
    "ColumnTask",
    "DecodeTask",
    "GatherTask",
    "LinkTask",
    "MemberTask",
    "PackTask",
    "ReadsTask",
    "SourceTask",
    "StageWork",
    "WarmTask",
    "closed",
    "framed",
    "opened",
    "raised",
    "told",
]

Key = tuple[Any, ...]
Builder = type[FeatureBuilder[Any]]

GIVEN_SCHEMA = pa.schema([*ROW_SCHEMA, ("cached", pa.bool_()), ("last_reads", pa.string())])
"""A row given to a key of a stage: a result of an earlier stage, or (`cached`) an entry that it may find."""


@dataclass(frozen=True)
class StageWork:
    """A stage's part in a worker: its builders, and what they share.

    `context`: the attributes that its builders declare. `shared`: group-level results, passed once; `former`: entries
    (CACHED_SCHEMA) of what the group's features were before.
    `cache`: for hand-written gets only, whose reads nobody knows beforehand. `journal`, `failures`, `flight`: of a
    stage that pays. `tasks`: how many may run at once, None for as many as fit.
    """

    fields: tuple[str, ...]
    builders: tuple[Builder, ...]
    bindings: Bindings
    context: Mapping[str, Any]
    shared: tuple[tuple[Builder, pa.Table], ...]
    now: datetime
    batch_rows: int
    former: pa.Table
    cache: Any = None
    journal: Journal | None = None
    failures: Failures | None = None
    tasks: int | None = None
    flight: SingleFlight | None = None

    def inline(self) -> list[str]:
        """The builders that no cache keeps."""
        return [builder.name for builder, _ in self.bindings.items() if builder.inline]

    def evaluator(self, given: pa.Table, cached: pa.Table) -> Evaluator:
        """An evaluator that knows the given rows."""
        context = SimpleNamespace(**self.context)
        store: Any = (
            self.cache if self.cache is not None else from_table(pa.concat_tables([cached, self.former]))
        )
        evaluator = Evaluator(
            self.bindings,
            context,
            store,
            now=self.now,
            batch_rows=self.batch_rows,
            controller=lambda e: HandController(context, store, e),
            journal=self.journal if self.journal is not None and self.journal.seen() else None,
            failures=self.failures,
            flight=self.flight,
        )
        for builder, table in self.shared:
            evaluator.give(builder, results_by_key(table, self.bindings[builder].type))
        self.give(evaluator, given)
        return evaluator

    def give(self, evaluator: Evaluator, given: pa.Table) -> None:
        """Hand over rows of any builders."""
        by_name = {builder.name: builder for builder, _ in self.bindings.items()}
        for name in given["builder"].unique().to_pylist():
            own = given.filter(pc.equal(given["builder"], name))
            evaluator.give(by_name[name], results_by_key(own, self.bindings[by_name[name]].type))

    def resolve(
        self, keys: Sequence[Key], given: pa.Table, cached: pa.Table
    ) -> tuple[pa.Table, FeaturekitError | None]:
        """The stage's results for some keys, as ROW_SCHEMA rows, and the error of the run that ended them early."""
        evaluator = self.evaluator(given, cached)
        ended: FeaturekitError | None = None
        try:
            for builder in self.builders:
                evaluator.resolve(builder, [keys_of(self.fields, key, builder.key) for key in keys])
        except FeaturekitError as error:
            ended = error
        return made_rows(evaluator, self.bindings), ended


@dataclass(frozen=True)
class ChunkTask:
    """For keys that fit the driver: a chunk in one cell, its keys, given rows and candidates as Arrow streams, or the
    name of the file in which they are handed over. A file that is not seen from here is said to be `missed`.

    New entries are staged as files where `staging` can be reached from here, and travel as rows otherwise; so do those
    with something that a file has no column for (an expiry, reads), and hits, without the values of the candidates that
    they are. An error of the run ends the task and is told: a task that raised would be tried again, and would ask
    again what nobody can keep.
    """

    work: StageWork
    staging: Staging | None = None

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        writer = self.staging.writer() if self.staging is not None else None
        counts: dict[str, Counts] = {}
        cells = (
            pair for b in batches for pair in zip(b["chunk"].to_pylist(), b["file"].to_pylist(), strict=True)
        )
        for chunk, file in cells:
            if chunk is None and writer is None:
                yield _answer(missed=file)
                continue
            data = self.staging.handed_over(file) if self.staging is not None and chunk is None else chunk
            keys, given, cached = unpacked(data)
            rows, ended = self.work.resolve(_keys(keys["key"]), given, cached)
            if writer is not None:
                plain, rows = plain_entries(rows, self.work.inline())
                try:
                    writer.add(plain)
                except CacheError as error:
                    ended = ended or error
                for builder, _ in self.work.bindings.items():
                    own = plain.filter(pc.equal(plain["builder"], builder.name))
                    if len(own):
                        counts.setdefault(builder.name, Counts()).add(count_rows(own, paid=builder.paid))
            if self.work.cache is None and self.work.flight is None:
                rows = without_known(rows)
            yield _answer(rows=closed(rows), failure=None if ended is None else told(ended))
            if ended is not None:
                break  # nobody is asked any more
        if writer is not None:
            try:
                files = [asdict(file) for file in writer.close()]
            except CacheError as error:
                yield _answer(failure=told(error))
                return
            tallies = {name: asdict(own) for name, own in counts.items()}
            yield _answer(staged=json.dumps({"files": files, "counts": tallies}))


CHUNK_ANSWER = "rows binary, failure string, staged string, missed string"


def _answer(
    *,
    rows: bytes | None = None,
    failure: str | None = None,
    staged: str | None = None,
    missed: str | None = None,
) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "rows": pa.array([rows], pa.binary()),
            "failure": pa.array([failure], pa.string()),
            "staged": pa.array([staged], pa.string()),
            "missed": pa.array([missed], pa.string()),
        }
    )


@dataclass(frozen=True)
class WarmTask:
    """Computes nothing; leaves a worker with everything loaded that the stages of a run need."""

    work: StageWork

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pandas as pd

        for value in self.work.context.values():
            warm_up = getattr(value, "warm_up", None)
            if warm_up is not None:
                warm_up()
        for batch in batches:
            pd.DataFrame({"chunk": batch["chunk"].to_pylist()})
            yield _answer()


@dataclass(frozen=True)
class ColumnTask:
    """For tables of any size: a row per key, what it is given as a list column; results out as rows.

    An error of the run ends the partition with a row of no builder that tells of it: a task that raised would be
    tried again, and would take what others paid for with it.
    """

    work: StageWork

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for keys, given, cached, _ in _split(batches, self.work.batch_rows):
            rows, ended = self.work.resolve(keys, given, cached)
            yield from rows.to_batches()
            if ended is not None:
                yield from _failure(ended).to_batches()
                return


@dataclass(frozen=True)
class PackTask:
    """Rows as Arrow streams of at most so many, one in a cell: what another process reads with the types they have."""

    batch_rows: int

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for whole in batches:
            for start in range(0, whole.num_rows, self.batch_rows):
                data = closed(pa.Table.from_batches([whole.slice(start, self.batch_rows)]))
                yield pa.record_batch({"chunk": pa.array([data], pa.binary())})


@dataclass(frozen=True)
class LinkTask:
    """Where keys lead through a dep: (reader, key), one row for each key that is reached."""

    work: StageWork
    dep: Dep

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for keys, given, cached, _ in _split(batches, self.work.batch_rows):
            evaluator = self.work.evaluator(given, cached)
            readers, reached = [], []
            for key in keys:
                for found in evaluator.dep_keys(self.dep, self.work.fields, [key]):
                    readers.append(key_json(key))
                    reached.append(key_json(found))
            yield pa.record_batch(
                {"reader": pa.array(readers, pa.string()), "key": pa.array(reached, pa.string())}
            )


@dataclass(frozen=True)
class MemberTask:
    """A key set's scanned members, each with its key."""

    group: Key

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            members = batch.column(0)
            keys = [key_json((*self.group, member)) for member in members.to_pylist()]
            yield pa.RecordBatch.from_arrays([pa.array(keys, pa.string()), members], names=["key", "member"])


@dataclass(frozen=True)
class SourceTask:
    """Keys with the values that a scan gave them, as results of a source."""

    work: StageWork

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for keys, given, cached, batch in _split(batches, self.work.batch_rows):
            evaluator = self.work.evaluator(given, cached)
            evaluator.give_source(self.work.builders[0], keys, batch["value"].to_pylist())
            yield from made_rows(evaluator, self.work.bindings).to_batches()


@dataclass(frozen=True)
class GatherTask:
    """Builders that gather, over the rows (GIVEN_SCHEMA) of one partition: members (rows of a key set), what they lead
    to, entries that may be found, and the keys that are wanted (rows of no builder)."""

    work: StageWork
    keysets: tuple[tuple[type[KeySet], Key], ...]

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        whole = list(batches)
        if not whole:  # an empty partition: the rows are in the one other
            return
        rows = pa.Table.from_batches(whole)
        given, cached = _parted(rows)
        names = pa.array(["", *(keyset.name for keyset, _ in self.keysets)])
        evaluator = self.work.evaluator(given.filter(pc.invert(pc.is_in(given["builder"], names))), cached)
        evaluator.gather = "build"
        for keyset, group in self.keysets:
            own = _keys(given.filter(pc.equal(given["builder"], keyset.name))["key"])
            members = sorted(key[-1] for key in own)
            evaluator.give(keyset, {group: Result(Origin.HIT, "members", value=members)})
        wanted = _keys(given.filter(pc.equal(given["builder"], ""))["key"])
        for builder in self.work.builders:
            evaluator.resolve(builder, [keys_of(self.work.fields, key, builder.key) for key in wanted])
        yield from made_rows(evaluator, self.work.bindings).to_batches()


@dataclass(frozen=True)
class ReadsTask:
    """The column `reads` as JSON text; `empty` where there are none."""

    empty: str | None

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            texts = [
                json.dumps([list(read.values()) for read in reads]) if reads else self.empty
                for reads in batch["reads"].to_pylist()
            ]
            at = batch.schema.get_field_index("reads")
            yield batch.set_column(at, "reads", pa.array(texts, pa.string()))


@dataclass(frozen=True)
class DecodeTask:
    """A target's rows as typed columns: its key fields, value, ts, value_hash."""

    fields: tuple[str, ...]
    kind: ValueType

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            keys = _keys(batch["key"])
            values = [None if v is None else self.kind.decode(v) for v in batch["value"].to_pylist()]
            columns = [pa.array([key[i] for key in keys], pa.string()) for i in range(len(self.fields))]
            columns += [typed_column(values, self.kind), batch["ts"], batch["value_hash"]]
            yield pa.RecordBatch.from_arrays(columns, names=[*self.fields, "value", "ts", "value_hash"])


def made_rows(evaluator: Evaluator, bindings: Bindings) -> pa.Table:
    """Everything an evaluator made, as ROW_SCHEMA rows."""
    bound = {builder.name: found for builder, found in bindings.items()}
    made = evaluator.take_made()
    tables = [to_rows(name, bound[name].config_hash, pairs) for name, pairs in made.items() if pairs]
    return pa.concat_tables(tables) if tables else ROW_SCHEMA.empty_table()


def _split(
    batches: Iterable[pa.RecordBatch], batch_rows: int
) -> Iterator[tuple[list[Key], pa.Table, pa.Table, pa.RecordBatch]]:
    """(keys, given, cached, the batch itself) of at most `batch_rows` keys each."""
    for whole in batches:
        for start in range(0, whole.num_rows, batch_rows):
            batch = whole.slice(start, batch_rows)
            given, cached = _parted(pa.Table.from_struct_array(batch["given"].flatten()))
            yield _keys(batch["key"]), given, cached, batch


def _parted(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """GIVEN_SCHEMA rows as (results given, entries that may be found)."""
    is_cached = pc.fill_null(rows["cached"], False)
    cached = rows.filter(is_cached)
    columns = [
        cached[field.name].cast(field.type)
        if field.name in cached.column_names
        else pa.nulls(len(cached), field.type)
        for field in CACHED_SCHEMA
    ]
    given = rows.filter(pc.invert(is_cached)).select(ROW_SCHEMA.names)
    return given, pa.Table.from_arrays(columns, schema=CACHED_SCHEMA)


def _failure(error: FeaturekitError) -> pa.Table:
    row = {"builder": "", "key": "", "error": told(error)}
    return pa.Table.from_pylist([row], schema=ROW_SCHEMA)


def told(error: FeaturekitError) -> str:
    """An error of the run as text, for `raised` on the driver."""
    return json.dumps([type(error).__name__, str(error)])


def raised(failure: str) -> FeaturekitError:
    """The error that `told` told of."""
    name, message = json.loads(failure)
    error: FeaturekitError = getattr(errors, name, FeaturekitError)(message)
    return error


def _keys(column: Any) -> list[Key]:
    return [tuple(json.loads(text)) for text in column.to_pylist()]


def closed(table: pa.Table) -> bytes:
    """A table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def opened(data: bytes) -> pa.Table:
    """An Arrow stream as a table."""
    return pa.ipc.open_stream(data).read_all()


def framed(table: pa.Table) -> bytes:
    """An Arrow stream behind its length, so that several fit in one cell."""
    data = closed(table)
    return len(data).to_bytes(8, "little") + data


def unpacked(chunk: bytes) -> list[pa.Table]:
    """The tables of a cell of framed streams."""
    tables, at = [], 0
    while at < len(chunk):
        size = int.from_bytes(chunk[at : at + 8], "little")
        tables.append(opened(chunk[at + 8 : at + 8 + size]))
        at += 8 + size
    return tables
