"""A run with nothing to do says so before anything slow is imported, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SLOW = ("pandas", "pyspark", "pyarrow.dataset", "scipy", "sklearn")
PROGRAM = f"""
import json, sys
from featurekit_spark.cli import run_logic_main
code = run_logic_main(sys.argv[1:])
print(json.dumps([code, [name for name in {SLOW!r} if name in sys.modules]]), file=sys.stderr)
"""


def run(place: Any, *more: str) -> tuple[dict[str, Any], list[str]]:
    """(the JSON line, slow modules that were imported) of one run in a new process."""
    arguments = ["--merchant", "abt", "--market", "US", "--output", "json", *more]
    arguments += ["--set", f"product_db.path={place.catalogs}", "--set", f"warehouse={place.warehouse}"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAVA_HOME": "/nowhere"},  # no JVM is started either
        check=False,
    )
    code, imported = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), imported


@pytest.mark.parametrize("engine", ["local", "spark"])
def test_nothing_slow_is_imported_where_nothing_changed(workplace: Any, engine: str) -> None:
    cold, imported = run(workplace, "--engine", engine)
    assert "pandas" in imported and not cold["unchanged"]
    again, imported = run(workplace, "--engine", engine)
    assert imported == []
    assert again["unchanged"] and again["sinks"]["delta"]["status"] == "unchanged"
    assert again["quality"] == cold["quality"]
    assert {name: counts["computed"] for name, counts in again["builders"].items()} == dict.fromkeys(
        cold["builders"], 0
    )


def test_a_touched_catalog_is_read_and_then_known_again(workplace: Any) -> None:
    run(workplace, "--engine", "local")
    catalog = next(Path(workplace.catalogs).glob("*.csv"))
    os.utime(catalog, ns=(1, 1))
    touched, imported = run(workplace, "--engine", "local")
    assert touched["unchanged"] and "pyarrow.dataset" in imported
    assert run(workplace, "--engine", "local")[1] == []


def test_a_sink_that_fell_behind_is_filled_again(workplace: Any) -> None:
    import shutil

    cold, _ = run(workplace, "--engine", "local")
    shutil.rmtree(Path(workplace.warehouse) / "recommendations")
    filled, _ = run(workplace, "--engine", "local")
    assert filled["sinks"]["delta"]["status"] == "published"
    assert filled["sinks"]["delta"]["rows"] == cold["sinks"]["delta"]["rows"]
    assert run(workplace, "--engine", "local")[1] == []
