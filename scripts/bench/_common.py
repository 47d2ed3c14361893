"""What the measuring scripts share: whole processes timed, a model server that counts, stored states, and medians.

Knows how the library's programs are started, not what is measured with them. Its own process stays small and imports
nothing of the library: a child's peak memory is never reported below that of its parent.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / ".venv/bin"
SUBMIT = BIN / "spark-submit"
KEY_VARIABLE = "FEATUREKIT_BENCH_KEY"

_UNWANTED = {
    "omp_num_threads",
    "openblas_num_threads",
    "pythonpath",
    "spark_home",
    "spark_conf_dir",
    "http_proxy",
    "https_proxy",
    "all_proxy",
}
# Threads of linear algebra are left to each program: Spark itself gives its workers one each.
ENVIRONMENT = {
    **{name: text for name, text in os.environ.items() if name.lower() not in _UNWANTED},
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    KEY_VARIABLE: "any",
}


def use_venv() -> None:
    """Starts the running script again with the environment's Python, where another one runs it."""
    python = BIN / "python"
    if python.exists() and Path(sys.prefix) != ROOT / ".venv":
        os.execv(python, [str(python), *sys.argv])


@dataclass(frozen=True)
class Ran:
    """A process that succeeded: wall seconds, peak memory of its largest process in MB (10^6 bytes), and stdout."""

    seconds: float
    peak_mb: float
    out: str

    @property
    def report(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def timed(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    codes: Iterable[int] = (0,),
) -> Ran:
    """Runs a command to its end; one that fails ends this program, and says how it failed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command), env={**ENVIRONMENT, **(env or {})}, cwd=cwd, stdout=out, stderr=err, text=True
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    if process.returncode not in codes:
        sys.exit(
            f"{' '.join(command)}\nended with {process.returncode}:\n{said[0][-2000:]}\n{said[1][-4000:]}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return Ran(seconds, usage.ru_maxrss * unit / 1e6, said[0])


class CountingModel:
    """The stand-in model behind the OpenAI protocol, in a process of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    @property
    def settings(self) -> dict[str, Any]:
        """The section `llm` of the settings of a run that asks it."""
        return {"provider": "openai", "model": "stand-in", "base_url": self.url, "api_key_env": KEY_VARIABLE}

    def requests(self) -> int:
        """Requests so far, counted where they arrive."""
        with self._open(self.url, timeout=30) as answer:
            return int(json.load(answer)["requests"])


@contextmanager
def counting_model() -> Iterator[CountingModel]:
    """A model server without latency, running until the block ends."""
    command = [str(BIN / "python"), "-m", "featurekit_spark.testing.chat"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=ROOT, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield CountingModel(server.stdout.readline().strip())
        finally:
            server.stdin.close()
            server.wait(timeout=30)


def sample_catalog(folder: Path, *, merchant: str, products: int, seed: int = 7) -> Path:
    """A sample catalog of a merchant in the US, written by a process of its own."""
    command = [str(BIN / "python"), "-m", "featurekit_spark.testing.samples", str(folder)]
    options = {"merchant": merchant, "products": products, "seed": seed}
    timed(
        [*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], cwd=ROOT
    )
    return folder / f"{merchant}_US.csv"


class Catalogs:
    """Sample catalogs that are edited and put back: `path` points to the folder that counts now.

    A catalog's version covers the times of its file, which no copy keeps: going back means pointing back.
    """

    def __init__(self, folder: Path, merchants: Mapping[str, int]) -> None:
        self.path = folder / "catalogs"
        self._folder, self._pristine, self._edits = folder, folder / "catalogs.0", 0
        for seed, (merchant, products) in enumerate(merchants.items(), start=7):
            sample_catalog(self._pristine, merchant=merchant, products=products, seed=seed)
        self.reset()

    def reset(self) -> None:
        """The very files that were written first."""
        self._point_to(self._pristine)

    def edit(self, edit: Callable[[Path], object] = lambda path: None) -> None:
        """The first catalogs written anew, that of demo edited."""
        self._edits += 1
        fresh = self._folder / f"catalogs.{self._edits}"
        fresh.mkdir()
        for path in self._pristine.iterdir():
            shutil.copyfile(path, fresh / path.name)
        edit(fresh / "demo_US.csv")
        self._point_to(fresh)

    def _point_to(self, catalogs: Path) -> None:
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(catalogs.name)


def replace_folder(source: Path, target: Path) -> None:
    """`target` becomes a copy of the folder `source`, times of files included; an empty one where there is none."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.mkdir(parents=True)


def recommendations(warehouse: Path) -> dict[str, list[str]]:
    """product_id -> recommended ids, as published."""
    from deltalake import DeltaTable, QueryBuilder

    query = QueryBuilder().register("recs", DeltaTable(str(warehouse / "recommendations")))
    rows = query.execute("select product_id, recs from recs").read_all().to_struct_array().to_pylist()
    return {row["product_id"]: row["recs"] for row in rows}


def median(values: Iterable[float], digits: int = 2) -> float:
    """The median, rounded."""
    return round(statistics.median(values), digits)


def chosen(parser: Any, text: str | None, known: Sequence[str], what: str) -> list[str]:
    """The comma-separated names of an option, in the order of `known`; all of them where it is not given."""
    names = list(known) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
    return [name for name in known if name in names]


def machine() -> str:
    """What the figures were taken on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
