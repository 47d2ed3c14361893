"""What the commands share: options, output forms, and how an error becomes a message and an exit code.

Imports nothing slow: commands import what they need when they are called.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.exit_codes import ExitCode, exit_code
from featurekit_spark.errors import FeaturekitError

if TYPE_CHECKING:
    from featurekit_spark.settings import Settings

__all__ = [
    "ConfFile",
    "Engine",
    "Market",
    "Merchant",
    "Output",
    "OutputOption",
    "Overrides",
    "command_app",
    "guarded",
    "print_json",
    "settings_of",
]


class Output(StrEnum):
    """How a result is printed."""

    TEXT = "text"
    JSON = "json"


Merchant = Annotated[str, typer.Option(help="Merchant, as in the name of the catalog's file.")]
Market = Annotated[str, typer.Option(help="Market, such as US.")]
ConfFile = Annotated[
    Path | None, typer.Option(help="Settings (YAML); merchants/MERCHANT.yaml beside it is read as well.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting: search.top_k=20.")
]
Engine = Annotated[str | None, typer.Option(help="spark or local (no JVM); short for --set engine.kind=...")]
OutputOption = Annotated[Output, typer.Option(help="json: one line with one JSON object.")]


def command_app(name: str, help: str) -> typer.Typer:  # noqa: A002 - typer's own name for it
    """A group of commands, set up as all of them are."""
    return typer.Typer(name=name, help=help, no_args_is_help=True, pretty_exceptions_enable=False)


def settings_of(
    merchant: str, market: str, conf_file: Path | None, overrides: list[str] | None, engine: str | None = None
) -> Settings:
    """The settings of one merchant and market; `engine` is one more override."""
    from featurekit_spark.config import load_settings

    changes = [*(overrides or []), *([f"engine.kind={engine}"] if engine else [])]
    return load_settings(
        merchant=merchant, market=market, conf_file=conf_file, environ=os.environ, overrides=changes
    )


@contextmanager
def guarded(output: Output = Output.TEXT) -> Iterator[None]:
    """Ends the process with the exit code of what is raised inside: the message on stderr, and with `--output json` an
    object with `status`, `error` and `exit_code` on stdout."""
    try:
        yield
    except FeaturekitError as error:
        _failed(str(error), exit_code(error), output)
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        traceback.print_exc()
        _failed(f"{type(error).__name__}: {error}", ExitCode.BUG, output)


def print_json(facts: Mapping[str, Any]) -> None:
    """One line; ASCII, because some readers take U+2028 for the end of a line."""
    print(json.dumps(facts, default=str), flush=True)


def _failed(message: str, code: ExitCode, output: Output) -> None:
    print(f"error: {message}", file=sys.stderr)
    if output is Output.JSON:
        print_json({"status": "failed", "error": message, "exit_code": int(code)})
    raise typer.Exit(code)
