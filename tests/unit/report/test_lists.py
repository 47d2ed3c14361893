"""What a page says of the run before, and how pages and lists lead to each other."""

from __future__ import annotations

import re
from pathlib import Path

from featurekit_spark.report.lists import groups_page, list_page, neighbours
from featurekit_spark.report.removal import remove_from_documents
from featurekit_spark.report.since import since
from featurekit_spark.report.store import RunStore, _summary
from tests.unit.report.reading import IDENTITY, Read, counts, document, read


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
