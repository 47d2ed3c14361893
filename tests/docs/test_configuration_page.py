"""docs/configuration.md is what the settings models say."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts/docs_configuration.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
