"""No text of a run gets out of its place; pages are whole, small, readable by everybody, and look like something."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.report.lists import groups_page, list_page
from featurekit_spark.report.page import run_page
from featurekit_spark.report.store import _summary
from featurekit_spark.report.style import STYLE
from tests.unit.report.reading import EVIL, IDENTITY, Read, counts, document, read


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


# -- in a browser --------------------------------------------------------------------------------------------

MEASURE = """<script>onload = () => {
  const wide = element => Math.round(element.getBoundingClientRect().width);
  const bar = document.querySelector(".share");
  const parts = [...bar.children].map(piece => Math.round(100 * wide(piece) / wide(bar)));
  const over = document.documentElement.scrollWidth - innerWidth;
  document.documentElement.dataset.measured = JSON.stringify({over, parts, width: innerWidth});
}</script>"""


def browse(page: str, folder: Path, *options: str) -> str:
    """What the browser prints, for a page as a file."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ]
    command += [f"--user-data-dir={folder}/profile", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [*command, *options, file.as_uri()], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_a_page_that_fits_a_narrow_screen(tmp_path: Path) -> None:
    found = full() | {"merchant": "abt", "status": "partial"}
    found["builders"] = {"ProductEmbeddingSearcher": counts(hit=60, computed=30, error=10, calls=1)}
    page = run_page(found)

    picture = tmp_path / "page.png"
    browse(page, tmp_path, f"--screenshot={picture}", "--window-size=600,800")
    assert len(set(rows_of(picture))) > 100  # a blank page has one row 800 times

    measured = re.sub(r'<meta http-equiv="Content-Security[^>]*>', MEASURE, page)
    dom = browse(measured, tmp_path, "--dump-dom", "--window-size=500,800")
    told = re.search(r'data-measured="([^"]+)"', dom)
    assert told is not None
    layout = json.loads(unescape(told[1]))
    assert layout["over"] <= 0, "it scrolls sideways as a whole"
    assert [round(part, -1) for part in layout["parts"]] == [60, 30, 10]


def rows_of(picture: Path) -> list[bytes]:
    """The rows of a PNG with 8 bits a channel, as they are stored."""
    data = picture.read_bytes()
    at, packed = 8, b""
    width, _, bits, colour = struct.unpack(">IIBB", data[16:26])
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    assert (bits, colour in (2, 6)) == (8, True)
    length = 1 + width * (3 if colour == 2 else 4)
    pixels = zlib.decompress(packed)
    return [pixels[start : start + length] for start in range(0, len(pixels), length)]
