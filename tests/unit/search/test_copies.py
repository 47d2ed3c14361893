"""A host's copies of matrices: made once, found damaged, cleaned up, told where there is no room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from featurekit_spark.errors import CacheError, ContextError
from featurekit_spark.search import MatrixStore
from featurekit_spark.search import copies as module
from featurekit_spark.search import matrix as matrices
from featurekit_spark.search.copies import Copies
from featurekit_spark.search.removal import matrices_with, remove_matrices

DAY = 86_400


@pytest.fixture(autouse=True)
def _nothing_open() -> None:
    matrices._opened.clear()


def vectors(rows: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, dim), dtype=np.float32)


def named(rows: int) -> list[str]:
    return [f"p-{i:05d}" for i in range(rows)]


def store_at(folder: Path, copies: Path | None = None, **options: int) -> MatrixStore:
    return MatrixStore(folder / "matrices", copies=Copies(copies or folder / "copies", **options))


def opened(store: MatrixStore, rows: int) -> Path:
    """Put and open a matrix and let it go; its copy."""
    ref = store.put(named(rows), vectors(rows))
    store.open(ref)
    matrices._opened.clear()
    return store.copies.folder / f"{ref.hash}.matrix"


def left(store: MatrixStore) -> set[Path]:
    return set(store.copies.folder.glob("*.matrix"))


def process(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_copy_is_mapped_and_not_copied_again(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 5)
    made = path.stat()
    matrix = store.open(store.put(named(5), vectors(5)))
    assert path.stat().st_ino == made.st_ino
    assert not matrix.vectors.flags.writeable and not matrix.vectors.flags.owndata
    assert np.array_equal(
        matrix.index.search(vectors(5), 1)[1].ravel(), np.argmax(vectors(5) @ vectors(5).T, axis=1)
    )
    assert [
        file.name for file in store.copies.folder.iterdir() if file.suffix not in (".matrix", ".lock")
    ] == []


def test_ids_in_another_order_than_rows_keep_their_ranks(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    ids, same = ["b", "ä", "a", "\U0001f600", "\uffff"], np.ones((5, 3), np.float32)
    index = store.open(store.put(ids, same)).index
    found = [ids[row] for row in index.search(same[:1], 5)[1][0]]
    assert found == sorted(ids)


@pytest.mark.parametrize("damage", ["torn", "longer", "header", "empty"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    store = store_at(tmp_path)
    path = opened(store, 5)
    data = path.read_bytes()
    path.write_bytes(
        {"torn": data[:-1], "longer": data + b"x", "header": b"\0" * 4096 + data[4096:], "empty": b""}[damage]
    )
    opened(store, 5)
    assert path.read_bytes() == data


def test_a_copy_of_another_content_is_refused_when_it_is_written(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 5)
    path.unlink()
    part = next((tmp_path / "matrices").glob("hash=*/*.parquet"))
    data = bytearray(part.read_bytes())
    at = data.index(vectors(5)[2:3].tobytes())
    data[at] ^= 1
    part.write_bytes(data)
    with pytest.raises(CacheError, match="is damaged: its content has another hash"):
        opened(store, 5)
    assert left(store) == set()
    assert list(store.copies.folder.glob(".*.part")) == []


MAKE = """
    import sys, numpy as np
    from featurekit_spark.search import MatrixStore
    from featurekit_spark.search.copies import Copies
    store = MatrixStore(sys.argv[1], copies=Copies(sys.argv[2]))
    rows = 5000
    ref = dict(hash=sys.argv[3], rows=rows, dim=64, path="")
    print("ready", flush=True); sys.stdin.readline()
    matrix = store.open(ref)
    print(matrix.index.search(np.ones((1, 64), np.float32), 1)[1][0, 0], flush=True)
    sys.stdin.readline()
"""


def test_processes_at_once_make_one_copy_and_share_it(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    ref = store.put(named(5000), vectors(5000, 64))
    running = [process(MAKE, store.path, store.copies.folder, ref.hash) for _ in range(3)]
    for one in running:
        assert one.stdout.readline() == "ready\n"
    for one in running:
        one.stdin.write("\n")
        one.stdin.flush()
    assert len({one.stdout.readline() for one in running}) == 1
    mapped = set()
    for one in running:
        lines = Path(f"/proc/{one.pid}/maps").read_text().splitlines()
        mapped |= {line.split()[4] for line in lines if line.endswith(".matrix")}
    assert len(mapped) == 1  # one inode
    for one in running:
        one.communicate("\n", timeout=30)
        assert one.returncode == 0


def test_too_many_copies_lose_those_used_longest_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    store = store_at(tmp_path)
    first, second, third = (opened(store, rows) for rows in (1, 2, 3))
    for age, path in ((3, second), (2, first), (1, third)):
        os.utime(path, (time.time() - age * DAY,) * 2)
    fourth = opened(store, 4)
    assert left(store) == {first, third, fourth}
    assert not (store.copies.folder / f".{second.stem}.lock").exists()


def test_opening_a_copy_is_using_it(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 1)
    os.utime(path, (0, 0))
    opened(store, 1)
    assert path.stat().st_mtime > time.time() - 60


def test_copies_are_bounded_by_bytes_and_age(tmp_path: Path) -> None:
    store = store_at(tmp_path, max_mb=1)
    large = [opened(store, rows) for rows in (15_000, 15_001)]  # 0.6 MB each
    assert left(store) == {large[1]}
    store = store_at(tmp_path / "aged")
    aged, fresh = opened(store, 1), opened(store, 2)
    os.utime(aged, (time.time() - 31 * DAY,) * 2)
    assert store.copies.tidy() == [aged.stem]
    assert left(store) == {fresh}


HOLD = """
    import sys
    from featurekit_spark.search import MatrixStore
    from featurekit_spark.search.copies import Copies
    matrix = MatrixStore(sys.argv[1], copies=Copies(sys.argv[2])).open(dict(hash=sys.argv[3], rows=1, dim=8, path=""))
    vectors = matrix.vectors
    del matrix
    print("open", flush=True); sys.stdin.readline()
    print(vectors.sum())
"""


def test_what_another_process_has_open_stays_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 1)
    holder = process(HOLD, store.path, store.copies.folder, path.stem)
    assert holder.stdout.readline() == "open\n"
    newer = opened(store, 2)
    os.utime(path, (0, 0))
    assert store.copies.tidy() == []
    assert left(store) == {path, newer}
    holder.kill()
    holder.communicate(timeout=30)
    assert store.copies.tidy() == [path.stem]


def test_what_a_killed_process_left_half_made_goes(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 1)
    dead, alive = (path.with_name(f".{path.stem}.{pid}.part") for pid in (1, 2))
    for part in (dead, alive):
        part.write_bytes(b"half")
    os.utime(dead, (0, 0))
    store.copies.tidy()
    assert not dead.exists() and alive.exists()


def former_copy(folder: Path, name: str) -> list[Path]:
    """What versions before there was one file made of a matrix, whole and half made."""
    folder.mkdir(mode=0o700, exist_ok=True)
    files = [f"{name}.json", f"{name}.f4", f".{name}.json.17.0123abcd", f".{name}.f4.17.0123abcd"]
    for file in files:
        (folder / file).write_text('["somebody"]')
    return [folder / file for file in files]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of copies where none is named."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"featurekit-{os.getuid()}"


@pytest.mark.parametrize("own", [False, True], ids=["default", "search.copies"])
def test_a_purge_removes_copies_of_every_format(tmp_path: Path, temporary: Path, own: bool) -> None:
    store = MatrixStore(tmp_path / "matrices", copies=Copies(tmp_path / "copies" if own else None))
    refs = [store.put(named(rows), vectors(rows)) for rows in (3, 4)]
    for ref in refs:
        store.open(ref)
    gone, kept = (former_copy(temporary, ref.hash) for ref in refs)
    half = store.copies.folder / f".{refs[0].hash}.17.0123abcd.part"
    half.write_text("somebody")
    assert remove_matrices(store.path, [refs[0].hash], copies=store.copies) == 1
    assert all(path.exists() for path in kept)
    assert {path.stem for path in left(store)} == {refs[1].hash}
    assert [
        path for path in (*temporary.iterdir(), *store.copies.folder.iterdir()) if refs[0].hash in path.name
    ] == []
    assert not any(path.exists() for path in gone)


def test_matrices_are_found_by_any_of_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_BLOCK_BYTES", 64)  # two rows a block
    store = store_at(tmp_path)
    assert matrices_with(store.path, ["p-00000"]) == set()
    small, large, empty = (store.put(named(rows), vectors(rows)).hash for rows in (2, 9, 0))
    other = store.put(["ä '\"", "b"], vectors(2), storage="int8").hash
    assert matrices_with(store.path, ["p-00001", "nobody"]) == {small, large}
    assert matrices_with(store.path, {"p-00008"}) == {large}
    assert matrices_with(store.path, {"ä '\"", "p-00008"}) == {large, other}
    assert matrices_with(store.path, {"nobody"}) == matrices_with(store.path, []) == set() and empty


def test_a_purge_that_fails_at_the_table_finds_the_matrix_again(tmp_path: Path, temporary: Path) -> None:
    store = store_at(tmp_path)
    path = opened(store, 3)
    log = Path(store.path) / "_delta_log"
    log.rename(tmp_path / "away")
    with pytest.raises(CacheError, match="run the purge again"):
        remove_matrices(store.path, [path.stem], copies=store.copies)
    assert not path.exists()
    (tmp_path / "away").rename(log)
    assert matrices_with(store.path, ["p-00001"]) == {path.stem}
    assert not temporary.exists()


def test_copies_of_the_former_format_go_when_one_is_made(tmp_path: Path, temporary: Path) -> None:
    former = former_copy(temporary, "0123456789abcdef" * 2)
    other = temporary / "notes.json"
    other.write_text("{}")
    path = opened(store_at(tmp_path), 1)  # in another folder
    assert path.exists() and other.exists()
    assert not any(path.exists() for path in former)


OPEN = """
    import resource, sys
    from featurekit_spark.errors import ContextError
    from featurekit_spark.search import MatrixStore
    from featurekit_spark.search.copies import Copies
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    store = MatrixStore(sys.argv[1], copies=Copies(sys.argv[2]))
    for ref in sys.argv[4:]:
        rows, name = ref.split(":")
        try:
            print(len(store.open(dict(hash=name, rows=int(rows), dim=8, path="")).ids))
        except ContextError as error:
            print(error)
"""


def told(store: MatrixStore, refs: list[str], *, limit: int = -1, prefix: tuple[str, ...] = ()) -> list[str]:
    """What a process that may write files of so many bytes says when it opens matrices."""
    with process(OPEN, store.path, store.copies.folder, limit, *refs, prefix=prefix) as one:
        out, err = one.communicate(timeout=60)
    assert one.returncode == 0, err
    return out.splitlines()


def test_a_folder_that_is_only_read_serves_what_is_in_it(tmp_path: Path) -> None:
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and there is no setpriv to take that away")
    # The superuser without what makes it one.
    prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.getuid() == 0 else ()
    store = store_at(tmp_path)
    there, new = opened(store, 5), store.put(named(6), vectors(6))
    store.copies.folder.chmod(0o500)
    try:
        read, refused = told(store, [f"5:{there.stem}", f"6:{new.hash}"], prefix=prefix)
    finally:
        store.copies.folder.chmod(0o700)
    assert read == "5"
    assert "of a matrix has no place in " in refused
    assert "(Permission denied, " in refused and "name another folder in search.copies" in refused


def test_no_room_for_a_copy_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    small, large = store.put(named(5), vectors(5)), store.put(named(90_000), vectors(90_000))
    assert store.copies.folder.is_dir()
    first, refused, again = told(
        store, [f"5:{small.hash}", f"90000:{large.hash}", f"5:{small.hash}"], limit=1_000_000
    )
    assert (first, again) == ("5", "5")
    assert refused.startswith(
        f"a copy of 5 MB of a matrix has no place in '{store.copies.folder}' (File too large, "
    )
    assert "Make room" in refused
    assert [path.stem for path in left(store)] == [small.hash]
    assert list(store.copies.folder.glob(".*.part")) == []


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = store_at(tmp_path, tmp_path / "file" / "copies")
    with pytest.raises(ContextError, match=r"has no place in .*file/copies.*Not a directory.*search\.copies"):
        store.open(store.put(named(1), vectors(1)))
