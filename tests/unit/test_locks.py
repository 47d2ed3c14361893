"""Locks between processes: exclusion, release by death, and the message."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from featurekit_spark.errors import LockedError
from featurekit_spark.locks import file_lock, local_path, table_lock

HOLD = """
import sys, time
from pathlib import Path
from featurekit_spark.locks import file_lock
with file_lock(Path(sys.argv[1]), timeout_s=5, owner="run 7"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_waits_and_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"process {holder.pid} on .* \(run 7\) since 20") as caught,
            file_lock(path, timeout_s=0),
        ):
            pass
        assert caught.value.retryable
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with file_lock(path, timeout_s=5):  # what a killed process held is free
        pass


def test_threads_exclude_one_another(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "x.lock", 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with file_lock(path, timeout_s=30):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_every_spelling_of_a_table_is_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "t")
    (tmp_path / "t").mkdir()
    with table_lock(str(tmp_path / "t")):
        for spelling in (f"file://{tmp_path}/t", f"{tmp_path}/t/", f"{tmp_path}/./t", f"{tmp_path}/link"):
            with pytest.raises(LockedError), table_lock(spelling, timeout_s=0):
                pass
    assert not list((tmp_path / "t").iterdir())


def test_elsewhere_there_is_no_lock() -> None:
    with table_lock("s3a://bucket/t"), table_lock("s3a://bucket/t", timeout_s=0):
        pass
    assert local_path("s3a://bucket/t") is None
    assert local_path("file:/a%20b/c") == Path("/a b/c")
    assert local_path("a:b/c") == Path("a:b/c")
