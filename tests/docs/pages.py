"""The fenced blocks of README and docs, and how python blocks are run. Knows Markdown's fences, nothing of what the
pages say.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks_of", "pages", "run_page"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins (from 1)."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every page that users read."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The page's fenced blocks in order. A fence begins in the first column."""
    found: list[Block] = []
    opened: tuple[str, int] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = (line.removeprefix("```").strip(), number + 1)
        else:
            language, start = opened
            found.append(Block(language, "\n".join(lines[start - 1 : number - 1]) + "\n", start))
            opened = None
    if opened is not None:
        raise AssertionError(f"{page.name}: the block that begins on line {opened[1]} is never closed")
    return found


def run_page(page: Path, folder: Path) -> Iterator[tuple[Block, str, str | None]]:
    """Run the page's python blocks in one namespace: (block, what it printed, what the page says it prints).

    What a page says is a ```text block with nothing but the fence's line between. The blocks run in `folder`, where
    they are kept as a module, each on the lines that it has in the page: classes have their source there, as they have
    in a user's file, and a traceback names the page's line.
    """
    blocks = blocks_of(page)
    source = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for block in blocks:
        if block.language == "python":
            text = block.text.splitlines()
            source[block.line - 1 : block.line - 1 + len(text)] = text
    name = f"page_{page.stem}"
    path = folder / f"{name}.py"
    path.write_text("\n".join(source) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            if block.language != "python":
                continue
            said = None
            if after is not None and after.language == "text":
                end = block.line + len(block.text.splitlines())
                said = after.text if after.line <= end + 3 else None
            printed = io.StringIO()
            padded = "\n" * (block.line - 1) + block.text
            with contextlib.redirect_stdout(printed), contextlib.chdir(folder):
                exec(compile(padded, str(path), "exec", dont_inherit=True), module.__dict__)
            yield block, printed.getvalue(), said
    finally:
        del sys.modules[name]
