"""The set-up scripts: what they say when Python or Java is missing or old, and what they promise of Spark."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "dirname", "env", "cat")


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts in a folder without `.venv`."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: the shell's tools, no Python, no Java."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return folder


def setup(clone: Path, programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(programs), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [clone / "scripts/setup"], env=env, cwd="/", capture_output=True, text=True, check=False
    )


def test_no_python(clone: Path, programs: Path) -> None:
    done = setup(clone, programs)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Python 3.11 or newer" in done.stderr
    assert "none on PATH" in done.stderr
    assert "apt-get install python3.11" in done.stderr


def test_old_python_and_an_empty_shim(clone: Path, programs: Path) -> None:
    old = f'exec {sys.executable} -c "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])" "$2"'
    script(programs / "python3", old)
    script(programs / "python3.12", "exit 127")
    done = setup(clone, programs)
    assert done.returncode == 2
    assert f"{programs}/python3 (Python 3.9)" in done.stderr
    assert f"{programs}/python3.12 (does not run)" in done.stderr


@pytest.mark.parametrize(
    ("java", "home", "said"),
    [
        (None, None, "Found none: JAVA_HOME is not set, and PATH has no java"),
        ("echo 'openjdk version \"1.8.0_392\"' >&2", None, "1.8.0_392"),
        ("echo 'openjdk version \"11.0.21\" 2023-10-17' >&2", None, "11.0.21"),
        ("exit 1", None, "does not run"),
        (None, "/nowhere", "JAVA_HOME is '/nowhere'"),
    ],
)
def test_java_is_missing_or_old(
    clone: Path, programs: Path, java: str | None, home: str | None, said: str
) -> None:
    script(programs / "python3.11", f'exec {sys.executable} "$@"')
    if java is not None:
        script(programs / "java", java)
    done = setup(clone, programs, **({"JAVA_HOME": home} if home else {}))
    assert done.returncode == 2
    assert "Java 17 or newer is needed" in done.stderr
    assert said in done.stderr
    assert "apt-get install openjdk-17" in done.stderr
    assert not (clone / ".venv").exists()


def test_demo_refuses_a_number_that_is_none() -> None:
    done = subprocess.run([ROOT / "scripts/demo", "many"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'many'" in done.stderr


def test_lock_names_no_index_and_has_a_hash_for_everything() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index-url" not in text
    requirements = re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    assert len(requirements) > 50
    assert all(re.match(r"[\w.-]+==[\w.+]+ .*--hash=sha256:", line) for line in requirements)


def test_jars_are_those_of_the_pinned_versions() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import setup_spark
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = dict(pin.split("==") for pin in extras["spark"])
    spark_line = pins["pyspark"].rpartition(".")[0]
    assert f"io.delta:delta-spark_{spark_line}_2.13:{pins['delta-spark']}" == setup_spark.DELTA
    assert all(name.endswith(f"-{pins['delta-spark']}.jar") for name in setup_spark.JARS)


def test_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "featurekit_spark/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"featurekit_spark", "featurekit_spark-0.1.0.dist-info"}


JOB = """
import sys
import pandas as pd
from pyspark.sql import SparkSession, functions as F

spark = SparkSession.builder.config("spark.sql.shuffle.partitions", 1).getOrCreate()


@F.pandas_udf("string")
def python(values: pd.Series) -> pd.Series:
    return pd.Series([sys.executable] * len(values))


spark.range(2).select(python("id").alias("python")).write.format("delta").save(sys.argv[1])
print(sys.executable, *(row.python for row in spark.read.format("delta").load(sys.argv[1]).collect()))
spark.stop()
"""


@pytest.mark.jobs
@pytest.mark.spark
@pytest.mark.slow
def test_spark_submit_needs_no_flags(tmp_path: Path) -> None:
    """From another folder, with `.venv` not activated, and nothing but results on stdout."""
    job = tmp_path / "job.py"
    job.write_text(JOB)
    bin_folder = ROOT / ".venv" / "bin"
    outside = [part for part in os.environ["PATH"].split(":") if Path(part) != bin_folder]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [bin_folder / "spark-submit", job, tmp_path / "table"],
        env={**env, "PATH": ":".join(outside)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    python = str(bin_folder / "python")
    assert done.stdout.split() == [python] * 3
    # Spark needs an incubating module, and the JVM says so; nothing else should be said.
    assert done.stderr.strip() in {"", "WARNING: Using incubator modules: jdk.incubator.vector"}
