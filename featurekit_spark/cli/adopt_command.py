"""`featurekit adopt`: keep a builder's entries after a change of its code that changes none of its values.

Owns how it is asked for and told. What is compared and bound is in `adopt`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import (
    ConfFile,
    Market,
    Merchant,
    Output,
    OutputOption,
    Overrides,
    guarded,
    print_json,
    settings_of,
)
from featurekit_spark.errors import UnknownBuilderError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.adopt import Adoption
    from featurekit_spark.bootstrap import Bootstrap

__all__ = ["adopt_command"]

_SHOWN = 10


def adopt_command(
    builder: Annotated[
        str, typer.Argument(help="A builder below the logic builders, by name, or package.module:Class.")
    ],
    merchant: Merchant,
    market: Market,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=0, help="How many cached keys to compute again.")] = 100,
    force: Annotated[
        bool, typer.Option("--force", help="Adopt whatever the sample says. It is recorded.")
    ] = False,
    sample_paid: Annotated[
        bool,
        typer.Option("--sample-paid", help="Sample a paid builder too: one paid call for each sampled key."),
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the record of the adoption.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare, and bind nothing.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Keep a builder's cached values after a change of its code.

    Computes a sample of keys anew, and if all values agree binds the entries to the new code, so that nothing is
    computed or paid again.

    Exit codes: 0 adopted or nothing to do, 4 values differ or nothing could be compared, else as of `run`.

    Example: featurekit adopt LLMSuggestions --merchant demo --market US --conf-file conf/dev.yaml
    """
    with guarded(output):
        settings = settings_of(merchant, market, conf_file, overrides)
        from featurekit_spark.bootstrap import Bootstrap

        boot = Bootstrap(settings, merchant=merchant, market=market)
        try:
            found = _adopt(
                boot,
                builder,
                {"merchant": merchant, "market": market},
                sample=sample,
                force=force,
                sample_paid=sample_paid,
                reason=reason,
                dry_run=dry_run,
            )
        finally:
            boot.close()
        from featurekit_spark.adopt import AdoptionStatus

        refused = found.status is AdoptionStatus.REFUSED
        code = ExitCode.DATA if refused else ExitCode.OK
        if output is Output.JSON:
            print_json({**asdict(found), "exit_code": int(code)})
        else:
            _tell(found)
        if refused:
            raise typer.Exit(code)


def _adopt(boot: Bootstrap, name: str, named: dict[str, str], **options: Any) -> Adoption:
    from featurekit_spark.adopt import adopt
    from featurekit_spark.bindings import Bindings
    from featurekit_spark.builder import load_builder
    from featurekit_spark.graph import Graph

    keyset = boot.get_logic_keys()
    graph = Graph([*boot.get_logic_builders(), keyset])
    if ":" in name:
        wanted = load_builder(name)
        if wanted not in graph.order:
            graph = Graph([wanted, keyset])
    else:
        try:
            wanted = graph[name]
        except UnknownBuilderError as error:
            raise UsageError(f"{error} Builders elsewhere are written package.module:Class.") from error
    bindings = Bindings(boot.context).bind_all(graph)
    bindings.group_fields |= set(keyset.key)
    return adopt(
        wanted,
        graph=graph,
        bindings=bindings,
        context=boot.context,
        cache=boot.cache,
        group={field: named[field] for field in keyset.key},
        **options,
    )


def _tell(found: Adoption) -> None:
    """For people: the verdict, keys whose values differ, and what could not be compared."""
    print(f"{found.builder}: {found.said}")
    for item in found.disagreements[:_SHOWN]:
        print(f"  {item.key}\n    was  {item.old}\n    now  {item.new}")
    if len(found.disagreements) > _SHOWN:
        more = len(found.disagreements) - _SHOWN
        print(f"  and {more} more; --output json lists all of them")
    for reason, count in sorted(found.skipped.items()):
        print(f"  not compared: {count}, {reason}")
    if found.calls:
        price = "price unknown" if found.usd is None else f"{found.usd:.4f} usd"
        print(f"  the sample made {found.calls} paid calls ({found.tokens} tokens, {price})")
