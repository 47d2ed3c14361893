"""Makes the Spark of a virtual environment start with Delta, from any folder, without flags, and quickly.

Owns Delta's jars, `spark-defaults.conf`, `log4j2.properties` and the archive of loaded classes (AppCDS). Jars
are resolved once, through Ivy as Spark does, and checked against the hashes below; later starts read them
from disk. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

DELTA = "io.delta:delta-spark_4.1_2.13:4.3.1"

# Delta's other dependencies come with Spark itself, mostly in newer versions that must not be shadowed on the
# classpath (RoaringBitmap is one). Hadoop alone would be 50 MB.
NOT_NEEDED = "com.*:*,commons-*:*,io.airlift:*,io.unitycatalog:*,javax.*:*,org.*:*"

JARS = {
    "delta-kernel-api-4.3.1.jar": "b081b818d6f5686c7d6406588af72c9f8baf6765a41ada8197364aef90a260e8",
    "delta-kernel-defaults-4.3.1.jar": "27471cca7dd7a36289af2c8d52d2babb37e9e5a13cdaaea76730120f4c72e62f",
    "delta-kernel-unitycatalog-4.3.1.jar": "a288342b7e53da34a608a1a227c8109aa4681fcb582da499ed19347f2193362b",
    "delta-spark_4.1_2.13-4.3.1.jar": "ebf35a4383f0a653c3ee3c7882c0edcac2f846be31ac61af4b96ccfaaf36c171",
    "delta-storage-4.3.1.jar": "577c12c7e371be4c041714fb48e88ad86e3c3512beea2bdaffbe7a4debf79718",
}

DEFAULTS = """\
# Written by scripts/setup. A cluster that brings its own Spark brings its own settings.
spark.sql.extensions               io.delta.sql.DeltaSparkSessionExtension
spark.sql.catalog.spark_catalog    org.apache.spark.sql.delta.catalog.DeltaCatalog

# Spark's own jars are named here too, so that they come before the conf folder that Spark puts behind these:
# an archive of loaded classes can't be made or used behind a folder that has files in it.
spark.driver.extraClassPath        {delta}:{spark_jars}
spark.executor.extraClassPath      {delta}

# Driver and workers run this environment's Python, activated or not.
spark.pyspark.python               {python}
spark.pyspark.driver.python        {python}

# TieredStopAtLevel=1 is meant for local masters: their jobs end before the optimising compiler pays off.
# A driver that lives for hours overrides it (--driver-java-options). Without the archive, or with another
# Java than it was made with, the JVM starts as usual; -Xlog keeps it from saying so on stdout.
spark.driver.extraJavaOptions      {java_options}

# For one machine and tables of up to some millions of rows; the defaults (200 and 50) are for clusters, and here
# they are mostly empty tasks.
spark.sql.shuffle.partitions       8
spark.databricks.delta.snapshotPartitions  2

spark.ui.showConsoleProgress       false
"""

# One tier of compilation reserves 48 MB for code, which a job of many stages fills; then it runs uncompiled.
JAVA_OPTIONS = (
    "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m "
    "-XX:SharedArchiveFile={archive} -Xshare:auto {quiet}"
)
QUIET = "-Xlog:disable -Xlog:all=error:stderr"

LOGGING = """\
# Written by scripts/setup: warnings and worse, on stderr; stdout belongs to results.
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{yyyy-MM-dd HH:mm:ss} %p %c{1}: %m%n%ex

# Said at every start on any machine, with nothing that anybody should do about it.
appender.console.filter.hints.type = RegexFilter
appender.console.filter.hints.regex = \
.*(resolves to a loopback address|Set SPARK_LOCAL_IP|Unable to load native-hadoop|Truncated the string rep).*
appender.console.filter.hints.onMatch = DENY
appender.console.filter.hints.onMismatch = NEUTRAL
"""

# pip's own version asks whichever python3 is first on PATH, which finds no Spark unless .venv is activated.
FIND_SPARK_HOME = """\
#!/usr/bin/env bash
# Written by scripts/setup; sourced by spark-submit and its kin. A SPARK_HOME that is set stays.
export SPARK_HOME="${{SPARK_HOME:-{spark_home}}}"
"""


class SparkSetupError(Exception):
    """Spark could not be prepared; the message says what failed and what to do."""


def prepare(venv: Path, *, java: str, say: Callable[[str], None]) -> bool:
    """Jars, settings and archive for the Spark in `venv`; False if all are there, made for this `java`."""
    stamp_file = venv / "setup-spark.stamp"
    spark_home = find_spark(venv)
    jars = venv / "share" / "jars-delta"
    archive = venv / "share" / "spark-classes.jsa"
    settings = settings_files(venv, spark_home=spark_home, jars=jars, archive=archive)
    parts = [
        java,
        DELTA,
        JARS,
        {str(k): v for k, v in settings.items()},
        sorted(path.name for path in (spark_home / "jars").iterdir()),
    ]
    stamp = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    in_place = all(path.is_file() and path.read_text() == text for path, text in settings.items())
    if in_place and stamp_file.is_file() and stamp_file.read_text() == stamp:
        return False

    stamp_file.unlink(missing_ok=True)
    if not all((jars / name).is_file() and sha256(jars / name) == digest for name, digest in JARS.items()):
        say(f"fetching Delta's jars ({DELTA})")
        fetch_jars(spark_home, into=jars)
    for path, text in settings.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (venv / "bin" / "find-spark-home").chmod(0o755)
    say("starting Spark once, to keep its loaded classes for quicker starts")
    make_archive(spark_home, archive=archive, say=say)
    stamp_file.write_text(stamp)
    return True


def find_spark(venv: Path) -> Path:
    for home in venv.glob("lib/python3*/site-packages/pyspark"):
        if (home / "bin" / "spark-submit").is_file():
            return home
    raise SparkSetupError(
        f"no pyspark in {venv}; remove {venv / 'setup-packages.stamp'} and run scripts/setup again"
    )


def settings_files(venv: Path, *, spark_home: Path, jars: Path, archive: Path) -> dict[Path, str]:
    """Path to text of every settings file. Nothing in them depends on where a job is started."""
    java_options = JAVA_OPTIONS.format(archive=archive, quiet=QUIET)
    defaults = DEFAULTS.format(
        delta=":".join(str(jars / name) for name in sorted(JARS)),
        spark_jars=spark_home / "jars" / "*",
        python=venv / "bin" / "python",
        java_options=java_options,
    )
    return {
        spark_home / "conf" / "spark-defaults.conf": defaults,
        spark_home / "conf" / "log4j2.properties": LOGGING,
        venv / "bin" / "find-spark-home": FIND_SPARK_HOME.format(spark_home=spark_home),
    }


def fetch_jars(spark_home: Path, *, into: Path) -> None:
    """Resolves DELTA as spark-submit's --packages does, checks the hashes, replaces the folder `into`."""
    with tempfile.TemporaryDirectory() as folder:
        ivy = Path(folder) / "ivy"
        script = Path(folder) / "nothing.py"
        script.write_text("")
        done = submit(
            spark_home,
            *("--packages", DELTA, "--exclude-packages", NOT_NEEDED, "--conf", f"spark.jars.ivy={ivy}"),
            str(script),
            cwd=folder,
        )
        fetched = {path.name.partition("_")[2]: path for path in ivy.glob("jars/io.delta_*.jar")}
        if done.returncode != 0 or not fetched:
            raise SparkSetupError(
                f"{DELTA} could not be fetched, spark-submit ended with {done.returncode}:\n"
                f"{tail(done.stderr)}\n"
                "  Set-up needs Maven Central, or the mirror that Ivy is told of. Run scripts/setup again."
            )
        found = {name: sha256(path) for name, path in fetched.items()}
        if found != JARS:
            raise SparkSetupError(
                f"Delta's jars are not those of scripts/setup_spark.py.\n  listed: {JARS}\n  found: {found}\n"
                "  Check where they come from. After a change of version, list the new hashes there."
            )
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for name, path in fetched.items():
            shutil.copyfile(path, into / name)


def make_archive(spark_home: Path, *, archive: Path, say: Callable[[str], None]) -> None:
    """Runs a small job and keeps the classes that it loaded. Spark works without them, only slower."""
    archive.unlink(missing_ok=True)
    # Written under another name first: half an archive would crash every start.
    part = archive.with_suffix(".part")
    with tempfile.TemporaryDirectory() as folder:
        done = submit(
            spark_home,
            "--driver-java-options",
            f"-XX:TieredStopAtLevel=1 -XX:ArchiveClassesAtExit={part} {QUIET}",
            *(str(Path(__file__).with_name("setup_warm_up.py")), folder),
            cwd=folder,
        )
    if done.returncode != 0:
        archive.unlink(missing_ok=True)
        raise SparkSetupError(
            f"Spark's first job ended with {done.returncode}:\n{tail(done.stdout + done.stderr)}"
        )
    if part.is_file():
        part.replace(archive)
    else:
        say("this Java keeps no archive of classes; Spark will start a few seconds slower")


def submit(spark_home: Path, *arguments: str, cwd: str) -> subprocess.CompletedProcess[str]:
    # Another Spark's home, settings or submit arguments in the environment are not this one's.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_", "PYTHONPATH"))
    }
    environment["PYSPARK_PYTHON"] = str(spark_home.parents[3] / "bin" / "python")
    local = ["--master", "local[2]", "--conf", "spark.ui.enabled=false"]
    command = [str(spark_home / "bin" / "spark-submit"), *local, *arguments]
    environment["SPARK_HOME"] = str(spark_home)
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tail(text: str, lines: int = 20) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines()[-lines:])
