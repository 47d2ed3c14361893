"""Jobs as their users start them: a real spark-submit in a process of its own, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs" / "run_logic.py"


@dataclass(frozen=True)
class Ran:
    """What a process left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The object in the last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def counts(self) -> dict[str, dict[str, Any]]:
        return dict(self.summary["builders"])

    @property
    def computed(self) -> int:
        return sum(counts["computed"] + counts["error"] for counts in self.counts.values())


@dataclass(frozen=True)
class Submitter:
    """Starts the main job with spark-submit, in the folder `home`."""

    home: Path

    def command(self, *options: str) -> list[str]:
        program = Path(sys.executable).parent / "spark-submit"
        # Two cores whatever the machine has, and no page that nobody looks at.
        spark = ["--master", "local[2]", "--conf", "spark.ui.enabled=false"]
        spark += ["--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.driver.bindAddress=127.0.0.1"]
        return [str(program), *spark, str(JOB), *options]

    def environ(self, **more: str) -> dict[str, str]:
        unwanted = ("PYTHONPATH", "SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_DRIVER_PYTHON")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **more}

    def featurekit(self, *options: str) -> list[str]:
        """The same run by `featurekit run` and without a JVM."""
        return [str(Path(sys.executable).parent / "featurekit"), "run", "--engine", "local", *options]

    def start(self, command: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The process, running; for a test that does something to it."""
        return subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environ(**(env or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str, env: Mapping[str, str] | None = None) -> Ran:
        return self.ended(self.command(*options), env)

    def ended(self, command: list[str], env: Mapping[str, str] | None = None) -> Ran:
        """What a command left once it came to its end."""
        with self.start(command, env) as process:
            out, err = process.communicate(timeout=300)
        return Ran(process.returncode, out, err)


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Submitter:
    return Submitter(tmp_path_factory.mktemp("elsewhere"))
