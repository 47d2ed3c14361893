"""scripts/recall on two pairs of real catalogs, where they lie beside the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data"


def recall(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/recall"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "matches").is_dir(), reason=f"needs catalogs and matches in {DATA.name}")
def test_hashed_grams_find_the_true_match() -> None:
    done = recall(str(DATA), "--embedder", "hashing")
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"recall@10 (\w+ -> \w+): ([\d.]+) of \d+", done.stdout))
    assert 0.96 <= float(found["abt -> buy"]) <= 1
    assert 0.94 <= float(found["amazon -> google"]) <= 1


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    done = recall(str(tmp_path))
    assert done.returncode == 2 and "has no folder matches" in done.stderr
    (tmp_path / "matches").mkdir()
    done = recall(str(tmp_path), "--embedder", "nonsense")
    assert done.returncode == 2 and "nonsense left out: " in done.stderr
