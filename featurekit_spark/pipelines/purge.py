"""Removing a product's or a person's data wherever this library has put it: cache, matrices, sinks.

Owns the order (what answers goes before what is published) and that no run goes on meanwhile. Must not know settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from featurekit_spark.cache.base import RunRecord
from featurekit_spark.cache.care import alone
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.folder import Folder
from featurekit_spark.cache.journal import take_in
from featurekit_spark.cache.purge import Subject, apply_purge, mentioned, plan_purge
from featurekit_spark.fingerprint import key_json
from featurekit_spark.llm.batch_records import BatchRecords
from featurekit_spark.search.matrix import MatrixStore
from featurekit_spark.search.removal import matrices_with, remove_matrices
from featurekit_spark.sinks.base import Sink
from featurekit_spark.sinks.delta import DeltaSink
from featurekit_spark.sinks.redis import RedisSink
from featurekit_spark.sinks.removal import remove_from_delta, remove_from_redis

__all__ = ["Places", "purge"]


@dataclass(frozen=True)
class Places:
    """Where data may be beside the cache. `group`: the merchant and market whose Redis keys are looked at;
    `logic_builders`: names in their configured order; `documents`: looks for subjects in what runs left, and removes
    them unless it is a dry run; how many."""

    warehouse: str | None = None
    matrices: MatrixStore | None = None
    sinks: Sequence[Sink] = ()
    group: tuple[str, str] | None = None
    logic_builders: Sequence[str] = ()
    documents: Callable[[Sequence[Subject], bool], int] = field(default=lambda subjects, dry_run: 0)


def purge(
    cache: DeltaCache,
    subjects: Sequence[Subject],
    places: Places,
    *,
    reason: str,
    now: datetime,
    texts: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Remove what names a subject: each is the fields of a key, all of which must be there; what was removed where.

    Done again it removes what was left. Raises LockedError while a run goes on, CacheError, ServiceError.
    """
    if dry_run:
        return {**_purge(cache, subjects, places, reason, now, texts, dry_run), "dry_run": True}
    with alone(cache, owner="cache purge", warehouse=places.warehouse):
        take_in(cache, nobody_runs=True)  # what died before it was an entry is data all the same
        return {**_purge(cache, subjects, places, reason, now, texts, dry_run), "dry_run": False}


def _purge(
    cache: DeltaCache,
    subjects: Sequence[Subject],
    places: Places,
    reason: str,
    now: datetime,
    texts: bool,
    dry_run: bool,
) -> dict[str, Any]:
    ids = {subject[-1] for subject in subjects if isinstance(subject[-1], str)}
    held = matrices_with(places.matrices.path, ids) if places.matrices else set()
    plan = plan_purge(cache, subjects, texts=texts, matrices=held)
    report = dict(plan.report) if dry_run else apply_purge(cache, plan, reason=reason, now=now)
    report["matrices"] = len(plan.matrices)
    if places.matrices and not dry_run:
        remove_matrices(places.matrices.path, plan.matrices, copies=places.matrices.copies)
    report["sinks"] = {sink.name: _from_sink(sink, subjects, places, dry_run) for sink in places.sinks}
    report["run_documents"] = places.documents(subjects, dry_run)
    if cache.journals is not None:  # where workers and providers may leave answers
        report["batches_on_their_way"] = len(
            BatchRecords(Folder(f"{cache.path}/batches", cache.storage_options)).tags()
        )
    if not dry_run:
        _publish_again(cache, report["sinks"], places, now)
    return report


def _from_sink(sink: Sink, subjects: Sequence[Subject], places: Places, dry_run: bool) -> Mapping[str, Any]:
    def concerned(merchant: str, market: str, product_id: str) -> bool:
        return any(
            subject[-1] == product_id and mentioned([subject], (merchant, market, product_id))
            for subject in subjects
        )

    if isinstance(sink, DeltaSink):
        return remove_from_delta(sink.path, concerned, dry_run=dry_run)
    if isinstance(sink, RedisSink) and places.group is not None:
        merchant, market = places.group
        products = [str(s[-1]) for s in subjects if concerned(merchant, market, str(s[-1]))]
        return remove_from_redis(
            sink, merchant, market, products, logic_builders=places.logic_builders, dry_run=dry_run
        )
    return {"not_looked_at": "give --merchant and --market, or ask the owner of this sink"}


def _publish_again(
    cache: DeltaCache, sinks: Mapping[str, Mapping[str, Any]], places: Places, now: datetime
) -> None:
    """The next run publishes to these sinks whatever it finds: they no longer hold what runs gave them."""
    groups = {tuple(group) for told in sinks.values() for group in told.get("groups", ())}
    if places.group is not None and any(told.get("keys") or told.get("lists") for told in sinks.values()):
        groups.add(places.group)
    for merchant, market in sorted(groups):
        group = key_json((merchant, market, "published"))
        cache.record_run(RunRecord("purge", group, now, "ok", {"sinks": {}}))
