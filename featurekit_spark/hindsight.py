"""Why an earlier run computed a key, told from what the cache kept: the same walk as for today, at that run's moment.

Reads no source and builds nothing; what a run left no trace of is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Bound, FeatureBuilder, KeySet, Source, keys_of, parse_key
from featurekit_spark.cache.base import Entry, FeatureCache
from featurekit_spark.controller import run_clock
from featurekit_spark.errors import UsageError, known_names
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.lookback import Moment, Past, Unbuilt
from featurekit_spark.reasons import Part, State, Step, Why, when
from featurekit_spark.results import Origin, Result
from featurekit_spark.steps import Steps, builders_of

__all__ = ["why_in_run"]

Builder = type[FeatureBuilder[Any]]
Key = tuple[Any, ...]


def why_in_run(
    builder: Builder,
    key: Any,
    run_id: str,
    *,
    context: Any,
    cache: FeatureCache,
    keyset: type[KeySet] | None = None,
    configs: Mapping[Any, Any] | None = None,
    group: Key | None = None,
) -> Why:
    """What a run did for `builder` at `key`, and why. `group`: the run's (default: the key's, by `keyset`).

    Raises UsageError where the cache has no record of the run: there is none of a run that had nothing to do.
    """
    parsed = parse_key(builder, key)
    graph = Graph([builder, *([keyset] if keyset is not None else [])])
    bindings = Bindings(context, configs).bind_all(graph)
    if keyset is not None:
        bindings.group_fields |= set(keyset.key)
        group = keys_of(builder.key, parsed, keyset.key)
    records = cache.runs(key_json(group)) if group is not None else []
    at = next((i for i, record in enumerate(records) if record.run_id == run_id), None)
    if at is None:
        raise UsageError(
            f"the cache has no record of a run {run_id!r} of {group!r} that computed anything. "
            + known_names(run_id, [record.run_id for record in records])
        )
    record = records[at]
    hashes = {name: told["config_hash"] for name, told in builders_of(record).items()}
    job = Job(bindings, context, cache, run_clock(context), "explained", 2_048)
    past = Past(job, Moment(record.recorded, run_id), hashes)
    step = _RunSteps(past, graph, records[at:], run_id).step(builder, parsed)
    return Why(builder.name, key_json(parsed), run_id, None, step)


class _RunSteps(Steps):
    """Steps at the end of a run: an entry that the run wrote is compared with the one before it."""

    def __init__(self, past: Past, graph: Graph, records: Any, run_id: str) -> None:
        super().__init__(past, graph, records)
        self.run, self.at = run_id, past

    def _before(self, bound: Bound, text: str) -> Entry | None:
        earlier = (builders_of(record).get(bound.name, {}).get("config_hash") for record in self.records)
        for config_hash in dict.fromkeys([bound.config_hash, *earlier]):
            if config_hash is None:
                continue
            found = self.job.cache.candidates(bound.name, config_hash, [text])
            known = [f.entry for f in found if f.entry.run_id != self.run and self.at.moment.covers(f.entry)]
            if known:
                return max(known, key=lambda entry: entry.recorded)
        return None

    def _cause(
        self,
        bound: Bound,
        text: str,
        cells: list[Result],
        result: Result,
        before: Entry | None,
        identity: tuple[str | None, str | None],
        parts: tuple[Part, ...],
    ) -> tuple[State, str, bool]:
        entry = self._entry(bound, text, result)
        if entry is None or entry.run_id != self.run:
            return super()._cause(bound, text, cells, result, before, identity, parts)
        if before is None:
            return "computed", "never computed before", True
        changes = [part.said for part in parts if part.changed]
        own = any(part.changed and part.kind in ("config", "group") for part in parts)
        until = bound.builder.freshness.expiry(before.ts)
        if before.entry_id == entry.entry_id and until is not None:
            return "computed", f"expired at {when(until)}", True
        cause = "; ".join(changes) or "what it reads changed, in what cannot be told"
        if before.value_hash == result.value_hash:
            cause += "; its value came out equal"
        return "computed", cause, own

    def _stepped(
        self, bound: Bound, text: str, state: State, cause: str, own: bool, result: Result, *rest: Any
    ) -> Step:
        entry = self._entry(bound, text, result)
        if isinstance(result, Unbuilt) and not cause.endswith("would have to be built first"):
            failed = self.failed(bound, text)
            state, cause = ("error", failed) if failed else ("unknown", "nothing of it is kept")
        elif entry is not None and entry.run_id == self.run and state in ("hit", "miss", "stale"):
            # In hindsight every entry is there: what a source read for the first time looks like an old friend.
            state, cause = "computed", cause.removesuffix(", back to what was read before")
        elif entry is not None and entry.run_id != self.run:
            state, own = "hit", False
            done = "read" if isinstance(bound.builder, Source) else "computed"
            cause = f"{done} at {when(entry.ts)} by run {entry.run_id}"
        return super()._stepped(bound, text, state, cause, own, result, *rest)

    def _entry(self, bound: Bound, text: str, result: Result) -> Entry | None:
        if result.origin is not Origin.HIT or result.entry_id is None:
            return None
        found = self.job.cache.find(bound.name, bound.config_hash, {text: result.entry_id}).get(text)
        return found.entry if found is not None else None
