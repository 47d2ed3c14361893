"""Stages as Arrow UDFs over partitions of keys. The only module of the core that talks to Spark; DataFrames only.

A stage with few keys runs in the driver's process and needs no session. A larger one is cut into chunks: each chunk's
keys, what it is given and the entries it may find travel as one Arrow stream, its results come back as another; one
action, so nothing is evaluated twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from featurekit_spark.builder import FeatureBuilder, keys_of
from featurekit_spark.cache.base import Found
from featurekit_spark.cache.staged import StagedFile, Staging, StagingCache
from featurekit_spark.deferred import deferring
from featurekit_spark.engines.affordable import affordable_parts
from featurekit_spark.engines.batch_size import with_batches_for
from featurekit_spark.engines.cluster import parallelism, shares
from featurekit_spark.engines.local import LocalEngine
from featurekit_spark.engines.lookup import as_table, former_entries, local_builders, stage_candidates
from featurekit_spark.engines.programs import PROGRAM_ROWS, driving, is_program
from featurekit_spark.engines.tasks import (
    CHUNK_ANSWER,
    ChunkTask,
    StageWork,
    WarmTask,
    framed,
    opened,
    raised,
)
from featurekit_spark.errors import ContextError
from featurekit_spark.evaluate import Evaluator
from featurekit_spark.failures import Failures
from featurekit_spark.fingerprint import key_json
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage, Plan, ReadSource
from featurekit_spark.results import (
    ROW_SCHEMA,
    Counts,
    Origin,
    Result,
    count_rows,
    entry_rows,
    new_entries,
    new_pointers,
    results_by_key,
    to_given,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["SparkEngine"]

Key = tuple[Any, ...]
# A key that is looked up costs so much less than one that is built.
_LOOKUP_FACTOR = 50
# Chunks per task slot: enough that a slow one does not leave the others idle, few enough that each stays large.
_CHUNKS_PER_SLOT = 4


class SparkEngine:
    """Runs stages on Spark beyond `in_process_keys`; starts no session before a stage needs one.

    `executor`: who makes paid calls; with "driver" stages that pay run as on the local engine, whatever their size.
    """

    name = "spark"

    def __init__(
        self,
        spark: SparkSession | Callable[[], SparkSession] | None = None,
        *,
        in_process_keys: int = 2_000,
        partitions: int | None = None,
        collect_mb: int = 256,
        executor: Literal["workers", "driver"] = "workers",
    ) -> None:
        self._given = spark
        self._session: SparkSession | None = None
        self.in_process_keys = in_process_keys
        self.partitions = partitions
        self.collect_mb = collect_mb
        self.executor = executor
        self._local = LocalEngine()
        self._starter: ThreadPoolExecutor | None = None
        self._starting: Future[SparkSession] | None = None
        self._moved: int | None = None

    @property
    def session(self) -> SparkSession:
        """The SparkSession, started now if this is the first stage that needs one."""
        if self._session is None:
            starting = self._starting
            self._session = starting.result() if starting is not None else _started(self._given)
        return self._session

    def prepare(self, keys: int, plan: Plan, job: Job) -> None:
        """Start a session, and have its workers load what they need, while the driver reads and checks.

        `keys`: how many have to be computed, as far as one knows; where these are few, so is the work of stages whose
        other keys are looked up."""
        self._moved = keys
        stages = [stage for stage in plan.stages if isinstance(stage, KeyedStage)]
        away = [
            stage
            for stage in stages
            if keys > stage.in_process_limit(self.in_process_keys) and not self.pays_here(stage)
        ]
        if self._starter is not None or not away:
            return
        context = {name: value for stage in away for name, value in travelling(stage, job).items()}
        builders = tuple(builder for stage in away for builder in stage.builders)
        work = StageWork((), builders, job.bindings, context, (), job.now, job.batch_rows, as_table(()))
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="featurekit-spark")
        if _is_running(self._given):  # a notebook's, which only this thread can tell from none
            self._session = self.session
        else:
            self._starting = self._starter.submit(_started, self._given)
        self._starter.submit(self._warm_up, work)

    def settle(self) -> None:
        self._moved = None
        if self._starter is not None:
            self._starter.shutdown()
            self._starter = None

    def _warm_up(self, work: StageWork) -> None:
        """One small job over all slots, shaped as the stages' are. What fails here fails there, and is told there."""
        with suppress(Exception):
            session = self.session
            slots = self.partitions or parallelism(session)
            frame = session.createDataFrame(pa.table({"chunk": pa.array([b""] * slots, pa.binary())}))
            frame.mapInArrow(WarmTask(work), CHUNK_ANSWER).toArrow()

    def check(self, plan: Plan, job: Job) -> None:
        """A context attribute that a stage needs and that cannot travel is an error before anything ran."""
        from pyspark import cloudpickle

        for stage in plan.stages:
            if isinstance(stage, ReadSource):  # one without a scan runs like a stage of its own
                stage = KeyedStage(stage.space, (stage.source,), (), False, stage.feeds)
            if isinstance(stage, KeyedStage) and not self.pays_here(stage):
                for name, value in travelling(stage, job).items():
                    try:
                        cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
                    except Exception as error:
                        raise ContextError(
                            f"context.{name} ({type(value).__name__}) cannot travel to Spark workers: {error}. Open "
                            "connections lazily (on first use) and leave them out of __getstate__, or run with "
                            "engine='local'."
                        ) from error

    def pays_here(self, stage: KeyedStage) -> bool:
        """Whether this process carries the stage out because workers make no paid calls. Nobody knows beforehand what
        a hand-written get asks."""
        return self.executor == "driver" and any(b.paid or b.is_dynamic() for b in stage.builders)

    def run_stage(self, stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job) -> None:
        if self.pays_here(stage) or deferring(stage.builders, job.context):
            self._local.run_stage(stage, keys, evaluator, job)
            return
        # What a gather reads is on the driver. A group-level builder gathers once and spreads what it made.
        gathers = any(dep.keyset is not None for b in stage.builders for dep in job.bindings[b].deps)
        by_hand = evaluator.purse is not None and any(b.is_dynamic() for b in stage.builders)
        keys = _new_keys(stage, keys, evaluator)
        for part, first in affordable_parts(stage, keys, evaluator, job):
            self._run_part(stage, part, evaluator, job, here=gathers or by_hand or first)

    def _run_part(
        self, stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job, *, here: bool
    ) -> None:
        if here or len(keys) <= stage.in_process_limit(self.in_process_keys):
            self._local.run_stage(stage, keys, evaluator, job)
            return
        group = partial(keys_of, stage.space.key, keys[0])
        if is_program(stage, group, evaluator, job, lambda: self.session):
            self._run_program(stage, keys, evaluator, job)
            return
        found = stage_candidates(stage, keys, job)
        if self._is_little(stage, keys, found, evaluator, job):
            self._local.run_stage(stage, keys, evaluator, job, found)
            return
        session = self.session
        job = with_batches_for(stage, len(keys), job)
        slots = self.partitions or parallelism(session)
        # Of a paid stage one each: a chunk ends with its slowest call, and the next begins after it.
        parts = slots * (1 if stage.paid else _CHUNKS_PER_SLOT)
        size = max(1, min(job.batch_rows, math.ceil(len(keys) / parts)))
        keys = _in_order(keys)
        chunks = [keys[start : start + size] for start in range(0, len(keys), size)]
        cached = as_table(found)
        packed = (_pack(stage, chunk, evaluator, cached, job) for chunk in chunks)
        work = shares(stage_work(stage, evaluator, job), session, min(slots, len(chunks)))
        with _staging(work, job) as staging:
            cells = [(data, None) if staging is None else (None, staging.hand_over(data)) for data in packed]
            answers = self._answers(cells, ChunkTask(work, staging))
            missed = answers["missed"].drop_null().to_pylist()
            if missed and staging is not None:  # by workers that see other storage than this process
                again = [(staging.handed_over(name), None) for name in missed]
                answers = pa.concat_tables([answers, self._answers(again, ChunkTask(work))])
            rows = [opened(part) for part in answers["rows"].drop_null().to_pylist()]
            # before any error: what was paid for is kept
            given = work.cache is None and work.flight is None
            known = {hit.entry.entry_id: hit.entry.value for hit in found} if given else None
            self.take(stage, pa.concat_tables(rows), evaluator, job, known)
            if staging is not None:
                self.take_staged(stage, staging, answers["staged"].drop_null().to_pylist(), evaluator, job)
        for failure in answers["failure"].drop_null().to_pylist():
            raise raised(failure)
        job.progress(stage.label, len(keys), len(keys))

    def _run_program(self, stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator, job: Job) -> None:
        """A builder that distributes its work itself, called here; what it reads on the way is made by workers."""
        for builder in local_builders(stage, job):
            if builder not in stage.builders and not _is_shared(builder, job):
                inputs = replace(stage, builders=(builder,))
                self._run_part(inputs, keys, evaluator, job, here=False)
        with driving(evaluator, lambda: self.session):
            self._local.run_stage(stage, keys, evaluator, replace(job, batch_rows=PROGRAM_ROWS))

    def _is_little(
        self, stage: KeyedStage, keys: Sequence[Key], found: Sequence[Found], evaluator: Evaluator, job: Job
    ) -> bool:
        """Whether few of many keys are to be built: few of the run's have moved, few of these have no entry at all, and
        no group that all of them read has moved, unless they follow it."""
        limit = stage.in_process_limit(self.in_process_keys)
        if self._moved is None or self._moved > self.in_process_keys or len(keys) > limit * _LOOKUP_FACTOR:
            return False
        known: dict[str, set[str]] = {}
        for hit in found:
            known.setdefault(hit.entry.builder, set()).add(hit.entry.key)
        for builder in local_builders(stage, job):
            if not builder.inline:
                texts = {key_json(keys_of(stage.space.key, key, builder.key)) for key in keys}
                if len(texts - known.get(builder.name, set())) > limit:
                    return False
            moved = [
                dep.builder
                for dep in job.bindings[builder].deps
                if _is_shared(dep.builder, job) and _is_new(dep.builder, evaluator)
            ]
            if any(dep is not builder.follows for dep in moved):
                return False
            if moved and not former_entries(stage, evaluator, job):
                return False
        return True

    def _answers(self, cells: Sequence[tuple[bytes | None, str | None]], task: ChunkTask) -> pa.Table:
        """What a task makes of chunks, as rows of CHUNK_ANSWER."""
        chunks = pa.array([chunk for chunk, _ in cells], pa.binary())
        files = pa.array([file for _, file in cells], pa.string())
        frame = self.session.createDataFrame(pa.table({"chunk": chunks, "file": files}))
        if self.partitions and len(cells) > self.partitions:
            frame = frame.repartition(self.partitions)
        if task.work.tasks is not None:
            frame = frame.coalesce(task.work.tasks)
        return frame.mapInArrow(task, CHUNK_ANSWER).toArrow()

    def scan(self, scan: Any) -> pa.Table:
        return self._local.scan(scan)

    def take_staged(
        self, stage: KeyedStage, staging: Staging, told: Sequence[str], evaluator: Evaluator, job: Job
    ) -> None:
        """Commit the files that a stage's workers left, count what is in them, and read what later stages read."""
        answers = [json.loads(text) for text in told]
        files = [StagedFile(**file) for answer in answers for file in answer["files"]]
        if not files:
            return
        assert isinstance(job.cache, StagingCache)  # it gave the staging
        job.cache.append_staged(files)
        for answer in answers:
            for name, counts in answer["counts"].items():
                evaluator.done.setdefault(name, Counts()).add(Counts(**counts))
        for file in files:
            builder = next((b for b in stage.builders if b.name == file.builder), None)
            if builder is not None:
                rows = entry_rows(staging.read(file))
                evaluator.give(builder, results_by_key(rows, job.bindings[builder].type))

    def take(
        self,
        stage: KeyedStage,
        rows: pa.Table,
        evaluator: Evaluator,
        job: Job,
        known: Mapping[str, bytes | None] | None = None,
    ) -> None:
        """Commit a stage's rows in one append, count them, and remember what later stages read. `known`: values by
        entry_id, where hits came back without."""
        inline = pa.array([b.name for b, _ in job.bindings.items() if b.inline], pa.string())
        by_hand = {b.name for b, _ in job.bindings.items() if b.is_dynamic()}
        kept = rows.filter(pc.invert(pc.is_in(rows["builder"], inline)))
        entries, pointers = new_entries(kept, job.run_id), new_pointers(kept, by_hand, job.now, job.run_id)
        if len(entries) or pointers:
            job.cache.append(entries, pointers)
        for builder, bound in job.bindings.items():
            own = rows.filter(pc.equal(rows["builder"], builder.name))
            if len(own):
                evaluator.done.setdefault(builder.name, Counts()).add(count_rows(own, paid=builder.paid))
                if builder in stage.builders:
                    evaluator.give(builder, results_by_key(own, bound.type, known))


@contextmanager
def _staging(work: StageWork, job: Job) -> Iterator[Staging | None]:
    """Where the stage's workers may leave new entries; nowhere where a hand-written get makes them, whose reads are
    kept beside the entry."""
    staging = None
    if work.cache is None and isinstance(job.cache, StagingCache):
        staging = job.cache.staging(job.run_id)
    try:
        yield staging
    finally:
        if staging is not None:
            staging.close()


def stage_work(stage: KeyedStage, evaluator: Evaluator, job: Job) -> StageWork:
    """What the stage's builders need in a worker."""
    return StageWork(
        stage.space.key,
        stage.builders,
        job.bindings,
        travelling(stage, job),
        _shared(stage, evaluator, job),
        job.now,
        job.batch_rows,
        as_table(former_entries(stage, evaluator, job)),
        job.cache if any(builder.is_dynamic() for builder in stage.builders) else None,
        job.journal if stage.paid else None,
        _failures(stage, job),
        flight=job.flight if stage.paid else None,
    )


def _failures(stage: KeyedStage, job: Job) -> Failures | None:
    """What the stage's paid builders failed at before."""
    paid = [job.bindings[builder] for builder in stage.builders if builder.paid]
    return job.failures.read(paid) if paid and job.failures is not None else None


def _pack(stage: KeyedStage, chunk: Sequence[Key], evaluator: Evaluator, cached: pa.Table, job: Job) -> bytes:
    """One chunk as one Arrow stream: its keys, what it is given, and the entries it may find."""
    given: dict[str, dict[Key, Result]] = {}
    for builder in stage.builders:
        keys = [keys_of(stage.space.key, key, builder.key) for key in chunk]
        for dep in job.bindings[builder].deps:
            for found, dep_keys in evaluator.read_by(dep, builder.key, keys):
                if found in stage.given and not _is_shared(found, job):
                    results = evaluator.results.get(found.name, {})
                    given.setdefault(found.name, {}).update({k: results[k] for k in dep_keys if k in results})
    rows = [
        to_given(name, ((key_json(key), result) for key, result in results.items()))
        for name, results in sorted(given.items())
    ]
    own = cached
    if len(cached):
        wanted: set[str] = set()
        for builder in local_builders(stage, job):
            wanted |= {key_json(keys_of(stage.space.key, key, builder.key)) for key in chunk}
        own = cached.filter(pc.is_in(cached["key"], pa.array(sorted(wanted), pa.string())))
    keys_table = pa.table({"key": pa.array([key_json(key) for key in chunk], pa.string())})
    given_table = pa.concat_tables(rows) if rows else ROW_SCHEMA.empty_table()
    return b"".join(framed(part) for part in (keys_table, given_table, own))


def _is_shared(builder: type[FeatureBuilder[Any]], job: Job) -> bool:
    return set(builder.key) <= job.bindings.group_fields


def _is_new(builder: type[FeatureBuilder[Any]], evaluator: Evaluator) -> bool:
    results = evaluator.results.get(builder.name, {})
    return any(result.origin is not Origin.HIT for result in results.values())


def _shared(
    stage: KeyedStage, evaluator: Evaluator, job: Job
) -> tuple[tuple[type[FeatureBuilder[Any]], pa.Table], ...]:
    """Group-level results: passed once with the task, not once per chunk."""
    shared = []
    for builder in stage.given:
        if _is_shared(builder, job):
            results = evaluator.results.get(builder.name, {})
            rows = to_given(builder.name, ((key_json(k), r) for k, r in results.items()))
            shared.append((builder, rows))
    return tuple(shared)


def travelling(stage: KeyedStage, job: Job) -> dict[str, Any]:
    """The context attributes that the stage's builders declare; all of them where one is a hand-written get."""
    builders = local_builders(stage, job)
    if any(builder.is_dynamic() for builder in builders):
        return {
            name: getattr(job.context, name)
            for name in dir(job.context)
            if not name.startswith("_") and not callable(getattr(type(job.context), name, None))
        }
    names = {name for builder in builders for name in builder.needs}
    return {name: getattr(job.context, name) for name in sorted(names) if hasattr(job.context, name)}


def _in_order(keys: Sequence[Key]) -> Sequence[Key]:
    """A worker's file is then in order of keys, and a later look-up of one key reads little of it."""
    try:
        return sorted(keys)
    except TypeError:  # of different types, or null
        return keys


def _new_keys(stage: KeyedStage, keys: Sequence[Key], evaluator: Evaluator) -> Sequence[Key]:
    """Keys for which some builder of the stage has no result yet: a value may lead to a key that was read before."""
    known = [(evaluator.results.get(builder.name, {}), builder.key) for builder in stage.builders]
    if not any(results for results, _ in known):
        return keys
    space = stage.space.key
    return [
        key for key in keys if any(keys_of(space, key, fields) not in results for results, fields in known)
    ]


def _is_running(spark: Any) -> bool:
    """Whether there is a session already, given or active in this thread."""
    if "pyspark" not in sys.modules and (spark is None or callable(spark)):
        return False
    from pyspark.sql import SparkSession

    return isinstance(spark, SparkSession) or SparkSession.getActiveSession() is not None


def _started(spark: Any) -> SparkSession:
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # not under spark-submit, which knows its Python
        # pyspark would take whichever python3 is first on PATH for its workers, virtual environment or not.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if spark is None:
        from pyspark.sql import SparkSession

        return SparkSession.builder.getOrCreate()
    if callable(spark):
        session: SparkSession = spark()
        return session
    return spark  # type: ignore[no-any-return]
