"""Examples that run: every python block of README and docs, page by page, and every command that a page names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from featurekit_spark.cli import app
from featurekit_spark.config import load_settings
from tests.docs.pages import ROOT, blocks_of, pages, run_page

PAGES = pages()
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]
SETTING = re.compile(r"--set[ =]([\w.]+)=('[^']*'|\"[^\"]*\"|[^\s`]+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    for block, printed, said in run_page(page, tmp_path):
        if said is not None:
            assert printed == said, f"{name_of(page)}, line {block.line} prints something else"


def commands(page: Path) -> list[str]:
    """The commands of a page's console blocks, continued lines joined, comments dropped."""
    found = []
    for block in blocks_of(page):
        if block.language == "console":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [line.split("  #")[0].strip() for line in lines if line.strip()]
    return [line for line in found if not line.startswith("#")]


def options() -> set[str]:
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    return {option for parameter in run.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    known = options()
    for command in commands(page):
        words = shlex.split(command)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        for word in words:
            if re.match(r"(scripts|jobs|tests)/", word):
                assert (ROOT / word).exists(), (
                    f"{name_of(page)}: {command!r} names {word}, which is not there"
                )
        if "run" in words[1:2] or any(word.endswith("run_logic.py") for word in words):
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            used -= {"--master", "--conf", "--py-files"}  # spark-submit's own
            assert used <= known, f"{name_of(page)}: {command!r} has options that are not there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_pages_name_are_settings(page: Path) -> None:
    for key, value in SETTING.findall(page.read_text(encoding="utf-8")):
        if not key.startswith("key"):  # --set key.path=value stands for any
            needed = ["llm.model=any"] if value == "openai" else []
            load_settings(merchant="abt", market="US", overrides=[f"{key}={value.strip(chr(39))}", *needed])


def test_the_runner_sees_what_is_printed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nclass A:\n    x = 1\nprint(A.x)\n```\n\n```text\n1\n```\n\n"
        "```python\nprint(A.x + 1)\n```\n"
    )
    assert [(printed, said) for _, printed, said in run_page(page, tmp_path)] == [
        ("1\n", "1\n"),
        ("2\n", None),
    ]


def test_the_runner_keeps_what_examples_write_in_its_folder(tmp_path: Path) -> None:
    page, here = tmp_path / "page.md", Path.cwd()
    page.write_text("```python\nfrom pathlib import Path\nPath('written').touch()\n```\n")
    (tmp_path / "folder").mkdir()
    for _ in run_page(page, tmp_path / "folder"):
        assert Path.cwd() == here
    assert (tmp_path / "folder" / "written").exists() and not (here / "written").exists()


def test_the_runner_gives_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\n\nraise ValueError('here')\n```\n")
    with pytest.raises(ValueError, match="here") as caught:
        list(run_page(page, tmp_path))
    assert caught.traceback[-1].lineno == 4  # counted from 0
