"""A run's builders with their configs, bound when first asked for, and what their graph says of keys.

Knows builders and graphs; no values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurekit_spark.builder import Bound, Dep, Each, FeatureBuilder, Source, as_dep, bind
from featurekit_spark.graph import Graph

__all__ = ["Bindings"]

Builder = type[FeatureBuilder[Any]]


class Bindings:
    """Builders with their configs, bound when first asked for; one per run or request.

    `group_fields`: key fields of the graph's key sets; batches never mix their values.
    """

    def __init__(self, context: Any, configs: Mapping[Any, Any] | None = None) -> None:
        self._context = context
        self._configs = dict(configs or {})
        self._bound: dict[Builder, Bound] = {}
        self.group_fields: frozenset[str] = frozenset()
        self.value_sources: frozenset[str] = frozenset()

    def __getitem__(self, builder: Builder) -> Bound:
        if builder not in self._bound:
            self._bound[builder] = bind(builder, self._context, self._configs)
        return self._bound[builder]

    def bind_all(self, graph: Graph) -> Bindings:
        """Bind every builder of a graph; an override that names none of them is a UsageError."""
        for name in self._configs:
            if isinstance(name, str):
                graph[name]
            elif name not in graph.order:
                graph[name.name]
        return self.include(graph)

    def include(self, graph: Graph) -> Bindings:
        """Bind the builders of a further graph: a hand-written get reads what nobody declared."""
        for builder in graph:
            bound = self[builder]
            for dep in bound.deps:
                if dep.keyset is not None:
                    self.group_fields |= set(dep.keyset.key)
            self.value_sources |= _value_sources(bound)
        return self

    def items(self) -> list[tuple[Builder, Bound]]:
        """Every builder bound so far."""
        return list(self._bound.items())

    def __getstate__(self) -> dict[str, Any]:
        # The context travels on its own, cut to what the workers need.
        return {**self.__dict__, "_context": None}


def _value_sources(bound: Bound) -> frozenset[str]:
    """Sources below a dep whose key comes from a value: which of their keys are read is known only afterwards.

    A gathered source is not among them: all its members are read, and the group's trace covers them.
    """
    found: set[str] = set()

    def walk(dep: Dep, by_value: bool) -> None:
        if dep.keyset is not None:
            return
        for _, source in dep.on_fields:
            walk(source.dep if isinstance(source, Each) else source, by_value)
        by_value = by_value or bool(dep.on_fields)
        if by_value and issubclass(dep.builder, Source):
            found.add(dep.builder.name)
        for inner in map(as_dep, dep.builder.deps):
            walk(inner, by_value)

    for dep in bound.deps:
        walk(dep, False)
    return frozenset(found)
