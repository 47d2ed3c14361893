"""Set-up after a Python was found: checks Java, makes `.venv`, installs from the lock, prepares Spark.

Standard library only, because it runs before anything is installed. What was done is kept as a stamp inside
`.venv`, so that a run with nothing to do costs a fraction of a second. Progress goes to stderr.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import setup_spark

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
STAMP = VENV / "setup-packages.stamp"
JAVA_NEEDED = 17
NEED_JAVA = f"Java {JAVA_NEEDED} or newer is needed."

HOW_TO_GET_JAVA = """
  Install one and run this again:
    apt-get install openjdk-17-jre-headless    (Debian, Ubuntu)
    brew install openjdk@17                    (macOS)
  or set JAVA_HOME to one that is installed."""


class SetupError(Exception):
    """Something the machine lacks; the message says what was found and what to do."""


def main() -> int:
    started = time.monotonic()
    try:
        java = java_version()
        with one_at_a_time():
            changed = install_packages()
            changed = setup_spark.prepare(VENV, java=java, say=say) or changed
    except SetupError as error:
        say(str(error))
        return 2
    except (setup_spark.SparkSetupError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    if changed:
        say(f"ready in {time.monotonic() - started:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"scripts/setup: {text}", file=sys.stderr, flush=True)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Demo and tests may be started together; the folder itself carries the lock: nothing is left behind."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this folder")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def java_version() -> str:
    """The full version text of the Java that Spark will start: JAVA_HOME's if set, else the one on PATH."""
    home = os.environ.get("JAVA_HOME")
    program = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    source = f"JAVA_HOME is {home!r}" if home else "JAVA_HOME is not set"
    if program is None:
        raise SetupError(f"{NEED_JAVA} Found none: {source}, and PATH has no java.{HOW_TO_GET_JAVA}")
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        found = f"{program!r} does not run ({source}): {error}"
        raise SetupError(f"{NEED_JAVA} {found}{HOW_TO_GET_JAVA}") from None
    text = (done.stderr + done.stdout).strip()
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    if match is None or int(match[1]) < JAVA_NEEDED:
        found = f"{text.partition(chr(10))[0]!r} at {program!r} ({source})"
        raise SetupError(f"{NEED_JAVA} Found {found}.{HOW_TO_GET_JAVA}")
    return text


def install_packages() -> bool:
    """Makes `.venv` hold what the lock says, and the project itself editable; False if it already does."""
    if runs(PYTHON):
        stamp = package_stamp()
        if STAMP.is_file() and STAMP.read_text() == stamp:
            return False
        say(f"updating {VENV}")
    else:
        say(f"making {VENV} with Python {sys.version.partition(' ')[0]}")
        make_venv()
        stamp = package_stamp()
    STAMP.unlink(missing_ok=True)
    say("installing the packages of requirements.lock (some minutes on a new machine, most of it Spark)")
    # Hash mode is for the lock; the project itself is built here, by the build tools that the lock brought.
    pip("install", "--require-hashes", "--requirement", str(LOCK))
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    compile_packages()
    STAMP.write_text(stamp)
    return True


def compile_packages() -> None:
    """Bytecode for everything: where Python may not write it later, each start would compile it all again."""
    folders = [str(VENV / "lib"), str(ROOT / "featurekit_spark"), str(ROOT / "jobs")]
    command = [str(PYTHON), "-m", "compileall", "-q", "-j", "0", *folders]
    # Some packages carry files for other Pythons, which do not compile; they are not imported either.
    subprocess.run(command, check=False, capture_output=True)


def make_venv() -> None:
    # Debian splits ensurepip off: without it `venv` fails half-way, with its own advice in the output.
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SetupError(f"{sys.executable} could not make {VENV}:\n{done.stdout}{done.stderr}")


def pip(*arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    # A user's PYTHONPATH or `pip install --user` default would put packages elsewhere than in `.venv`.
    environment = {
        k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET"}
    }
    command = [str(PYTHON), "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    subprocess.run(command, check=True, env=environment, cwd=VENV, stdout=sys.stderr)


def runs(python: Path) -> bool:
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def package_stamp() -> str:
    """What the installed packages depend on; tool settings in pyproject.toml do not count."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    relevant = {part: project[part] for part in ("build-system", "project")}
    text = json.dumps([relevant, LOCK.read_text(), str(ROOT), os.path.realpath(PYTHON)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
