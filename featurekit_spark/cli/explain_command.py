"""`featurekit explain`: the plan as a tree, why one key would be computed again, and what an earlier run did and why.

Owns how the question is asked. What is said of a key is in `reasons`, how a plan is drawn in `plan_tree`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import Answer, Day, Engine, GroupOptions, answering
from featurekit_spark.cli.wording import counted
from featurekit_spark.errors import UnknownBuilderError, UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.builder import FeatureBuilder

__all__ = ["explain_command"]


@answering
def explain_command(
    options: GroupOptions,
    builder: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUILDER]", help="A builder of the plan, or package.module:Class. Default: all targets."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="""One key, such as '["abt","US","abt-00001"]' or a JSON object."""
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Explain what this run did instead: its name, or latest."),
    ] = None,
    run_date: Day = None,
    engine: Engine = None,
) -> Answer:
    """Draw the plan, or say why a key would be computed again.

    With --key, each part of its identity before and now. Nothing is built but light builders, nothing is written,
    paid or started. With --run: what that run did for a builder, and with --key why it computed that key.

    Example: featurekit explain LLMLogic --key '["demo","US","demo-000001"]' --merchant demo --market US
    """
    settings = options.settings(engine)
    if run is not None:
        from featurekit_spark.report.store import RunStore

        store = RunStore(settings.warehouse)
        if key is None:
            return _of_run(store.read(options.merchant, options.market, run), builder)
        if run == "latest":
            run = store.read(options.merchant, options.market, run)["run_id"]
    from featurekit_spark.bootstrap import Bootstrap

    boot = Bootstrap(settings, merchant=options.merchant, market=options.market, run_date=run_date)
    try:
        return _of_plan(boot, builder) if key is None else _of_key(boot, builder, key, run)
    finally:
        boot.close()


def _of_plan(boot: Bootstrap, name: str | None) -> Answer:
    from featurekit_spark.plan_tree import plan_facts, plan_tree

    keyset = boot.get_logic_keys()
    builders = boot.get_logic_builders() if name is None else [_builder(boot, name)]
    for builder in builders:
        if builder.key != keyset.member_key():
            raise UsageError(
                f"{builder.name} has the key {builder.key!r}, and {keyset.name} gives {keyset.member_key()!r}, so no "
                "run has it for a target; ask for one key of it with --key, or for the plan of a builder above it"
            )
    group: dict[str, Any] = {"merchant": boot.merchant, "market": boot.market}
    plan = boot.get_session().plan(*(builder.over(keyset) for builder in builders), **group)
    return Answer({"status": "ok", **group, **plan_facts(plan)}, [plan_tree(plan)])


def _of_key(boot: Bootstrap, name: str | None, text: str, run: str | None) -> Answer:
    from featurekit_spark.hindsight import why_in_run

    builder = _builder(boot, name)
    key = _parsed(boot, builder, text)
    keyset = boot.get_logic_keys()
    is_target = builder.key == keyset.member_key()
    named: dict[str, Any] = {"merchant": boot.merchant, "market": boot.market}
    group = {field: named[field] for field in keyset.key}
    _of_this_group(boot, builder, key)
    session = boot.get_session()
    if run is not None:
        found = why_in_run(
            builder, key, run, context=session.context, cache=session.cache, group=tuple(group.values())
        )
    else:
        target = builder.over(keyset) if is_target else builder
        found = session.why(target, key, **group)
    about = {"status": "ok", "merchant": boot.merchant, "market": boot.market}
    return Answer({**about, **found.facts()}, [str(found)])


def _builder(boot: Bootstrap, name: str | None) -> type[FeatureBuilder[Any]]:
    from featurekit_spark.builder import load_builder
    from featurekit_spark.graph import Graph

    targets = boot.get_logic_builders()
    if name is None:
        if len(targets) > 1:
            names = ", ".join(target.name for target in targets)
            raise UsageError(
                f"--key needs a builder to be a key of: featurekit explain BUILDER --key ...; {names}"
            )
        return targets[0]
    if ":" in name:
        return load_builder(name)
    try:
        return Graph([*targets, boot.get_logic_keys()])[name]
    except UnknownBuilderError as error:
        raise UsageError(f"{error} One that is not in the plan is given as package.module:Class.") from error


def _parsed(boot: Bootstrap, builder: type[FeatureBuilder[Any]], text: str) -> tuple[Any, ...]:
    from featurekit_spark.builder import parse_key

    known = {"merchant": boot.merchant, "market": boot.market}
    written = f"a key of {builder.name} is written --key '{json.dumps([known.get(f, f'<{f}>') for f in builder.key])}'"
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--key {text!r} is no JSON ({error}); {written}") from error
    parts = found.values() if isinstance(found, dict) else found
    if not isinstance(found, list | dict) or not all(isinstance(part, str | int) for part in parts):
        raise UsageError(
            f"--key {text!r} is no key: {builder.name} has the key fields {builder.key!r}; {written}"
        )
    return parse_key(builder, found)


def _of_this_group(boot: Bootstrap, builder: type[FeatureBuilder[Any]], key: tuple[Any, ...]) -> None:
    """A key of another merchant would be looked for in this one's catalog."""
    for field, wanted in (("merchant", boot.merchant), ("market", boot.market)):
        if field in builder.key and key[builder.key.index(field)] != wanted:
            found = key[builder.key.index(field)]
            raise UsageError(
                f"--key has the {field} {found!r}, and --{field} is {wanted!r}: give the same in both"
            )


def _of_run(document: Mapping[str, Any], name: str | None) -> Answer:
    """What a run's document says of its builders."""
    builders = {
        each: {**counts, **(document.get("identities") or {}).get(each, {})}
        for each, counts in (document.get("builders") or {}).items()
    }
    if name is not None:
        if name not in builders:
            run = document["run_id"]
            raise UsageError(f"run {run!r} has no builder {name!r}. {known_names(name, builders)}")
        builders = {name: builders[name]}
    kept = ("run_id", "merchant", "market", "started", "unchanged", "engine")
    facts = {"status": "ok", **{field: document.get(field) for field in kept}, "builders": builders}
    return Answer(facts, _told(document, builders))


def _told(document: Mapping[str, Any], builders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    nothing = ", nothing had changed" if document.get("unchanged") else ""
    yield f"run {document['run_id']} of {document['merchant']} {document['market']}: {document['status']}{nothing}"
    for name, facts in builders.items():
        counts = ", ".join(
            f"{facts.get(what) or 0} {what}" for what in ("hit", "computed", "updated", "empty", "error")
        )
        yield f"{name}: {counts}, {counted(facts.get('calls') or 0, 'call')}"
        if "config_hash" in facts:
            yield f"    version {facts['version']}, type {facts['type']}"
            yield f"    config  {facts['config']} ({facts['config_hash']})"
