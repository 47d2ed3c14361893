"""Whether a run can end before any key is looked at: every source is at the version, or holds what it held, and every
config is the same, as when a run last proved all of its keys.

Compares versions and hashes only. Knows neither entries nor traces; where it cannot tell, the run goes on and checks
every key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import FeatureBuilder, Source
from featurekit_spark.check import plan_hash
from featurekit_spark.execute import Execution
from featurekit_spark.fingerprint import digest
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import CheckTraces, Plan
from featurekit_spark.results import Counts

__all__ = ["Standing", "Unchanged", "mark_of", "standing"]

_FORMAT = 3


@dataclass(frozen=True)
class Standing:
    """What a run is about to compute from: per target the hash of its configs, the sources, and the version of those
    that tell one."""

    targets: Mapping[str, str]
    sources: Sequence[type[FeatureBuilder[Any]]]
    versions: Mapping[str, str]

    def renewed(
        self,
        mark: Mapping[str, Any],
        now: datetime,
        content: Callable[[type[FeatureBuilder[Any]]], str | None],
    ) -> Mapping[str, Any] | None:
        """A mark that was made of just this, with the versions of today; None where anything differs or has expired.

        `content`: a hash of what a source holds, asked for where versions do not tell (None: it does not tell either).
        """
        if mark.get("format") != _FORMAT or mark["targets"] != self.targets:
            return None
        if mark["valid_until"] is not None and now >= datetime.fromisoformat(mark["valid_until"]):
            return None
        known = mark["content"]
        for source in self.sources:
            name = source.name
            version = self.versions.get(name)
            if version is not None and version == mark["versions"].get(name):
                continue
            if name not in known or content(source) != known[name]:
                return None
        return {**mark, "versions": dict(self.versions)}


def standing(plan: Plan, graph: Graph, bindings: Bindings, context: Any) -> Standing | None:
    """Where things stand; None where neither versions nor content can tell: a hand-written get, an unprovable target.
    A source that cannot be reached is an error of its own, as when it is read."""
    (check,) = [stage for stage in plan.stages if isinstance(stage, CheckTraces)]
    if not all(trace.provable for trace in check.targets) or any(b.is_dynamic() for b in graph):
        return None
    sources, versions = [], {}
    for builder in graph:
        bound = bindings[builder]
        if isinstance(bound.builder, Source):
            sources.append(builder)
            version = bound.builder.snapshot_version(bound.view(context))
            if version is None and builder.freshness.ttl is not None:
                version = "until it expires"  # which the mark says
            if version is not None:
                versions[builder.name] = version
    targets = {trace.target.name: plan_hash(trace, graph, bindings) for trace in check.targets}
    # Key sets as well: who the members are is not what a target reads.
    targets[""] = digest("graph", *(f"{bindings[b].config_hash} {b.freshness.ttl}" for b in graph))
    return Standing(targets, sources, versions)


def mark_of(stands: Standing | None, execution: Execution, names: Sequence[str]) -> dict[str, Any] | None:
    """What a run that is over leaves for the next; None where the next has something to do, or cannot tell."""
    if stands is None or any(counts.error for counts in execution.counts().values()):
        return None
    content = execution.readings.hashes
    if any(source.name not in stands.versions and source.name not in content for source in stands.sources):
        return None
    until = execution.valid_until()
    return {
        "format": _FORMAT,
        "targets": dict(stands.targets),
        "versions": dict(stands.versions),
        "content": dict(content),
        "valid_until": None if until is None else until.isoformat(),
        "keys": execution.target_keys(),
        "fingerprint": execution.fingerprint(names),
        "run_id": execution.job.run_id,
    }


class Unchanged:
    """The face of an `Execution` that had nothing to do. Whoever asks for values has every key checked after all."""

    unchanged = True

    def __init__(
        self,
        mark: Mapping[str, Any],
        plan: Plan,
        graph: Graph,
        job: Job,
        checked: Callable[[], Execution],
        *,
        read_nothing: bool = True,
    ) -> None:
        self.plan, self.graph, self.job = plan, graph, job
        self.read_nothing = read_nothing
        self._mark, self._checked = mark, checked
        self._whole: Execution | None = None
        self.seconds: dict[str, float] = {}

    @property
    def keys(self) -> int:
        """How many keys the first target has."""
        return int(next(iter(self._mark["keys"].values())))

    def counts(self) -> dict[str, Counts]:
        """Every key of every target is a hit."""
        return {b.name: Counts(hit=self._mark["keys"].get(b.name, 0)) for b in self.graph}

    def errors(self, targets: Sequence[str], *, every: bool = False) -> dict[str, str]:
        """None: what had failed would have been tried again."""
        return {}

    def kept(self, targets: Sequence[str]) -> int:
        """None, as nothing failed."""
        return 0

    def fingerprint(self, targets: Sequence[str]) -> str:
        """As the run that left the mark computed it."""
        return (
            str(self._mark["fingerprint"])
            if list(targets) == list(self._mark["keys"])
            else (self._execution().fingerprint(targets))
        )

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._execution(), name)

    def _execution(self) -> Execution:
        if self._whole is None:
            self._whole = self._checked()
        return self._whole
