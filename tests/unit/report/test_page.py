"""What stands on the page of a run and on the lists that lead to it, and that no text of a run gets out of place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.report.lists import groups_page, list_page, neighbours
from featurekit_spark.report.page import run_page
from featurekit_spark.report.record import run_document
from featurekit_spark.report.removal import remove_from_documents
from featurekit_spark.report.since import since
from featurekit_spark.report.store import RunStore, _summary
from featurekit_spark.report.style import STYLE
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


# -- what stands there ---------------------------------------------------------------------------------------


def test_a_row_per_builder_that_was_asked_with_what_it_cost_and_a_bar() -> None:
    found = document(
        builders={
            "LLMCompletion": counts(hit=6, computed=3, error=1, calls=4, tokens=1234, usd=0.5, seconds=2.0),
            "LLMLogic": counts(hit=1000),
            "ProductIds": counts(),
        }
    )
    page = run_page(found)
    told = Read(page)
    assert 'aria-label="6 hit, 3 computed, 1 error"' in page and 'class="hit" style="width:60.0%"' in page
    assert " LLMCompletion 6 3 1 4 1,234 0.5000 2.00 s" in re.sub(" +", " ", told.sections["Builders"])
    assert "Not asked for anything: ProductIds." in told.sections["Builders"]
    assert "Hits 1,006 100 %" in re.sub(" +", " ", told.sections["abt US ok"])
    assert "USD 0.5000" in told.sections["abt US ok"]
    assert "Empty" not in told.sections["Builders"]  # no key was


def test_values_carried_over_are_shown_where_a_record_knows_of_them() -> None:
    assert "pdated" not in read(document(builders={"A": counts(computed=1)})).text
    found = document(builders={"A": counts(computed=1, updated=3)})
    told = read(found)
    assert (
        "updated: carried over from the value before" in told.text
        and "Updated 3" in told.sections["abt US ok"]
    )
    assert 'class="updated" style="width:75.0%"' in run_page(found)


def test_a_price_that_nobody_knows_is_not_nothing() -> None:
    told = read(document(builders={"A": counts(computed=1, calls=1, usd=None), "B": counts(hit=1)}))
    assert "USD unknown" in told.sections["abt US ok"]
    assert "Calls" not in read(document(builders={"A": counts(computed=1)})).sections["Builders"]


def test_failed_keys_are_told_by_their_causes() -> None:
    errors = {f'["abt","US","p{n}"]': f'LLMCompletion["say p{n}"]: status 400: no' for n in range(30)}
    errors['["abt","US","q"]'] = 'LLMLogic["abt","US","q"]: ValueError: no q'
    told = read(document(status="partial", products=40, errors=errors))
    failed = told.sections["Failed keys"]
    assert failed.count("LLMCompletion: status 400: no") == 1 and "LLMLogic: ValueError: no q" in failed
    assert 'LLMCompletion["say p3"]: status 400: no' in failed  # key by key, below
    assert "6 more." in failed
    assert "31 of 40 keys failed." in told.text and "Failed keys 31" in told.sections["abt US partial"]


def test_many_failed_keys_are_counted_as_far_as_they_are_kept() -> None:
    errors = {f"[{number}]": f"A[{number}]: reason {number % 12}" for number in range(1000)}
    told = read(document(errors=errors))
    assert "Among the first 100 of 1,000 failed keys. 2 more errors." in told.sections["Failed keys"]
    assert "975 more." in told.sections["Failed keys"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"status": "failed", "error": "no disk", "exit_code": 4},
            "ended before its end. exit code 4: data quality",
        ),
        (
            {"status": "stopped", "error": "max_calls=2", "exit_code": 75},
            "stopped at its own limit. exit code 75: run",
        ),
        ({"unchanged": True}, "Nothing had changed."),
        ({"warnings": ["LLMLogic has 1292 keys"]}, "Warnings LLMLogic has 1292 keys"),
        ({"run_date": "2026-01-05"}, "Run nightly-1 · for 2026-01-05 · started 2026-01-31 12:00:00 UTC"),
    ],
)
def test_how_it_ended_is_said_at_the_top(changes: dict[str, Any], said: str) -> None:
    told = next(
        body for heading, body in read(document(**changes)).sections.items() if heading.startswith("abt")
    )
    assert said in re.sub(r"\s+", " ", told)


def test_time_that_no_stage_accounts_for_is_told_and_short_stages_are_one() -> None:
    stages = [{"stage": name, "seconds": spent} for name, spent in (("Dear", 130.0), ("A", 0.1), ("B", 0.1))]
    sinks = {"delta": {"status": "published", "rows": 1, "seconds": 10.0, "run_id": "r0"}}
    told = read(document(stages=stages, sinks=sinks, wall_seconds=190.1))
    assert re.sub(r"\s+", " ", told.sections["Time"]).strip() == (
        "Stage Took Share Dear 2 min 10 s publish delta 10.0 s outside of finished stages 49.9 s "
        "2 shorter ones 0.20 s"
    )
    assert "r0.html" in told.links  # whose answers the output holds


def test_settings_that_somebody_set_come_first() -> None:
    found = document()
    found["settings"] = [
        {"key": "a", "value": 1, "origin": "default"},
        {"key": "b", "value": None, "origin": "--set b"},
    ]
    told = read(found).sections["Settings (1 of 2 set)"]
    assert told.index("b") < told.index("default") and "none" in told


# -- the run before ------------------------------------------------------------------------------------------


def test_what_is_different_from_the_run_before() -> None:
    before = document(identities={"Upper": IDENTITY, "Old": IDENTITY})
    now = document(
        products=5,
        identities={
            "Upper": {**IDENTITY, "config_hash": "b", "config": "Upper.Config(length=2)"},
            "New": IDENTITY,
        },
        builders={"Upper": counts(computed=5)},
    )
    now["versions"] = {**now["versions"], "pyarrow": "99"}
    now["settings"] = [s | {"value": 20} if s["key"] == "search.top_k" else s for s in now["settings"]]
    found = since(before, now)
    assert [(c["what"], c["before"], c["now"]) for c in found["changes"]] == [
        ("config of Upper", "Upper.Config(length=1)", "Upper.Config(length=2)"),
        ("builder New", None, "there"),
        ("builder Old", "there", None),
        ("setting search.top_k", 10, 20),
        ("version of pyarrow", before["versions"]["pyarrow"], "99"),
    ]
    told = read({**now, "since": found})
    assert "config of Upper Upper.Config(length=1) Upper.Config(length=2)" in re.sub(
        " +", " ", told.sections["Since the run before"]
    )
    assert "Products 5 +3" in re.sub(" +", " ", told.sections["abt US ok"])
    assert "featurekit explain Upper --run nightly-1 --key KEY" in told.text


def test_where_nothing_is_different_the_data_must_be() -> None:
    now = document(builders={"Upper": counts(computed=5)}, identities={"Upper": IDENTITY})
    told = read({**now, "since": since(document(run_id="r0", identities={"Upper": IDENTITY}), now)})
    assert "are those of r0 (ok): what was computed comes of changed data" in told.text
    failed = since(document(), now)  # it did not come so far as to have builders
    assert failed["changes"] == []


def test_of_long_configs_the_part_that_differs_is_shown() -> None:
    prompts = ["x" * 3000 + end + "y" * 3000 for end in ("short", "brief")]
    changes = [{"what": "config of Prompt", "before": prompts[0], "now": prompts[1]}]
    told = read({**document(), "since": {"run_id": "r0", "status": "ok", "changes": changes}})
    assert "xshorty" in told.text and "xbriefy" in told.text and "x" * 100 not in told.text


def test_runs_lead_to_the_ones_before_and_after(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    folder = tmp_path / "runs" / "abt" / "US"

    def around(run_id: str) -> dict[str | None, str | None]:
        tags = Read((folder / f"{run_id}.html").read_text()).tags
        return {
            attributes["rel"]: attributes["href"]
            for tag, attributes in tags
            if tag == "a" and "rel" in attributes
        }

    for at in range(3):
        store.write(document(run_id=f"r{at}", at=at, identities={"Upper": IDENTITY}))
    assert around("r0") == {"next": "r1.html"} and around("r2") == {"prev": "r1.html"}
    assert around("r1") == {"prev": "r0.html", "next": "r2.html"}
    assert store.read("abt", "US", "r2")["since"]["run_id"] == "r1"

    store.write(
        document(run_id="r0", at=3, identities={"Upper": IDENTITY})
    )  # again, and now it is the newest
    assert around("r1") == {"next": "r2.html"} and around("r0") == {"prev": "r2.html"}
    assert around("r2") == {"prev": "r1.html", "next": "r0.html"}

    remove_from_documents(str(tmp_path), lambda text: text.replace("length", "[purged]"), dry_run=False)
    assert around("r2") == {"prev": "r1.html", "next": "r0.html"}
    assert "length" not in (folder / "r2.html").read_text()


def test_runs_that_did_not_come_so_far_are_passed_over(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path))
    store.write(document(run_id="r0", at=0, identities={"Upper": IDENTITY}))
    store.write(document(run_id="r1", at=1, status="failed", error="no net"))
    store.write(document(run_id="r2", at=2, identities={"Upper": IDENTITY}))
    assert store.read("abt", "US", "r2")["since"]["run_id"] == "r0"


def test_neighbours() -> None:
    assert neighbours([]) == {}
    assert neighbours([{"run_id": "b"}, {"run_id": "a"}]) == {"b": ("a", None), "a": (None, "b")}


# -- lists ---------------------------------------------------------------------------------------------------


def test_a_list_tells_failed_keys_not_failed_steps_and_why_a_run_failed() -> None:
    one = document(
        errors={"[1]": "no"},
        status="partial",
        builders={"A": counts(error=1, calls=2, usd=None), "B": counts(error=1)},
    )
    other = document(run_id="r2", status="failed", error="no disk " * 100, run_date="2026-01-05")
    page = list_page("abt", "US", [_summary(one), _summary(other)])
    told = re.sub(r"\s+", " ", Read(page).text)
    assert "nightly-1 partial 2 0 0 1 2 unknown 1.50 s" in told
    assert "r2 for 2026-01-05 failed no disk" in told and "no disk " * 20 not in told and "2 runs" in told


def test_two_hundred_runs_are_still_a_small_page() -> None:
    runs = [
        _summary(document(run_id=f"{n:032x}", at=n, builders={"A": counts(hit=9, computed=1)}))
        for n in range(200)
    ]
    page = list_page("abt", "US", runs)
    assert len(page) < 60_000 and page.count('scope="row"') == 100 and "names the others" in page


def test_merchants_are_on_one_line_with_their_markets() -> None:
    told = Read(groups_page([("abt", "NO"), ("abt", "US"), ("buy", "US")]))
    assert told.links == ["abt/NO/index.html", "abt/US/index.html", "buy/US/index.html"]
    assert told.text.count("abt") == 1


# -- form ----------------------------------------------------------------------------------------------------


def full() -> dict[str, Any]:
    """Much of everything, as bad as it may come."""
    long = EVIL + "x" * 5000
    found = document(
        merchant=EVIL,
        status=EVIL,
        error=long,
        exit_code=3,
        warnings=[long] * 50,
        builders={
            f"Builder{n}{EVIL}": counts(hit=1, computed=1, updated=1, calls=1, usd=None) for n in range(20)
        },
        sinks={EVIL: {"status": EVIL, "rows": 1, "run_id": EVIL, EVIL: EVIL}},
        quality={EVIL: 1},
        errors={f"[{n}]{EVIL}": f"{n}{long}" for n in range(500)},
        plan=EVIL + "stage\n" * 4000,
        stages=[{"stage": EVIL, "seconds": 0.5} for _ in range(20)],
        identities={f"Builder{n}": {**IDENTITY, "config": long} for n in range(20)},
    )
    changes = [{"what": EVIL, "before": long, "now": EVIL}]
    return {**found, "since": {"run_id": EVIL, "status": EVIL, "products": 1, "changes": changes}}


def pages() -> Iterator[str]:
    found = full()
    yield run_page(found, before=EVIL, after=EVIL)
    yield run_page(document())
    yield list_page(EVIL, EVIL, [_summary(found), _summary(document())])
    yield groups_page([(EVIL, EVIL)])


def test_no_text_of_a_run_becomes_a_tag() -> None:
    for page in pages():
        tags = Read(page).tags
        assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "form", "input", "svg"}
        assert not any(
            name.startswith("on") or name == "src" for _, attributes in tags for name in attributes
        )
    assert EVIL in read(full()).text  # as text


def test_a_page_stays_small_whatever_happened() -> None:
    assert len(run_page(full()).encode()) < 80_000
    errors = {f"[{n}]": "A: no answer " * 8 for n in range(500)}
    usual = document(
        errors=errors,
        builders={f"Builder{n}": counts(hit=1, computed=1) for n in range(12)},
        identities={f"Builder{n}": IDENTITY for n in range(12)},
        plan="stage\n" * 60,
    )
    assert len(run_page(usual).encode()) < 60_000


def test_pages_can_be_read_by_machines_that_read_aloud() -> None:
    for page in pages():
        tags = Read(page).tags
        names = [tag for tag, _ in tags]
        assert ("html", {"lang": "en"}) in tags and names.count("h1") == 1 and names.count("title") == 1
        assert all("scope" in attributes for tag, attributes in tags if tag == "th")
        assert all("aria-label" in attributes for tag, attributes in tags if attributes.get("role"))


def test_text_stands_out_from_its_ground() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in STYLE.split("prefers-color-scheme: dark")
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        for ground in ("ground", "soft"):
            for ink in ("ink", "dim", "link", "ok", "partial", "failed"):
                dark, bright = sorted((light(scheme[ink]), light(scheme[ground])))
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (ink, ground, scheme)
