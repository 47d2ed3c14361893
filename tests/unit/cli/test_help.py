"""What a newcomer is told: every command says what it is for and gives an example; shells complete."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from featurekit_spark.cli import app

ROOT = typer.main.get_command(app)


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_what_a_newcomer_needs_comes_first() -> None:
    names = ROOT.list_commands(None)  # type: ignore[attr-defined]
    assert names[:3] == ["demo", "doctor", "config"]
    assert set(names) == set(ROOT.commands)  # type: ignore[attr-defined]
    assert "Begin with: featurekit demo." in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_help_of_every_command(path: tuple[str, ...]) -> None:
    command = dict(commands())[path]
    first = (command.help or "").strip().splitlines()[0]
    assert first.endswith(".") and len(first) <= 90, f"one line that says what it is for: {first!r}"
    assert f"featurekit {' '.join(path)}" in " ".join((command.help or "").split()), "an example"
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0 and f"Example: featurekit {' '.join(path)}" in _unwrapped(shown.stdout)
    silent = [
        option.name for option in command.params if option.name != "help" and not getattr(option, "help", "")
    ]
    assert silent == [], "every option says what it does"


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_lines_of_help_end_where_the_terminal_does(path: tuple[str, ...]) -> None:
    """Not where those of the source did."""
    command = dict(commands())[path]
    for paragraph in (command.help or "").split("\n\n"):
        assert "\n" not in paragraph
        assert paragraph.count("Example:") == paragraph.startswith("Example:"), "on a line of its own"


def test_help_at_80_columns() -> None:
    shown = CliRunner().invoke(app, ["retry", "--help"], env={"COLUMNS": "80"}).stdout
    lines = [line.strip() for line in shown.splitlines()]
    assert "failed to answer (retryable, quota) by every one. It is a run like any other:" in lines
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    assert "say what is missing and end with exit code 6." in _unwrapped(shown)


@pytest.mark.parametrize(
    ("shell", "said"), [("bash", "complete -o default -F"), ("zsh", "#compdef"), ("fish", "complete")]
)
def test_completion_is_shown(shell: str, said: str) -> None:
    environ = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = "from featurekit_spark.cli import app; app(prog_name='featurekit')"
    done = subprocess.run(
        [sys.executable, "-c", code, "--show-completion", shell],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in done.stdout and "_FEATUREKIT_COMPLETE" in done.stdout


def test_a_shell_completes_commands() -> None:
    environ = {
        **os.environ,
        "_FEATUREKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": "featurekit do",
        "COMP_CWORD": "1",
    }
    code = "from featurekit_spark.cli import app; app(prog_name='featurekit')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["doctor"]


def _unwrapped(text: str) -> str:
    return " ".join(text.split())
