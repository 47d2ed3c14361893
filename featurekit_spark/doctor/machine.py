"""Checks of what is installed: Python, Java, packages that belong together, Delta's jars, the archive of classes.

Reads files and runs `java -version`; starts a Spark session only in `spark_starts`. Environment and versions are
passed in, so that a test can tell any machine's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from featurekit_spark.doctor.base import Check, fail, ok, warn

__all__ = [
    "archive",
    "installed",
    "jars",
    "java",
    "packages",
    "python",
    "spark_conf",
    "spark_environment",
    "spark_home",
    "spark_starts",
]

JAVA_NEEDED = 17
DELTALAKE = "1.6"  # the line that was tried with Delta on Spark, as pyproject.toml says

_PACKAGES = ("pyspark", "delta-spark", "deltalake", "pyarrow", "pandas", "numpy")
_DELTA_JAR = re.compile(r"delta-spark_(?:(\d+\.\d+)_)?2\.\d+-(\d[\w.]*)\.jar$")
# Each of these takes the place of what scripts/setup wrote.
_OTHER_SPARK = ("SPARK_HOME", "SPARK_CONF_DIR", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON")
_SMALL_JOB = """
import sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.appName("featurekit doctor").getOrCreate()
spark.range(3).write.format("delta").save(sys.argv[1])
print("rows:", spark.read.format("delta").load(sys.argv[1]).count(), spark.version)
spark.stop()
"""


def python(found: Sequence[int] = tuple(sys.version_info[:3])) -> Check:
    """Python 3.11 or newer."""
    text = ".".join(map(str, found))
    if tuple(found[:2]) < (3, 11):
        return fail("python", text, "Install Python 3.11 or newer.")
    return ok("python", f"{text} at {sys.executable}")


def java(environ: Mapping[str, str], *, needed: bool = True) -> Check:
    """The Java that Spark would start: JAVA_HOME's if set, else the one on PATH."""
    home = environ.get("JAVA_HOME")
    program = str(Path(home) / "bin" / "java") if home else shutil.which("java", path=environ.get("PATH"))
    source = f"JAVA_HOME is {home!r}" if home else "JAVA_HOME is not set"
    advice = (
        f"Install Java {JAVA_NEEDED} or newer (apt-get install openjdk-17-jre-headless), or set JAVA_HOME to one; "
        "the local engine (--engine local) needs none."
    )
    if program is None:
        found = f"none: {source}, and PATH has no java"
        return fail("java", found, advice) if needed else ok("java", f"{found}; engine.kind local needs none")
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return (fail if needed else warn)("java", f"{program!r} does not run ({source}): {error}", advice)
    text = (done.stderr + done.stdout).strip()
    # A JVM that is given options by variables says so before its version.
    said = next((line for line in text.splitlines() if "version" in line), text.partition("\n")[0])
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    if match is None or int(match[1]) < JAVA_NEEDED:
        return (fail if needed else warn)("java", f"{said} at {program} ({source})", advice)
    return ok("java", f"{said} at {program} ({source})")


def installed() -> dict[str, str]:
    """Versions of the packages that have to fit one another."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def packages(versions: Mapping[str, str], *, spark_needed: bool = True) -> Check:
    """Versions that were tried together."""
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    if "pyspark" not in versions and spark_needed:
        return fail(
            "packages",
            f"no pyspark; {told}",
            "pip install 'featurekit-spark[spark]', or choose --engine local.",
        )
    if not versions.get("deltalake", DELTALAKE).startswith(f"{DELTALAKE}."):
        return warn(
            "packages",
            told,
            f"Use deltalake {DELTALAKE}.*: only that line was tried to write the same tables as Delta on Spark.",
        )
    return ok("packages", told)


def spark_home(environ: Mapping[str, str]) -> Path | None:
    """The Spark that a session started from here would be."""
    if environ.get("SPARK_HOME"):
        return Path(environ["SPARK_HOME"])
    found = find_spec("pyspark")
    return Path(found.origin).parent if found is not None and found.origin else None


def spark_conf(home: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """spark-defaults.conf of a Spark, or of SPARK_CONF_DIR; empty where there is none."""
    path = Path(environ.get("SPARK_CONF_DIR") or home / "conf") / "spark-defaults.conf"
    if not path.is_file():
        return {}
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (re.split(r"[\s=]+", line, maxsplit=1) for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[-1] for pair in pairs if len(pair) == 2}


def spark_environment(environ: Mapping[str, str]) -> Check:
    """Variables that put another Spark, other settings or another Python in the place of the environment's."""
    found = [f"{name}={environ[name]}" for name in _OTHER_SPARK if environ.get(name)]
    if found:
        return warn(
            "spark environment",
            ", ".join(found),
            "Unset these, unless they are meant: they win over what scripts/setup wrote.",
        )
    return ok("spark environment", "no variable puts another Spark in place of this one")


def jars(home: Path, conf: Mapping[str, str], versions: Mapping[str, str]) -> Check:
    """Delta's jars: there, and of the versions of the Python packages."""
    named = conf.get("spark.driver.extraClassPath", "").split(":")
    paths = [Path(text) for text in named if _DELTA_JAR.search(text)]
    paths += [path for path in (home / "jars").glob("delta-spark_*.jar") if path not in paths]
    setup = "Run scripts/setup; on a cluster, install the Delta that belongs to its Spark."
    if not paths:
        if "io.delta" in conf.get("spark.jars.packages", ""):
            return warn(
                "delta jars",
                f"resolved at every start: {conf['spark.jars.packages']}",
                "Put the jars on the classpath (scripts/setup does): starts are seconds quicker.",
            )
        return fail("delta jars", f"none on the classpath of {home} or in {home / 'jars'}", setup)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        return fail("delta jars", f"missing: {', '.join(missing)}", setup)
    if len(paths) > 1:
        return fail("delta jars", f"several: {', '.join(map(str, paths))}", "Keep one of them.")
    match = _DELTA_JAR.search(paths[0].name)
    assert match is not None  # it was chosen so
    for_spark, delta = match.groups()
    wrong = []
    pyspark = versions.get("pyspark", "")
    if for_spark is not None and pyspark and not pyspark.startswith(f"{for_spark}."):
        wrong.append(f"made for Spark {for_spark}, but pyspark is {pyspark}")
    if versions.get("delta-spark", delta) != delta:
        wrong.append(f"Delta {delta}, but delta-spark is {versions['delta-spark']}")
    if wrong:
        return fail("delta jars", f"{paths[0].name}: {'; '.join(wrong)}", setup)
    return ok("delta jars", f"{paths[0].name} in {paths[0].parent}")


def archive(conf: Mapping[str, str]) -> Check:
    """The archive of loaded classes (AppCDS), which saves seconds at each start."""
    match = re.search(r"-XX:SharedArchiveFile=(\S+)", conf.get("spark.driver.extraJavaOptions", ""))
    advice = "Run scripts/setup to have one made: Spark starts some seconds quicker with it."
    if match is None:
        return warn("class archive", "spark-defaults.conf names none", advice)
    path = Path(match[1])
    if not path.is_file():
        return warn("class archive", f"{path} is missing", advice)
    return ok("class archive", f"{path}, {path.stat().st_size >> 20} MB")


def spark_starts(timeout_s: float = 180.0) -> Check:
    """A session in a process of its own writes and reads a small Delta table."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _SMALL_JOB, f"{folder}/table"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return fail(
                "spark starts",
                f"no end after {timeout_s:g} s",
                "Look for a proxy or a resource manager that the session waits for; see spark-defaults.conf.",
            )
    if done.returncode != 0 or "rows: 3" not in done.stdout:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "nothing"
        return fail(
            "spark starts",
            f"the small job ended with {done.returncode} and said: {said[:300]}",
            "Look at java and delta jars above; then run scripts/setup again.",
        )
    number = done.stdout.rpartition("rows: 3")[2].strip()
    return ok(
        "spark starts", f"Spark {number} wrote and read a Delta table in {time.monotonic() - started:.1f} s"
    )
