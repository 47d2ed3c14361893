"""What is said of machines that lack something, and of ones whose parts do not fit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from featurekit_spark.doctor import Status, machine
from featurekit_spark.doctor.base import Check, worst

ROOT = Path(__file__).resolve().parents[3]
GOOD = {"pyspark": "4.1.1", "delta-spark": "4.3.1", "deltalake": "1.6.6"}
JAR = "delta-spark_4.1_2.13-4.3.1.jar"


def said(check: Check) -> str:
    return f"{check.status}: {check.found} {check.advice}"


def test_python() -> None:
    assert machine.python().status is Status.OK
    assert machine.python((3, 12, 0)).found.startswith("3.12.0")
    old = machine.python((3, 10, 4))
    assert old.status is Status.FAIL and "3.11 or newer" in old.advice


def java_that_says(folder: Path, script: str) -> dict[str, str]:
    (folder / "bin").mkdir()
    program = folder / "bin" / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"JAVA_HOME": str(folder)}


@pytest.mark.parametrize(
    ("script", "status", "found"),
    [
        ("echo 'openjdk version \"21.0.2\" 2024-01-16' >&2", "ok", '"21.0.2"'),
        (
            "echo 'Picked up JAVA_TOOL_OPTIONS: -Xmx1g' >&2; echo 'openjdk version \"17.0.1\"' >&2",
            "ok",
            'openjdk version "17.0.1" at',
        ),
        ("echo 'java version \"1.8.0_392\"' >&2", "fail", "1.8.0_392"),
        ("exit 3", "fail", "does not run"),
    ],
)
def test_java(tmp_path: Path, script: str, status: str, found: str) -> None:
    environ = java_that_says(tmp_path, script)
    check = machine.java(environ)
    assert check.status == status and found in check.found and str(tmp_path) in check.found
    if status == "fail":
        assert "--engine local" in check.advice
        assert machine.java(environ, needed=False).status is Status.WARN


def test_no_java(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path)}
    assert "PATH has no java" in machine.java(nowhere).found
    assert machine.java(nowhere).status is Status.FAIL
    assert machine.java(nowhere, needed=False).status is Status.OK


def test_packages() -> None:
    assert machine.packages(machine.installed()).status is Status.OK
    assert machine.packages(GOOD).status is Status.OK
    assert "pip install 'featurekit-spark[spark]'" in said(machine.packages({"deltalake": "1.6.6"}))
    assert machine.packages({"deltalake": "1.6.6"}, spark_needed=False).status is Status.OK
    other = machine.packages({**GOOD, "deltalake": "1.7.0"})
    assert other.status is Status.WARN and "deltalake 1.6.*" in other.advice


def test_the_line_of_deltalake_is_the_one_that_is_required() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (line,) = [text for text in required if re.match("deltalake", text)]
    assert line.startswith(f"deltalake>={machine.DELTALAKE},")


def spark(folder: Path, *, conf: str = "", jars: tuple[str, ...] = ()) -> Path:
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "jars").mkdir(exist_ok=True)
    (folder / "conf" / "spark-defaults.conf").write_text(conf)
    for name in jars:
        (folder / "jars" / name).write_bytes(b"")
    return folder


def test_spark_defaults_are_read_as_spark_does(tmp_path: Path) -> None:
    home = spark(tmp_path, conf="# a comment\n\nspark.a   b c\nspark.d=e\nspark.f\tg\nspark.alone\n")
    assert machine.spark_conf(home, {}) == {"spark.a": "b c", "spark.d": "e", "spark.f": "g"}
    assert machine.spark_conf(home, {"SPARK_CONF_DIR": str(tmp_path / "other")}) == {}


@pytest.mark.parametrize(
    ("jars", "versions", "status", "found"),
    [
        ((JAR,), GOOD, "ok", JAR),
        ((), GOOD, "fail", "none on the classpath"),
        (("delta-spark_2.13-4.3.1.jar",), GOOD, "ok", "delta-spark_2.13"),
        ((JAR,), {**GOOD, "pyspark": "4.0.1"}, "fail", "made for Spark 4.1, but pyspark is 4.0.1"),
        ((JAR,), {**GOOD, "delta-spark": "4.2.0"}, "fail", "Delta 4.3.1, but delta-spark is 4.2.0"),
        ((JAR, "delta-spark_4.1_2.13-4.2.0.jar"), GOOD, "fail", "several"),
        ((JAR,), {}, "ok", JAR),
    ],
)
def test_jars(
    tmp_path: Path, jars: tuple[str, ...], versions: dict[str, str], status: str, found: str
) -> None:
    check = machine.jars(spark(tmp_path, jars=jars), {}, versions)
    assert (check.status, found in check.found) == (status, True), said(check)


def test_jars_of_the_classpath(tmp_path: Path) -> None:
    home, elsewhere = spark(tmp_path), tmp_path / "share" / JAR
    conf = {"spark.driver.extraClassPath": f"/x/delta-storage-4.3.1.jar:{elsewhere}:{home}/jars/*"}
    assert machine.jars(home, conf, GOOD).found == f"missing: {elsewhere}"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"")
    assert machine.jars(home, conf, GOOD).status is Status.OK
    slow = machine.jars(home, {"spark.jars.packages": "io.delta:delta-spark_4.1_2.13:4.3.1"}, GOOD)
    assert slow.status is Status.WARN and "at every start" in slow.found


def test_the_archive_of_classes(tmp_path: Path) -> None:
    assert "names none" in machine.archive({}).found
    path = tmp_path / "classes.jsa"
    conf = {"spark.driver.extraJavaOptions": f"-XX:+Some -XX:SharedArchiveFile={path} -Xshare:auto"}
    assert machine.archive(conf).status is Status.WARN
    path.write_bytes(bytes(3 << 20))
    assert machine.archive(conf).found == f"{path}, 3 MB"


def test_another_spark_is_told(tmp_path: Path) -> None:
    assert machine.spark_environment({"PATH": "x"}).status is Status.OK
    check = machine.spark_environment({"SPARK_HOME": "/opt/spark", "PYSPARK_PYTHON": "python3"})
    assert check.status is Status.WARN and check.found == "SPARK_HOME=/opt/spark, PYSPARK_PYTHON=python3"
    assert machine.spark_home({"SPARK_HOME": "/opt/spark"}) == Path("/opt/spark")


def test_the_worst_counts() -> None:
    checks = [Check("a", Status.OK, ""), Check("b", Status.FAIL, ""), Check("c", Status.WARN, "")]
    assert worst(checks) is Status.FAIL and worst(checks[::2]) is Status.WARN and worst([]) is Status.OK


@pytest.mark.spark
@pytest.mark.slow
def test_spark_starts() -> None:
    check = machine.spark_starts()
    assert check.status is Status.OK and "Spark 4" in check.found, said(check)


def test_a_spark_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_SMALL_JOB", "import sys; sys.exit('no JVM today')")
    check = machine.spark_starts()
    assert check.status is Status.FAIL and "no JVM today" in check.found
    monkeypatch.setattr(machine, "_SMALL_JOB", "import time; time.sleep(60)")
    assert "no end after 0.2 s" in machine.spark_starts(0.2).found
