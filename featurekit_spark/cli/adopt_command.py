"""`featurekit adopt`: keep a builder's entries after a change of its code that changes none of its values.

Owns how it is asked for and told. What is compared and bound is in `adopt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import Answer, DryRun, GroupOptions, answering
from featurekit_spark.cli.wording import counted
from featurekit_spark.errors import UnknownBuilderError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.adopt import Adoption
    from featurekit_spark.bootstrap import Bootstrap

__all__ = ["adopt_command"]

_SHOWN = 10


@answering
def adopt_command(
    options: GroupOptions,
    builder: Annotated[
        str, typer.Argument(help="A builder below the logic builders, by name, or package.module:Class.")
    ],
    sample: Annotated[int, typer.Option(min=0, help="How many cached keys to compute again.")] = 100,
    force: Annotated[
        bool, typer.Option("--force", help="Adopt whatever the sample says. It is recorded.")
    ] = False,
    sample_paid: Annotated[
        bool,
        typer.Option("--sample-paid", help="Sample a paid builder too: one paid call for each sampled key."),
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the record of the adoption.")] = "",
    dry_run: DryRun = False,
) -> Answer:
    """Keep a builder's cached values after a change of its code.

    Computes a sample of keys anew, and if all values agree binds the entries to the new code, so that nothing is
    computed or paid again.

    Exit codes: 0 adopted or nothing to do, 4 values differ or nothing could be compared, else as of `run`.

    Example: featurekit adopt LLMSuggestions --merchant demo --market US --conf-file conf/dev.yaml
    """
    settings = options.settings()
    from featurekit_spark.adopt import AdoptionStatus
    from featurekit_spark.bootstrap import Bootstrap

    boot = Bootstrap(settings, merchant=options.merchant, market=options.market)
    try:
        found = _adopt(
            boot,
            builder,
            {"merchant": options.merchant, "market": options.market},
            sample=sample,
            force=force,
            sample_paid=sample_paid,
            reason=reason,
            dry_run=dry_run,
        )
    finally:
        boot.close()
    code = ExitCode.DATA if found.status is AdoptionStatus.REFUSED else ExitCode.OK
    return Answer({**asdict(found), "exit_code": int(code)}, _told(found), code=code)


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


def _told(found: Adoption) -> Iterator[str]:
    """For people: the verdict, keys whose values differ, and what could not be compared."""
    yield f"{found.builder}: {found.said}"
    for item in found.disagreements[:_SHOWN]:
        yield f"  {item.key}\n    was  {item.old}\n    now  {item.new}"
    if len(found.disagreements) > _SHOWN:
        more = len(found.disagreements) - _SHOWN
        yield f"  and {more} more; --output json lists all of them"
    for reason, count in sorted(found.skipped.items()):
        yield f"  not compared: {count}, {reason}"
    if found.calls:
        price = "price unknown" if found.usd is None else f"{found.usd:.4f} usd"
        yield (
            f"  the sample made {counted(found.calls, 'paid call')} ({counted(found.tokens, 'token')}, {price})"
        )
