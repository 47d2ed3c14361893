"""What runs of a group left for the next one: whether it has anything to do, and what it leaves itself.

Owns the group's marks, and when they are dropped and written. Knows neither stages nor rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurekit_spark.builder import FeatureBuilder
from featurekit_spark.execute import Execution
from featurekit_spark.fingerprint import key_json
from featurekit_spark.graph import Graph
from featurekit_spark.job import Job
from featurekit_spark.plan import KeyedStage, Plan
from featurekit_spark.readings import Readings
from featurekit_spark.restore import remember, went_back
from featurekit_spark.unchanged import mark_of, standing

__all__ = ["GroupState"]


class GroupState:
    """The state that a run of some targets (`names`) finds. `fits`: whether the group's sources pass through this
    process; beyond that, only versions tell."""

    def __init__(
        self,
        plan: Plan,
        graph: Graph,
        job: Job,
        group: tuple[Any, ...],
        names: Sequence[str],
        readings: Readings,
        fits: Callable[[], bool],
    ) -> None:
        self._plan, self._graph, self._job, self._group, self._names = plan, graph, job, group, names
        self._readings, self._fits = readings, fits
        self._own = key_json(names)
        self._stands = standing(plan, graph, job.bindings, job.context)
        self._marks = dict(job.cache.mark(key_json(group)) or {})

    def unchanged(self) -> Mapping[str, Any] | None:
        """The mark of these targets, if it was made of just what is there now; None where something is to be done."""
        if self._stands is None or self._own not in self._marks:
            return None
        mark = self._stands.renewed(self._marks[self._own], self._job.now, self._content)
        if mark is not None and mark != self._marks[self._own]:
            self._put({**self._marks, self._own: mark})
        return mark

    def begin(self) -> bool:
        """Before anything changes: a run that breaks off leaves no mark. Whether it begins as an earlier one ended, and
        what was current then is so again."""
        if self._marks:
            self._put({})
        if self._stands is None or not self._fits():
            return False
        return went_back(
            self._stands, self._plan, self._graph, self._job, self._group, self._own, self._content
        )

    def end(self, execution: Execution, *, unchanged: bool) -> None:
        """Leave marks for the next run. What other targets' say still holds where this run changed nothing."""
        mark = mark_of(self._stands, execution, self._names)
        if mark is not None:
            remember(self._job.cache, self._group, self._own, mark)
        marks = {**(self._marks if unchanged else {}), self._own: mark}
        self._put({name: found for name, found in marks.items() if found})

    def _content(self, source: type[FeatureBuilder[Any]]) -> str | None:
        # What a value led to is read key by key: a scan of the group's members does not show it.
        if any(isinstance(s, KeyedStage) and source in s.builders for s in self._plan.stages):
            return None
        return self._readings.hash_of(source) if self._fits() else None

    def _put(self, marks: Mapping[str, Any]) -> None:
        self._job.cache.put_mark(key_json(self._group), marks or None)
