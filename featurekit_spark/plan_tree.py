"""A plan as a tree: each target's stage, and below it the stages that it takes keys and values from.

Pure, as the plan is. The same stages as in the plan, with the same numbers; where a stage is needed twice it is drawn
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from featurekit_spark.builder import Dep, Each, FeatureBuilder, KeySet, Source, as_dep
from featurekit_spark.plan import (
    CheckTraces,
    GatherStage,
    KeyedStage,
    Plan,
    ReadKeys,
    ReadSource,
    Space,
    told,
)
from featurekit_spark.reasons import tree_lines

__all__ = ["inputs_of", "plan_facts", "plan_tree"]

Builder = type[FeatureBuilder[Any]]


def plan_tree(plan: Plan) -> str:
    """The plan as text, the same for the same graph on every machine."""
    drawn: set[int] = set()

    def lines_of(number: int) -> list[str]:
        head, details = told(plan.stages[number - 1], plan.state)
        head = f"{number} {' '.join(head.split())}"
        if number in drawn:
            return [f"{head} (drawn above)"] if list(inputs_of(plan, number)) else [head]
        return [head, *(line for line in details if not line.startswith(("given ", "gathers ")))]

    def below(number: int) -> list[int]:
        if number in drawn:
            return []
        drawn.add(number)
        return inputs_of(plan, number)

    lines = [
        f"plan for {', '.join(map(str, plan.targets))} on {plan.state.engine}: {len(plan.stages)} stages"
    ]
    for number, stage in enumerate(plan.stages, 1):
        if isinstance(stage, CheckTraces):
            head, details = told(stage, plan.state)
            lines += [f"{number} {' '.join(head.split())}", *(f"    {line}" for line in details)]
    for target in plan.targets:
        assert target.keyset is not None  # build_plan refuses a target without one
        lines += tree_lines(_made_by(plan, target.builder, _members(target.keyset)), lines_of, below)
    return "\n".join(lines)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: `stages` in the order in which they run, each with the numbers of its inputs."""
    stages = []
    for number, stage in enumerate(plan.stages, 1):
        head, details = told(stage, plan.state)
        stages.append(
            {
                "number": number,
                "kind": type(stage).__name__,
                "label": stage.label,
                "text": " ".join(head.split()),
                "details": details,
                "inputs": inputs_of(plan, number),
            }
        )
    return {"targets": list(map(str, plan.targets)), "engine": plan.state.engine, "stages": stages}


def inputs_of(plan: Plan, number: int) -> list[int]:
    """Numbers of the stages from which a stage takes its keys and its values."""
    stage = plan.stages[number - 1]
    match stage:
        case ReadSource(_, space):
            found = _keys_of(plan, space)
        case KeyedStage(space, builders):
            found = [
                n for builder in builders for dep in builder.deps for n in _dep(plan, as_dep(dep), space)
            ]
            found += _keys_of(plan, space)
        case GatherStage(builder, space):
            found = [n for dep in builder.deps for n in _dep(plan, as_dep(dep), space)]
        case _:
            found = []
    return [n for n in dict.fromkeys(found) if n != number]


def _keys_of(plan: Plan, space: Space) -> list[int]:
    """Where a space's keys come from: a key set, or what the dep that leads there takes its fields from."""
    if space.kind == "members":
        return [
            n
            for n, s in enumerate(plan.stages, 1)
            if isinstance(s, ReadKeys) and space.label == f"of {s.label}"
        ]
    if space.dep is None or space.origin is None:
        return []
    found = [n for source in _sources(space.dep) for n in _dep(plan, source, space.origin)]
    return found or _keys_of(plan, space.origin)


def _dep(plan: Plan, dep: Dep, space: Space) -> Iterator[int]:
    """Stages in which what a reader in `space` reads through `dep` is made, those its key comes from included."""
    if dep.keyset is not None:
        yield from _dep(plan, replace(dep, keyset=None), _members(dep.keyset))
        yield from _keys_of(plan, _members(dep.keyset))
        return
    for source in _sources(dep):
        yield from _dep(plan, source, space)
    plain = replace(dep, label=None)
    reached = Space("reached", dep.builder.key, f"by {plain} from {space}", space, plain)
    group = Space("group", dep.builder.key, "the group")
    if dep.on_fields:
        yield from _made(plan, dep.builder, reached)
    elif dep.builder.key == space.key:
        yield from _made(plan, dep.builder, space)
    elif not issubclass(dep.builder, Source):
        yield from list(_made(plan, dep.builder, group)) or _made(plan, dep.builder, reached)


def _sources(dep: Dep) -> list[Dep]:
    return [source.dep if isinstance(source, Each) else source for _, source in dep.on_fields]


def _made(plan: Plan, builder: Builder, space: Space) -> Iterator[int]:
    for number, stage in enumerate(plan.stages, 1):
        match stage:
            case KeyedStage() if builder in stage.builders and stage.space == space:
                yield number
            case ReadSource() if builder is stage.source and stage.space == space:
                yield number
            case GatherStage() if builder is stage.builder and stage.space == space:
                yield number


def _made_by(plan: Plan, builder: Builder, space: Space) -> int:
    return next(_made(plan, builder, space))


def _members(keyset: type[KeySet]) -> Space:
    return Space("members", keyset.member_key(), f"of {keyset.name}")
