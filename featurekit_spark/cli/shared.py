"""What the commands share: options, how a result is printed, and how an error becomes a message and an exit code.

A command is a function that takes its options and returns an `Answer`; `answering` makes it what typer calls. Imports
nothing slow: commands import what they need when they are called.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields
from datetime import date
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TextIO, TypeVar, get_type_hints

import typer

from featurekit_spark.cli.exit_codes import ExitCode, exit_code
from featurekit_spark.errors import FeaturekitError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.settings import Settings

__all__ = [
    "NOBODY",
    "Answer",
    "Day",
    "DryRun",
    "Engine",
    "EngineKind",
    "GroupOptions",
    "OpenOptions",
    "Options",
    "Output",
    "ReaderGone",
    "answering",
    "aside",
    "command_app",
    "say",
]

NOBODY = "-"
"""Settings are those of a merchant and market; this is one without a file of its own."""


class Output(StrEnum):
    """How a result is printed."""

    TEXT = "text"
    JSON = "json"


class EngineKind(StrEnum):
    """Where a run computes; as the setting engine.kind."""

    SPARK = "spark"
    LOCAL = "local"


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no date: write it like 2026-01-31.") from None


Engine = Annotated[
    EngineKind | None, typer.Option(help="local needs no JVM. Short for --set engine.kind=...")
]
Day = Annotated[
    date | None, typer.Option(metavar="YYYY-MM-DD", parser=_day, help="The date that is taken for today.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    conf_file: Annotated[
        Path | None, typer.Option(help="Settings (YAML); merchants/MERCHANT.yaml beside it is read as well.")
    ] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting: search.top_k=20.")
    ] = None
    output: Annotated[Output, typer.Option(help="json: one line with one JSON object.")] = Output.TEXT

    def _settings(self, merchant: str, market: str, engine: EngineKind | None) -> Settings:
        from featurekit_spark.config import load_settings

        changes = [*(self.overrides or []), *([f"engine.kind={engine}"] if engine else [])]
        return load_settings(
            merchant=merchant,
            market=market,
            conf_file=self.conf_file,
            environ=os.environ,
            overrides=changes,
        )


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """Of a command about one merchant and market."""

    merchant: Annotated[str, typer.Option(help="Merchant, as in the name of the catalog's file.")]
    market: Annotated[str, typer.Option(help="Market, such as US.")]

    def settings(self, engine: EngineKind | None = None) -> Settings:
        """Of this merchant and market; `engine` is one more override."""
        return self._settings(self.merchant, self.market, engine)


@dataclass(frozen=True, kw_only=True)
class OpenOptions(Options):
    """Of a command that may be asked without a merchant: about the settings that all share."""

    merchant: Annotated[
        str | None, typer.Option(help="With this merchant's settings; without: those that all share.")
    ] = None
    market: Annotated[str | None, typer.Option(help="Its market, such as US.")] = None

    def settings(self, engine: EngineKind | None = None) -> Settings:
        """Of this merchant and market, or those that all share; `engine` is one more override."""
        return self._settings(self.merchant or NOBODY, self.market or NOBODY, engine)

    def both_or_neither(self) -> None:
        """Raises UsageError for a merchant without a market, or the other way round."""
        if (self.merchant is None) != (self.market is None):
            raise UsageError("--merchant and --market go together: give both, or neither.")


@dataclass(frozen=True)
class Answer:
    """What a command found: `facts` for programs, `text` for people, a line each; `notes` for stderr, always."""

    facts: Mapping[str, Any]
    text: Iterable[str] = ()
    notes: Iterable[str] = ()
    code: ExitCode = ExitCode.OK


O = TypeVar("O", bound=Options)  # noqa: E741 - O as in options
P = ParamSpec("P")


def answering(command: Callable[Concatenate[O, P], Answer | None]) -> Callable[..., None]:
    """`command` as typer calls it. The fields of its first parameter, an `Options`, become options as well; its answer
    is printed, and what it raises becomes a message and an exit code. A command that returns None has said all itself.
    """
    hints = get_type_hints(command, include_extras=True)
    first, *own = inspect.signature(command).parameters.values()
    kind: type[O] = hints[first.name]
    types = get_type_hints(kind, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        # In --help: whom it is about, then the command's own, then what all have.
        for field in sorted(fields(kind), key=lambda field: field.name in Options.__dataclass_fields__)
    ]
    required = [option for option in shared if option.default is inspect.Parameter.empty]
    mine = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[param.name]) for param in own]
    others = [option for option in shared if option not in required]

    @wraps(command)
    def called(**given: Any) -> None:
        options = kind(**{option.name: given.pop(option.name) for option in shared})
        with _guarded(options.output):
            answer: Answer | None = command(options, **given)  # type: ignore[call-arg]
            if answer is not None:
                _print(answer, options.output)

    called.__doc__ = _paragraphs(command.__doc__ or "")
    called.__signature__ = inspect.Signature([*required, *mine, *others])  # type: ignore[attr-defined]
    called.__annotations__ = {option.name: option.annotation for option in (*required, *mine, *others)}
    return called


def _paragraphs(text: str) -> str:
    """Each paragraph on a line of its own: --help breaks lines by the terminal's width, and keeps those it finds."""
    return "\n\n".join(" ".join(lines.split()) for lines in inspect.cleandoc(text).split("\n\n"))


def command_app(name: str, help: str) -> typer.Typer:  # noqa: A002 - typer's own name for it
    """A group of commands, set up as all of them are."""
    app = typer.Typer(name=name, help=help, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def group() -> None:
        """Keeps a command a subcommand while it is the only one."""

    return app


class ReaderGone(typer.Exit):
    """Whoever read stdout has gone, as `head -1` does."""

    def __init__(self) -> None:
        super().__init__(ExitCode.READER_GONE)


def say(text: str) -> None:
    """Print a result on stdout. Raises ReaderGone, which ends the command without a word."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence(sys.stdout)
        raise ReaderGone from None


def aside(text: str) -> None:
    """Print what is no result, on stderr. Nobody reads it: then the command goes on all the same."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silence(sys.stderr)


def _print(answer: Answer, output: Output) -> None:
    if output is Output.JSON:
        say(_json(answer.facts))
    else:
        lines = list(answer.text)
        if lines:
            say("\n".join(lines))
    for note in answer.notes:
        aside(note)
    if answer.code:
        raise typer.Exit(answer.code)


@contextmanager
def _guarded(output: Output) -> Iterator[None]:
    """Ends the process with the exit code of what is raised inside: the message on stderr, and with `--output json` an
    object with `status`, `error` and `exit_code` on stdout."""
    try:
        yield
    except FeaturekitError as error:
        _failed(str(error), exit_code(error), output)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        aside(traceback.format_exc().rstrip())
        _failed(f"{type(error).__name__}: {error}", ExitCode.BUG, output)


def _failed(message: str, code: ExitCode, output: Output) -> None:
    aside(f"error: {message}")
    if output is Output.JSON:
        with suppress(ReaderGone):  # the error's code says more
            say(_json({"status": "failed", "error": message, "exit_code": int(code)}))
    raise typer.Exit(code)


def _json(facts: Mapping[str, Any]) -> str:
    """One line; ASCII, because some readers take U+2028 for the end of a line."""
    return json.dumps(facts, default=str)


def _silence(stream: TextIO) -> None:
    """What is still buffered goes nowhere, so that Python has nothing to complain of when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
