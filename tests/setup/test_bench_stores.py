"""The measuring script for vector indexes on a few rows: that it runs, and finds what is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench/stores"


def test_exact_stores_find_what_memory_does() -> None:
    options = ["--rows", "150", "--queries", "5", "--stores", "flat,lancedb,qdrant-folder"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    stores = json.loads(done.stdout.splitlines()[-1])["stores"]
    assert [row["store"] for row in stores] == ["flat", "lancedb", "qdrant-folder"]
    for row in stores:
        assert (row["recall"], row["recall_filtered"], row["equal"]) == (1.0, 1.0, True)
    shown = done.stdout.splitlines()
    assert shown[0].split()[0] == "store" and len(shown) == 5
