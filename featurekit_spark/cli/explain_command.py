"""`featurekit explain`: the plan as a tree, why one key would be computed again, and what an earlier run did and why.

Owns how the question is asked. What is said of a key is in `reasons`, how a plan is drawn in `plan_tree`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import (
    ConfFile,
    Engine,
    Market,
    Merchant,
    Output,
    OutputOption,
    Overrides,
    guarded,
    print_json,
    settings_of,
)
from featurekit_spark.errors import UnknownBuilderError, UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.builder import FeatureBuilder

__all__ = ["explain_command"]


def explain_command(
    merchant: Merchant,
    market: Market,
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
        str | None, typer.Option(metavar="RUN_ID", help="Explain what this run did instead.")
    ] = None,
    run_date: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The date that is taken for today.")
    ] = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Draw the plan, or say why a key would be computed again.

    With --key, each part of its identity before and now. Nothing is built but light builders, nothing is written,
    paid or started. With --run: what that run did for a builder, and with --key why it computed that key.

    Example: featurekit explain LLMLogic --key '["demo","US","demo-000001"]' --merchant demo --market US
    """
    with guarded(output):
        settings = settings_of(merchant, market, conf_file, overrides, engine)
        if run is not None and key is None:
            _show_run(settings.warehouse, merchant, market, run, builder, output)
            return
        from featurekit_spark.bootstrap import Bootstrap

        boot = Bootstrap(
            settings, merchant=merchant, market=market, run_date=run_date.date() if run_date else None
        )
        try:
            if key is None:
                _show_plan(boot, builder, output)
            else:
                _show_key(boot, builder, key, run, output)
        finally:
            boot.close()


def _show_plan(boot: Bootstrap, name: str | None, output: Output) -> None:
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
    if output is Output.JSON:
        print_json({"status": "ok", **group, **plan_facts(plan)})
    else:
        print(plan_tree(plan), flush=True)


def _show_key(boot: Bootstrap, name: str | None, text: str, run: str | None, output: Output) -> None:
    from featurekit_spark.hindsight import why_in_run

    builder = _builder(boot, name)
    key = _parsed(builder, text)
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
    if output is Output.JSON:
        print_json({"status": "ok", "merchant": boot.merchant, "market": boot.market, **found.facts()})
    else:
        print(found, flush=True)


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


def _parsed(builder: type[FeatureBuilder[Any]], text: str) -> tuple[Any, ...]:
    from featurekit_spark.builder import parse_key

    example = json.dumps([f"<{field}>" for field in builder.key])
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"--key {text!r} is no JSON ({error}). A key of {builder.name} is written {example}; mind the shell's "
            "quotes"
        ) from error
    if not isinstance(found, list | dict) or not all(
        isinstance(part, str | int) for part in (found.values() if isinstance(found, dict) else found)
    ):
        raise UsageError(
            f"--key {text!r} is no key: {builder.name} has the key fields {builder.key!r}; write {example}"
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


def _show_run(warehouse: str, merchant: str, market: str, run: str, name: str | None, output: Output) -> None:
    """What a run's document says of its builders."""
    from featurekit_spark.report.store import RunStore

    document = RunStore(warehouse).read(merchant, market, run)
    builders = {
        each: {**counts, **(document.get("identities") or {}).get(each, {})}
        for each, counts in (document.get("builders") or {}).items()
    }
    if name is not None:
        if name not in builders:
            raise UsageError(f"run {run!r} has no builder {name!r}. {known_names(name, builders)}")
        builders = {name: builders[name]}
    if output is Output.JSON:
        kept = ("run_id", "merchant", "market", "started", "unchanged", "engine")
        print_json({"status": "ok", **{field: document.get(field) for field in kept}, "builders": builders})
    else:
        print("\n".join(_told(document, builders)), flush=True)


def _told(document: Mapping[str, Any], builders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    nothing = ", nothing had changed" if document.get("unchanged") else ""
    yield f"run {document['run_id']} of {document['merchant']} {document['market']}: {document['status']}{nothing}"
    for name, facts in builders.items():
        counts = ", ".join(f"{facts.get(what) or 0} {what}" for what in ("hit", "computed", "empty", "error"))
        yield f"{name}: {counts}, {facts.get('calls') or 0} calls"
        if "config_hash" in facts:
            yield f"    version {facts['version']}, type {facts['type']}"
            yield f"    config  {facts['config']} ({facts['config_hash']})"
