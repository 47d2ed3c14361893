"""Documents of runs to make pages of, and a reader that sees a page as a person does: headings and their text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

from featurekit_spark.report.page import run_page
from featurekit_spark.report.record import run_document
from featurekit_spark.settings import Settings

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
EVIL = "<script>alert('x')</script>&\"'"
NOTHING = {
    "hit": 0,
    "computed": 0,
    "error": 0,
    "empty": 0,
    "calls": 0,
    "tokens": 0,
    "usd": 0.0,
    "seconds": 0.0,
}
IDENTITY = {"type": "string", "version": "1", "config_hash": "a", "config": "Upper.Config(length=1)"}


def counts(**changes: Any) -> dict[str, Any]:
    return {**NOTHING, **changes}


def document(*, errors: dict[str, str] | None = None, at: int = 0, **changes: Any) -> dict[str, Any]:
    facts = {
        "run_id": "nightly-1",
        "merchant": "abt",
        "market": "US",
        "status": "ok",
        "products": 2,
        "wall_seconds": 1.5,
        "builders": {},
        "sinks": {},
        "quality": {},
        "unchanged": False,
        "warnings": [],
        **changes,
    }
    started = START + timedelta(minutes=at)
    found = run_document(facts, started=started, ended=started, errors=errors, settings=Settings())
    return {**found, **{name: facts[name] for name in ("stages", "identities", "plan") if name in facts}}


class Read(HTMLParser):
    """The text of a page by heading, its links, and whether what it opens is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._heading = ""
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr", "link"):
            self._open.append(tag)
        if tag == "a":
            self.links.append(str(dict(attrs)["href"]))
        if tag in ("h1", "h2"):
            self._heading = ""
        elif tag in ("tr", "td", "th", "dt", "dd", "div", "p", "li", "small"):
            self.sections[self._heading] += " "

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("h1", "h2"):
            self.sections.setdefault(self._heading, "")

    def handle_data(self, data: str) -> None:
        if {"style", "title"} & set(self._open):
            return
        if {"h1", "h2"} & set(self._open):
            self._heading += data
        else:
            self.sections[self._heading] += data

    @property
    def text(self) -> str:
        return "\n".join(f"{heading} {body}" for heading, body in self.sections.items())


def read(found: dict[str, Any], **around: str) -> Read:
    return Read(run_page(found, **around))
