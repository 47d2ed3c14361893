"""`featurekit config show`: every setting, its value and where it came from. Secrets are masked."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from featurekit_spark.cli.shared import (
    ConfFile,
    Engine,
    Output,
    OutputOption,
    Overrides,
    command_app,
    guarded,
    print_json,
    settings_of,
)
from featurekit_spark.errors import UsageError

__all__ = ["NOBODY", "config_app"]

NOBODY = "-"
"""Settings are those of a merchant and market; this is one without a file of its own."""

_WIDEST = 60
config_app = command_app("config", "See the settings that a run would have, and where each is from.")


@config_app.callback()
def _group() -> None:
    """Keeps `show` a subcommand while it is the only one."""


@config_app.command("show")
def show_command(
    key: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Only these, or all below: llm, search.top_k."),
    ] = None,
    merchant: Annotated[
        str | None, typer.Option(help="With this merchant's own file, merchants/MERCHANT.yaml.")
    ] = None,
    market: Annotated[str | None, typer.Option(help="Market, such as US.")] = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Print every setting, its value, and where that came from.

    From a default, the conf file, the merchant's file, an environment variable or --set. Passwords are masked.

    Example: featurekit config show llm cache --conf-file conf/dev.yaml --merchant demo
    """
    with guarded(output):
        from featurekit_spark.errors import known_names

        leaves = settings_of(merchant or NOBODY, market or NOBODY, conf_file, overrides, engine).leaves()
        wanted = [text.rstrip(".") for text in key or ()]
        for name in wanted:
            if not any(_below(leaf.key, name) for leaf in leaves):
                raise UsageError(f"no setting {name!r}. {known_names(name, [leaf.key for leaf in leaves])}")
        shown = [leaf for leaf in leaves if not wanted or any(_below(leaf.key, name) for name in wanted)]
        if output is Output.JSON:
            print_json({leaf.key: {"value": leaf.value, "origin": leaf.origin} for leaf in shown})
            return
        rows = [("key", "value", "origin"), *((leaf.key, _text(leaf.value), leaf.origin) for leaf in shown)]
        widths = [min(max(len(row[i]) for row in rows), _WIDEST) for i in range(2)]
        for row in rows:
            print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _text(value: Any) -> str:
    """As `--set` takes it: JSON is YAML; a plain text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
