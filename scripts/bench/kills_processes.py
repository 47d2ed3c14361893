"""Spark drivers of `scripts/bench/kills_run.py`, and which processes below them are executors and Python workers.

Looks only below a process that was started here, so that nothing else can be killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common

_SPARK = (
    Path(sys.prefix)
    / "lib"
    / f"python{sys.version_info.major}.{sys.version_info.minor}"
    / "site-packages/pyspark"
)
_PATIENCE_S = 240.0


class Driver:
    """A driver that runs what it is told to. `folder`: where its log and its executors' folders go."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        own = folder / f"driver-{time.monotonic_ns()}"
        home = own / "spark"  # executors of a local-cluster have their folders below it
        home.mkdir(parents=True)
        for path in _SPARK.iterdir():
            if path.name != "work":
                (home / path.name).symlink_to(path)
        env = {
            **_common.ENVIRONMENT,
            "PYTHONPATH": f"{_common.ROOT}:{Path(__file__).parent}",
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_HOME": str(home),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        self.log = own / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "kills_run.py"), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
            )
        self._said = b""
        self._must_say()

    def begin(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def says(self) -> dict[str, Any] | None:
        """What it says next; None where it ended."""
        assert self.process.stdout is not None
        stop = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._said:
            if not self.has_said(within_s=max(0.0, stop - time.monotonic())):
                sys.exit(f"a driver said nothing for {_PATIENCE_S} s:\n{self.log.read_text()[-4000:]}")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                return None
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def has_said(self, *, within_s: float) -> bool:
        """Whether there is something that `says` would tell, or the driver has ended."""
        return bool(self._said or select.select([self.process.stdout], [], [], within_s)[0])

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.begin(job)
        return self._must_say()

    def _must_say(self) -> dict[str, Any]:
        said = self.says()
        if said is None:
            sys.exit(f"a driver ended by itself:\n{self.log.read_text()[-4000:]}")
        return said

    def close(self) -> int:
        """Ends it; how many of its processes outlived it, and were killed."""
        children = below(self.process.pid)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        return end(children, patience_s=20)


@dataclass(frozen=True)
class Process:
    """`start` tells it from a later process of the same number."""

    pid: int
    parent: int
    start: str
    command: str

    def is_running(self) -> bool:
        now = _read(self.pid)
        return now is not None and now.start == self.start

    def kill(self) -> None:
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)


def below(pid: int) -> list[Process]:
    """All descendants of a process."""
    every = [_read(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]
    processes = [process for process in every if process is not None]
    found: list[Process] = []
    parents = {pid}
    while parents:
        own = [process for process in processes if process.parent in parents]
        found += own
        parents = {process.pid for process in own}
    return found


def jvm(pid: int) -> list[Process]:
    """The driver's JVM."""
    return [process for process in below(pid) if process.parent == pid and "SparkSubmit" in process.command]


def executors(pid: int) -> list[Process]:
    return [process for process in below(pid) if "CoarseGrainedExecutorBackend" in process.command]


def python_workers(pid: int) -> list[Process]:
    """Those that run tasks; each is a child of a daemon of the same command."""
    daemons = [process for process in below(pid) if "pyspark.daemon" in process.command]
    parents = {process.pid for process in daemons}
    return [process for process in daemons if process.parent in parents]


def end(processes: Iterable[Process], *, patience_s: float) -> int:
    """Waits until they have ended by themselves; kills what has not, and says how many that were."""
    left, stop = list(processes), time.monotonic() + patience_s
    while left and time.monotonic() < stop:
        time.sleep(0.05)
        left = [process for process in left if process.is_running()]
    for process in left:
        process.kill()
    return len(left)


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it has ended
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else Process(pid, int(fields[1]), fields[19], command)
