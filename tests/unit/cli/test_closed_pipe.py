"""A reader that goes away, as `| head -1` does: no traceback, and a run comes to its own end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

MAIN = "from featurekit_spark.cli import app; app(prog_name='featurekit')"


def closed(arguments: list[str], *, stderr_too: bool = False) -> tuple[int, str]:
    """(exit code, stderr) of a command whose stdout nobody reads."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=write,
        stderr=write if stderr_too else subprocess.PIPE,
        check=False,
    )
    os.close(write)
    return done.returncode, "" if stderr_too else done.stderr.decode()


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_command_ends_without_a_word(workplace: Any, output: str) -> None:
    workplace.run()
    show = ["cache", "show", "LLMLogic", '["abt","US","p1"]', "--path", f"{workplace.warehouse}/cache"]
    assert closed([*show, "--output", output]) == (141, "")
    assert closed([*show, "--output", output], stderr_too=True) == (141, "")
    assert closed(["doctor", "--engine", "local", "--output", output]) == (141, "")


def test_an_error_is_still_told() -> None:
    code, said = closed(["cache", "stats", "--path", "nowhere"])
    assert code == 3 and said.splitlines() == ["error: 'nowhere' holds no cache: check --path."]
    assert closed(["cache", "stats", "--path", "nowhere", "--output", "json"]) == (code, said)


@pytest.mark.parametrize("stderr_too", [False, True])
def test_a_run_is_finished_and_has_its_own_exit_code(workplace: Any, stderr_too: bool) -> None:
    options = [
        *("run", "--merchant", "abt", "--market", "US", "--engine", "local", "--run-id", "r1"),
        *("--set", f"product_db.path={workplace.catalogs}", "--set", f"warehouse={workplace.warehouse}"),
    ]
    assert closed(options, stderr_too=stderr_too) == (0, "")
    record = json.loads((workplace.warehouse / "runs" / "abt" / "US" / "r1.json").read_text())
    assert record["status"] == "ok" and len(workplace.published()) == 6
    workplace.catalog({"p1": "one lamp"})  # the publish gate has something to say
    code, said = closed([*options[:-4], "--run-id", "r2", *options[-4:]], stderr_too=stderr_too)
    assert code == 4 and "Traceback" not in said
    record = json.loads((workplace.warehouse / "runs" / "abt" / "US" / "r2.json").read_text())
    assert record["status"] == "failed"
