"""Environments of peers that the library does not depend on: apart from its own, and never in its lock.

Each holds a peer, and what the library needs to lend it embedder, stand-in, kernel and merging rule, all in the
versions of the library's own environment.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import _common

HAMILTON = "sf-hamilton==1.90.0"
FAISS = "faiss-cpu==1.15.1"


def peers_python(folder: Path, peer: str = HAMILTON) -> Path:
    """The Python of the environment of a peer at `folder`, made on the first call."""
    python, done = folder / "bin/python", folder / "installed"
    if done.exists() and done.read_text() == peer:
        return python
    print(f"installing {peer} into {folder}", file=sys.stderr, flush=True)
    project = tomllib.loads((_common.ROOT / "pyproject.toml").read_text())["project"]
    here = sorted(
        {f"{found.name}=={found.version}" for found in distributions() if found.name != project["name"]}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "constraints.txt").write_text("\n".join(here) + "\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    wanted = [peer, *project["dependencies"]]
    subprocess.run([*pip, "--constraint", str(folder / "constraints.txt"), *wanted], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "library.pth").write_text(f"{_common.ROOT}\n")
    done.write_text(peer)
    return python
