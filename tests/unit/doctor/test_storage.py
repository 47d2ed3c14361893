"""What is said of places to write to; and that nothing is left there."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from featurekit_spark.doctor import Status, storage

MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/x /data nfs4 rw 0 0
rclone /data/my\\040bucket fuse.rclone rw 0 0
/dev/vdb /data2 xfs rw 0 0
half a line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a", "ext4"),
        ("/tmp/a", "tmpfs"),
        ("/data", "nfs4"),
        ("/data/my bucket/cache", "fuse.rclone"),
        ("/data2/cache", "xfs"),
        ("/database", "ext4"),
    ],
)
def test_which_file_system_holds_a_path(path: str, kind: str) -> None:
    assert storage.file_system_of(Path(path), MOUNTS) == kind
    assert storage.file_system_of(Path(path), "") is None


def test_a_mount_over_another_is_the_one_that_is_seen() -> None:
    assert storage.file_system_of(Path("/data/x"), MOUNTS + "over /data overlay rw 0 0\n") == "overlay"


def test_a_relative_path_that_is_there_is_not_said_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'place' will be made" in storage.writable("warehouse", "place").found
    (tmp_path / "place").mkdir()
    assert "will be made" not in storage.writable("warehouse", "place").found


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check = storage.writable("warehouse", str(tmp_path))
    assert check.status is Status.OK and "will be made" not in check.found
    new = tmp_path / "a" / "b"
    check = storage.writable("warehouse", f"file://{new}")
    assert check.status is Status.OK and f"{str(new)!r} will be made" in check.found
    assert storage.several_writers("writers", str(new)).status is Status.OK
    assert storage.disk("disk", str(new)).name == "disk"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    check = storage.writable("warehouse", str(tmp_path / "file" / "warehouse"))
    assert check.status is Status.FAIL and "is no folder" in check.found

    def refuse(self: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    check = storage.writable("warehouse", str(tmp_path))
    assert check.status is Status.FAIL and "Permission denied" in check.found and "writable" in check.advice


def test_a_rename_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "replace", refuse)
    assert "cross-device" in storage.writable("warehouse", str(tmp_path)).found
    assert list(tmp_path.iterdir()) == []


def test_network_file_systems_are_warned_of(tmp_path: Path) -> None:
    for kind in ("nfs", "nfs4", "cifs", "smb3", "fuse.s3fs", "fuse", "9p", "ceph", "lustre"):
        check = storage.several_writers("w", str(tmp_path), f"x {tmp_path} {kind} rw 0 0\n")
        assert check.status is Status.WARN and kind in check.found and "one machine at a time" in check.advice
    for kind in ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "apfs"):
        assert storage.several_writers("w", str(tmp_path), f"x / {kind} rw 0 0\n").status is Status.OK


def test_locks_that_exclude_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def granted(*args: Any, **options: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(storage, "file_lock", granted)
    check = storage.several_writers("w", str(tmp_path))
    assert check.status is Status.FAIL and "both granted" in check.found


def test_locks_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    check = storage.several_writers("w", str(tmp_path))
    assert check.status is Status.FAIL and "Operation not supported" in check.found
    assert list(tmp_path.iterdir()) == []


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(free: int) -> Status:
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return storage.disk("disk", str(tmp_path)).status

    assert [status(size) for size in (100 << 30, 1 << 30, 100 << 20)] == ["ok", "warn", "fail"]


def test_object_stores() -> None:
    assert "S3DynamoDBLogStore" in storage.several_writers("w", "s3a://bucket/cache").advice
    assert storage.several_writers("w", "abfss://c@a/cache").status is Status.OK
    assert storage.disk("d", "gs://bucket").status is Status.OK
    unknown = storage.writable("w", "abc://bucket/x")
    assert unknown.status is Status.WARN and "was not tried" in unknown.found


def test_a_store_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    assert storage._probed_store("w", "x://b", store, "probe").status is Status.OK

    class Full:
        def open_output_stream(self, path: str) -> Any:
            raise OSError("no room")

        def delete_file(self, path: str) -> None:
            raise pa.ArrowInvalid("nothing there")

    check = storage._probed_store("w", "x://b", Full(), "probe")
    assert check.status is Status.FAIL and check.found == "x://b: no room"
    assert list(tmp_path.iterdir()) == []
