"""Whether a run can end before anything is read: every source is at the version, and every config the same, as when a
run last proved all of its keys.

Compares versions only. Knows neither entries nor traces; where it cannot tell, the run goes on and checks every key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from featurekit_spark.bindings import Bindings
from featurekit_spark.builder import Source
from featurekit_spark.check import plan_hash
from featurekit_spark.execute import Execution
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import CheckTraces, Plan
from featurekit_spark.results import Counts

__all__ = ["Standing", "Unchanged", "mark_of", "standing"]

_FORMAT = 1


@dataclass(frozen=True)
class Standing:
    """What a run is about to compute from: per target the hash of its configs, per source its version."""

    targets: Mapping[str, str]
    sources: Mapping[str, str]

    def same_as(self, mark: Mapping[str, Any] | None, now: datetime) -> bool:
        """Whether a mark was made of just this, and nothing has expired since."""
        return (
            mark is not None
            and mark.get("format") == _FORMAT
            and mark["targets"] == self.targets
            and mark["sources"] == self.sources
            and (mark["valid_until"] is None or now < datetime.fromisoformat(mark["valid_until"]))
        )


def standing(plan: Plan, graph: Graph, bindings: Bindings, context: Any) -> Standing | None:
    """Where things stand; None where versions cannot tell: a source without one, a hand-written get, an unprovable
    target. A source that cannot be reached is an error of its own, as when it is read."""
    (check,) = [stage for stage in plan.stages if isinstance(stage, CheckTraces)]
    if not all(trace.provable for trace in check.targets):
        return None
    sources: dict[str, str] = {}
    for builder in graph:
        bound = bindings[builder]
        if builder.is_dynamic():
            return None
        if isinstance(bound.builder, Source):
            version = bound.builder.snapshot_version(bound.view(context))
            if version is None and builder.freshness.ttl is not None:
                version = "until it expires"  # which the mark says
            if version is None:
                return None
            sources[builder.name] = version
    targets = {trace.target.name: plan_hash(trace, graph, bindings) for trace in check.targets}
    return Standing(targets, sources)


def mark_of(stands: Standing | None, execution: Execution, names: Sequence[str]) -> dict[str, Any] | None:
    """What a run that is over leaves for the next; None where the next has something to do."""
    if stands is None or any(counts.error for counts in execution.counts().values()):
        return None
    until = execution.valid_until()
    return {
        "format": _FORMAT,
        "targets": dict(stands.targets),
        "sources": dict(stands.sources),
        "valid_until": None if until is None else until.isoformat(),
        "keys": execution.target_keys(),
        "fingerprint": execution.fingerprint(names),
        "run_id": execution.job.run_id,
    }


class Unchanged:
    """The face of an `Execution` that had nothing to do. Whoever asks for values has every key checked after all."""

    unchanged = True

    def __init__(
        self, mark: Mapping[str, Any], plan: Plan, graph: Graph, job: Job, checked: Callable[[], Execution]
    ) -> None:
        self.plan, self.graph, self.job = plan, graph, job
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
