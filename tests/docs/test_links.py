"""Nothing that a page points to may be missing: other pages, and the files of this repository that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, pages

PAGES = pages()
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|yaml|toml|txt))`")
PLACES = (ROOT, ROOT / "featurekit_spark", ROOT / "tests", ROOT / "docs")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    for path in FILE.findall(page.read_text(encoding="utf-8")):
        if path not in MADE_BY_A_RUN:
            there = any((place / path).exists() for place in PLACES)
            assert there, f"{name_of(page)} names {path}, which is not there"


MADE_BY_A_RUN = {"conf/spark-defaults.conf"}


def test_every_assumption_names_where_it_lives() -> None:
    text = (ROOT / "docs/assumptions.md").read_text(encoding="utf-8")
    items = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert items
    for item in items:
        named = re.fullmatch(r"(?s).*[.;:] +((?:`[^`]+`[,\s]*)+)", " ".join(item.split()))
        assert named, f"docs/assumptions.md: {item!r} names no file"
        for path in re.findall("`([^`]+)`", named[1]):
            assert any((place / path).exists() for place in PLACES), f"docs/assumptions.md names {path}"


def test_every_page_is_reached_from_the_readme() -> None:
    found, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in found:
            continue
        found.add(page)
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = page.parent / target
            if path.suffix == ".md" and path.exists():
                todo.append(path)
            elif path.is_dir():
                todo += path.glob("*.md")
    assert {page.resolve() for page in PAGES} <= found


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
