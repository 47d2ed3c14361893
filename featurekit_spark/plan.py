"""From a graph to a tuple of frozen stages: what runs, where its keys come from, what it is given.

Pure: no Spark, no clock, no I/O, no values. `explain` prints the very stages that a run carries out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from featurekit_spark.builder import Dep, Each, FeatureBuilder, KeySet, Source
from featurekit_spark.errors import DefinitionError, UsageError
from featurekit_spark.graph import Graph

__all__ = [
    "CheckTraces",
    "GatherStage",
    "KeyedStage",
    "Plan",
    "PlanState",
    "ReadKeys",
    "ReadSource",
    "Space",
    "Stage",
    "TargetTrace",
    "build_plan",
    "told",
]

Builder = type[FeatureBuilder[Any]]
_LIGHT_FACTOR = 50


@dataclass(frozen=True)
class Space:
    """A set of keys, by where it comes from: the run's group, a key set's members, or a dep that leads there.

    `origin` and `dep` are set for reached spaces: the keys that `dep` leads to from the keys of `origin`.
    """

    kind: Literal["group", "members", "reached"]
    key: tuple[str, ...]
    label: str
    origin: Space | None = None
    dep: Dep | None = None

    def __str__(self) -> str:
        return f"({', '.join(self.key)}) {self.label}"


@dataclass(frozen=True)
class ReadKeys:
    """Runs first: the group's members, from a key set."""

    keyset: type[KeySet]

    @property
    def label(self) -> str:
        return self.keyset.name


@dataclass(frozen=True)
class ReadSource:
    """Runs before the check: a source for all members, by one scan where it offers one."""

    source: Builder
    space: Space
    feeds: frozenset[str]

    @property
    def label(self) -> str:
        return self.source.name


@dataclass(frozen=True)
class CheckTraces:
    """Runs once sources are read: keys whose trace still holds are done, the rest go on."""

    targets: tuple[TargetTrace, ...]
    label: str = "check"


@dataclass(frozen=True)
class KeyedStage:
    """Runs once what it is given is there: builders of one key space, fused into one pass over its keys.

    On Spark an Arrow UDF over partitions of the keys. `given`: builders of earlier stages whose results enter as
    columns. `paid`: the stage begins with model calls, one for each distinct key. `feeds`: whether targets, gathers
    or both need it.
    """

    space: Space
    builders: tuple[Builder, ...]
    given: tuple[Builder, ...]
    paid: bool
    feeds: frozenset[str]

    @property
    def label(self) -> str:
        return " -> ".join(builder.name for builder in self.builders)

    def in_process_limit(self, in_process_keys: int) -> int:
        """Up to how many keys the stage runs in the driver's process, where a stage of other builders may have
        `in_process_keys`: light builders cost less than the trip to a worker and back."""
        light = all(builder.light for builder in self.builders)
        return in_process_keys * (_LIGHT_FACTOR if light else 1)


@dataclass(frozen=True)
class GatherStage:
    """Runs once every member is there: a group-level builder, one call for the group."""

    builder: Builder
    space: Space
    feeds: frozenset[str]

    @property
    def label(self) -> str:
        return self.builder.name


Stage = ReadKeys | ReadSource | CheckTraces | KeyedStage | GatherStage


@dataclass(frozen=True)
class TargetTrace:
    """What proves a target's key unchanged.

    `keyed`: sources whose key is a projection of the target's. `gathered`: (key set, sources read at member keys).
    `grouped`: sources that a gathering builder reads besides, at the group's key. `provable`: False where a gather,
    or a builder that gathers, reads a source by a value, which no trace of the group covers.
    """

    target: Builder
    keyset: type[KeySet]
    keyed: tuple[Builder, ...]
    gathered: tuple[tuple[type[KeySet], tuple[Builder, ...]], ...]
    grouped: tuple[Builder, ...]
    provable: bool


@dataclass(frozen=True)
class PlanState:
    """What the planner may know of the world: the engine and its limits (keys), nothing else."""

    engine: Literal["spark", "local"] = "local"
    in_process_keys: int = 2_000


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run."""

    targets: tuple[Dep, ...]
    stages: tuple[Stage, ...]
    state: PlanState

    @property
    def group_fields(self) -> tuple[str, ...]:
        """The key fields of the group that the plan runs for."""
        return _keyset(self.targets[0]).key

    def explain(self) -> str:
        """The plan as text, the same for the same graph on every machine."""
        lines = [f"plan for {', '.join(map(str, self.targets))} on {self.state.engine}"]
        for number, stage in enumerate(self.stages, 1):
            head, details = told(stage, self.state)
            lines.append(f"{number:>2}  {head}")
            lines += [f"      {line}" for line in details]
        return "\n".join(lines)


def build_plan(graph: Graph, targets: Sequence[Dep], state: PlanState) -> Plan:
    """The stages that compute `targets` (each with `.over(KeySet)`) for one group.

    Raises DefinitionError for a target without a key set, UsageError for a builder over two of them.
    """
    known: dict[str, Dep] = {}
    for target in targets:
        if target.keyset is None:
            raise DefinitionError(
                f"a run's target says where its keys come from: {target.builder.name}.over(SomeKeySet)"
            )
        other = known.setdefault(target.builder.name, target)
        if other.keyset is not target.keyset:
            raise UsageError(
                f"{other} and {target} are targets of one run, which keeps answers and proofs by the target's name, "
                "so that one key set's would be lost; run them as two runs"
            )
    planner = _Planner(graph, targets)
    traces = tuple(planner.trace(target) for target in targets)
    for target in targets:
        planner.need_dep(target, Space("group", _keyset(target).key, "the group"), "target")
    return Plan(tuple(targets), tuple(planner.stages(traces)), state)


def _keyset(dep: Dep) -> type[KeySet]:
    assert dep.keyset is not None  # checked in build_plan
    return dep.keyset


def _members(keyset: type[KeySet]) -> Space:
    return Space("members", keyset.member_key(), f"of {keyset.name}")


class _Planner:
    """Walks the deps from the targets and puts each (builder, space) at the depth where its inputs are there."""

    def __init__(self, graph: Graph, targets: Sequence[Dep]) -> None:
        self.graph = graph
        self.order = {builder.name: i for i, builder in enumerate(graph)}
        self.keysets: dict[type[KeySet], None] = dict.fromkeys(_keyset(t) for t in targets)
        for builder in graph:
            for dep in _deps(builder):
                if dep.keyset is not None:
                    self.keysets[dep.keyset] = None
        self.group_fields = {field for keyset in self.keysets for field in keyset.key}
        self.depth: dict[tuple[str, Space], int] = {}
        self.feeds: dict[tuple[str, Space], set[str]] = {}
        self.reached: dict[Space, int] = {}

    def need_dep(self, dep: Dep, space: Space, feeds: str) -> tuple[int, bool]:
        """(depth at which the dep's values are there, whether a reader in `space` can be fused with it)."""
        if dep.keyset is not None:
            members = _members(dep.keyset)
            depth, _ = self.need_dep(replace(dep, keyset=None, label=None), members, feeds)
            return depth, False
        if dep.on_fields:
            sources = [source.dep if isinstance(source, Each) else source for _, source in dep.on_fields]
            after = max(self.need_dep(source, space, feeds)[0] for source in sources)
            return self._reach(dep, space, after, feeds), False
        if dep.builder.key == space.key:
            return self.need(dep.builder, space, feeds), True
        if set(dep.builder.key) <= self.group_fields and not issubclass(dep.builder, Source):
            return self.need(dep.builder, Space("group", dep.builder.key, "the group"), feeds), False
        if dep.builder.paid or dep.builder.deps:
            return self._reach(dep, space, self._base(space), feeds), False
        return self._base(space), True  # no inputs of its own: evaluated within the reader's stage

    def need(self, builder: Builder, space: Space, feeds: str) -> int:
        node = (builder.name, space)
        seen = self.feeds.setdefault(node, set())
        if feeds in seen:
            return self.depth[node]
        seen.add(feeds)
        depth = self._base(space)
        for dep in _deps(builder):
            below = "gather" if dep.keyset is not None else feeds
            at, fused = self.need_dep(dep, space, below)
            depth = max(depth, at if fused and not builder.paid else at + 1)
        if issubclass(builder, Source) and space.kind != "reached":
            depth = 0
        self.depth[node] = depth
        return depth

    def _reach(self, dep: Dep, space: Space, after: int, feeds: str) -> int:
        dep = replace(dep, label=None)
        reached = Space("reached", dep.builder.key, f"by {dep} from {space}", space, dep)
        self.reached[reached] = after + 1
        return self.need(dep.builder, reached, feeds)

    def _base(self, space: Space) -> int:
        return self.reached.get(space, 1)

    def trace(self, target: Dep) -> TargetTrace:
        keyed: dict[str, Builder] = {}
        gathered: dict[tuple[type[KeySet], tuple[Builder, ...]], None] = {}
        grouped: dict[str, Builder] = {}
        provable = True

        # `within`: below a gather. `under`: below a group-level builder that gathers, but not in its gather.
        def walk(dep: Dep, into: dict[str, Builder], within: bool, under: bool) -> None:
            nonlocal provable
            if dep.keyset is not None:
                members: dict[str, Builder] = {}
                walk(replace(dep, keyset=None), members, True, False)
                gathered[dep.keyset, _sorted(members.values())] = None
                return
            for _, source in dep.on_fields:
                walk(source.dep if isinstance(source, Each) else source, into, within, under)
            if dep.on_fields:
                for below in self.graph.needs_of(dep.builder):
                    if issubclass(below, Source) and (within or under):
                        provable = False
                for gatherer in self._gatherers_below(dep.builder):
                    taken = {field for field, _ in dep.on_fields}
                    if taken & set(gatherer.key):
                        provable = False
                    walk(Dep(gatherer), {}, within, under)
                return
            if issubclass(dep.builder, Source):
                if not issubclass(dep.builder, KeySet):
                    into[dep.builder.name] = dep.builder
                    if under:
                        grouped[dep.builder.name] = dep.builder
                return
            if dep.builder.is_dynamic():
                provable = provable and not (within or under)
            below_gatherer = under or self._gathers_group(dep.builder)
            for inner in _deps(dep.builder):
                walk(inner, into, within, below_gatherer)

        walk(replace(target, keyset=None), keyed, False, False)
        return TargetTrace(
            target.builder,
            _keyset(target),
            _sorted(keyed.values()),
            tuple(sorted(gathered, key=lambda g: (g[0].name, [source.name for source in g[1]]))),
            _sorted(grouped.values()),
            provable,
        )

    def _gatherers_below(self, builder: Builder) -> Iterator[Builder]:
        for below in self.graph.needs_of(builder):
            if any(dep.keyset is not None for dep in _deps(below)):
                yield below

    def _gathers_group(self, builder: Builder) -> bool:
        gathers = any(dep.keyset is not None for dep in _deps(builder))
        return gathers and set(builder.key) <= self.group_fields

    def stages(self, traces: tuple[TargetTrace, ...]) -> Iterator[Stage]:
        for keyset in sorted(self.keysets, key=lambda k: k.name):
            yield ReadKeys(keyset)
        by_name = {builder.name: builder for builder in self.graph}
        groups: dict[tuple[int, Space], list[Builder]] = {}
        for (name, space), depth in self.depth.items():
            groups.setdefault((depth, space), []).append(by_name[name])
        ordered = sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1])))
        for (depth, space), builders in ordered:
            if depth == 0 and space.kind == "members":
                for source in sorted(builders, key=lambda b: b.name):
                    yield ReadSource(source, space, self._feeds([source], space))
        yield CheckTraces(traces)
        for (depth, space), builders in ordered:
            if depth == 0 and space.kind != "reached":
                continue
            builders = sorted(builders, key=lambda b: self.order[b.name])
            feeds = self._feeds(builders, space)
            if space.kind == "group":
                for builder in builders:
                    yield GatherStage(builder, space, feeds)
            else:
                yield KeyedStage(
                    space, tuple(builders), self._given(builders, space), any(b.paid for b in builders), feeds
                )

    def _feeds(self, builders: Sequence[Builder], space: Space) -> frozenset[str]:
        return frozenset().union(*(self.feeds[b.name, space] for b in builders))

    def _given(self, builders: Sequence[Builder], space: Space) -> tuple[Builder, ...]:
        given: dict[Builder, None] = {}

        def add(dep: Dep) -> None:
            for _, source in dep.on_fields:
                add(source.dep if isinstance(source, Each) else source)
            local = (
                not dep.on_fields
                and dep.builder.key != space.key
                and (dep.builder.name, space) not in self.depth
            )
            planned = any(name == dep.builder.name for name, _ in self.depth)
            fused = local and not (
                dep.builder.paid or dep.builder.deps or set(dep.builder.key) <= self.group_fields
            )
            if planned and not fused and dep.builder not in builders:
                given[dep.builder] = None

        for builder in builders:
            for dep in _deps(builder):
                if dep.keyset is None:
                    add(dep)
        return tuple(sorted(given, key=lambda b: self.order[b.name]))


def _deps(builder: Builder) -> tuple[Dep, ...]:
    return tuple(dep if isinstance(dep, Dep) else Dep(dep) for dep in builder.deps)


def _sorted(builders: Iterable[Builder]) -> tuple[Builder, ...]:
    return tuple(sorted(builders, key=lambda builder: builder.name))


def _names(builders: Sequence[Builder]) -> str:
    return ", ".join(builder.name for builder in builders) or "nothing"


def told(stage: Stage, state: PlanState) -> tuple[str, list[str]]:
    """What `explain` says of a stage: a line, and its details."""
    match stage:
        case ReadKeys(keyset):
            return f"read keys    {keyset.name}: {', '.join(keyset.key)} -> {keyset.of}", []
        case ReadSource(source, space):
            return f"read source  {source.name} for {space}", []
        case CheckTraces(targets):
            details = []
            for trace in targets:
                parts = [*(b.name for b in trace.keyed)]
                parts += [f"all {_names(sources)} over {keyset.name}" for keyset, sources in trace.gathered]
                proof = (
                    f"unchanged where {' and '.join(parts)} are"
                    if trace.provable and parts
                    else "always walked"
                )
                details.append(f"{trace.target.name}: {proof}")
            return "check        which keys are proven unchanged", details
        case KeyedStage(space, _, given, paid):
            kind = "paid stage " if paid else "stage      "
            limit = stage.in_process_limit(state.in_process_keys)
            where = (
                "in-process"
                if state.engine == "local"
                else f"in-process up to {limit} keys to compute, else on Spark"
            )
            details = [f"keys   {space}", f"given  {_names(given)}", f"runs   {where}"]
            return f"{kind}  {stage.label}", details
        case GatherStage(builder):
            gathers = sorted(str(dep) for dep in _deps(builder) if dep.keyset is not None)
            return f"group stage  {builder.name}", [f"gathers  {gather}" for gather in gathers]
