"""The graph of builders below some targets: order, relations, cycles. Pure; holds no configs and no values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from featurekit_spark.builder import Dep, Each, FeatureBuilder, Source, as_dep
from featurekit_spark.errors import CycleError, DefinitionError, UnknownBuilderError, known_names

__all__ = ["Graph"]

Builder = type[FeatureBuilder[Any]]


class Graph:
    """Builders reachable from `targets`, by name. Every order is deterministic: deps first, then by name."""

    def __init__(self, targets: Iterable[Builder]) -> None:
        self.targets = tuple(dict.fromkeys(targets))
        self._builders: dict[str, Builder] = {}
        self._inputs: dict[str, tuple[str, ...]] = {}
        for target in self.targets:
            self._add(target, ())
        self.order: tuple[Builder, ...] = tuple(self._builders.values())

    def __iter__(self) -> Iterator[Builder]:
        return iter(self.order)

    def __getitem__(self, name: str) -> Builder:
        try:
            return self._builders[name]
        except KeyError:
            raise UnknownBuilderError(
                f"no builder {name!r} in this graph. {known_names(name, self._builders)}"
            ) from None

    def inputs_of(self, builder: Builder) -> tuple[Builder, ...]:
        """The builders whose values `builder` reads, directly."""
        return tuple(self._builders[name] for name in self._inputs[builder.name])

    def consequences_of(self, builder: Builder) -> tuple[Builder, ...]:
        """All builders that read `builder`, directly or through others, in build order."""
        reached = {builder.name}
        for other in self.order:
            if reached & set(self._inputs[other.name]):
                reached.add(other.name)
        return tuple(b for b in self.order if b.name in reached and b is not builder)

    def needs_of(self, builder: Builder) -> tuple[Builder, ...]:
        """All builders below `builder`, itself last, in build order."""
        needed = {builder.name}
        for other in reversed(self.order):
            if other.name in needed:
                needed |= set(self._inputs[other.name])
        return tuple(b for b in self.order if b.name in needed)

    def _add(self, builder: Builder, path: tuple[Builder, ...]) -> None:
        if builder in path:
            loop = " -> ".join(b.name for b in (*path[path.index(builder) :], builder))
            raise CycleError(
                f"deps lead in a circle: {loop}. Break it where one feature can do without the other."
            )
        known = self._builders.get(builder.name)
        if known is builder:
            return
        if known is not None:
            raise DefinitionError(
                f"two builders are called {builder.name!r}: {known.__module__}.{known.__qualname__} and "
                f"{builder.__module__}.{builder.__qualname__}; give one another name: name = '...'"
            )
        inputs: list[Builder] = []
        for dep in map(as_dep, builder.deps):
            _check_dep(builder.name, builder.key, dep)
            inputs += _builders_in(dep)
        for needed in sorted(inputs, key=lambda b: b.name):
            self._add(needed, (*path, builder))
        if issubclass(builder, Source) and inputs:
            raise DefinitionError(
                f"{builder.name} is a Source and has deps; put what it derives into a builder above it"
            )
        if builder.name in self._builders:
            raise DefinitionError(
                f"two builders are called {builder.name!r}; give one another name: name = '...'"
            )
        self._builders[builder.name] = builder
        self._inputs[builder.name] = tuple(sorted({needed.name for needed in inputs}))


def _builders_in(dep: Dep) -> Iterator[Builder]:
    for _, source in dep.on_fields:
        yield from _builders_in(source.dep if isinstance(source, Each) else source)
    if dep.keyset is not None:
        yield dep.keyset
    yield dep.builder


def _check_dep(reader: str, fields: tuple[str, ...], dep: Dep) -> None:
    """Every key field of the dep must come from somewhere."""
    if dep.keyset is not None:
        missing = [field for field in dep.keyset.key if field not in fields]
        if missing:
            raise DefinitionError(
                f"{reader} gathers {dep}, but its key {fields!r} lacks {missing!r} of the key set's group"
            )
        fields = dep.keyset.member_key()
    taken = {field for field, _ in dep.on_fields}
    missing = [field for field in dep.builder.key if field not in taken and field not in fields]
    if missing:
        raise DefinitionError(
            f"{reader} reads {dep}, whose key field {missing[0]!r} comes from nowhere: {reader} has the key "
            f"{fields!r}. Name where it comes from: {dep.builder.name}.on({missing[0]}=SomeBuilder)"
            + ("" if dep.keyset else f", or gather it: {dep.builder.name}.over(SomeKeySet)")
        )
    for _, source in dep.on_fields:
        _check_dep(reader, fields, source.dep if isinstance(source, Each) else source)
