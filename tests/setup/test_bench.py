"""The measuring scripts on a few products: that they run, what they count, and that a wrong count is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


def bench(script: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the object in the last line of stdout, everything that was said)."""
    command = [sys.executable, str(BENCH / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=300)
    assert done.stdout.strip(), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.mark.jobs
@pytest.mark.slow
def test_warm_counts_calls_embeddings_and_searches() -> None:
    options = ("--products", "40", "--engines", "local", "--repeat", "1")
    code, figures, said = bench("warm", *options, "--changes", "none,titles,top_k_back")
    assert code == 0, said
    rows = {row["change"]: row for row in figures["rows"]}
    assert list(rows) == ["cold", "none", "titles", "top_k_back"]
    assert rows["cold"]["calls"] > 30 and rows["cold"]["searches"] > rows["cold"]["calls"]
    assert [rows["none"][name] for name in ("calls", "embeddings", "searches")] == [0, 0, 0]
    assert rows["titles"]["calls"] == 1
    assert rows["top_k_back"]["searches"] == 0, "what top_k made before is found again"


@pytest.mark.jobs
@pytest.mark.slow
def test_check_compares_sizes() -> None:
    code, figures, said = bench("check", "--sizes", "200,400", "--repeat", "1")
    assert [row["keys"] for row in figures["rows"]] == [200, 400], said
    assert [row["wrong"] for row in figures["rows"]] == ["", ""]
    assert code == (0 if figures["linear"] else 1)


@pytest.mark.jobs
@pytest.mark.slow
def test_peers_recommend_the_same() -> None:
    """With the peer that needs no environment of its own."""
    options = ("--products", "40", "--pairs", "1", "--engines", "local", "--peers", "pandas")
    code, figures, said = bench("peers", *options, "--changes", "titles")
    assert code == 0, said
    calls = {row["who"]: (row["cold"]["calls"], row["titles"]["calls"]) for row in figures["table"]}
    assert calls["local"] == (39, 1)
    assert calls["pandas"] == (40, 40), "every product, each time"
    (ratio,) = figures["ratios"]
    assert ratio["cold"] > 0 and ratio["titles"] > 0


@pytest.fixture
def warm_changes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import warm_changes  # type: ignore[import-not-found]

    return warm_changes


@pytest.mark.parametrize(
    ("step", "searches", "others", "said"),
    [
        ("none", 0, 0, ""),
        ("none", 0, 2, "computed {'LLMLogic': 2}, must be nothing"),
        ("top_k", 7, 2, "searches 7, must be 9"),
        ("titles", 7, 2, ""),
    ],
)
def test_a_wrong_count_is_told(warm_changes: Any, step: str, searches: int, others: int, said: str) -> None:
    computed = {"ProductIds": 1, "ProductEmbeddingSearcher": searches, "LLMLogic": others}
    report = {
        "status": "ok",
        "products": 5,
        "wall_seconds": 1.0,
        "builders": {name: {"computed": number} for name, number in computed.items()},
    }
    ran = warm_changes._common.Ran(seconds=2.0, peak_mb=1.0, out=f"\n{json.dumps(report)}\n")
    found = next(s for chain in warm_changes.CHAINS for s in chain if s.name == step)
    must = {"none": 0, "top_k": 9, "titles": None}[step]
    expected = warm_changes.Expected(products=5, calls=0, embeddings=0, searches=must)
    row = warm_changes._row(found, "local", [(ran, 0, expected)], 10.0)
    assert row["wrong"] == said
    assert row["ratio"] == 0.2 and row["seconds"] == 2.0


def test_an_unknown_change_is_refused() -> None:
    command = [sys.executable, str(BENCH / "warm"), "--changes", "everything"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'everything' is unknown; choose from none, prices," in done.stderr


@pytest.mark.jobs
@pytest.mark.slow
def test_calls_tells_what_became_of_each_prompt() -> None:
    _, figures, said = bench("calls", "--prompts", "96", "--parts", "latency,distinct,storm")
    latency, distinct, storm = figures["rows"]
    assert latency["calls"] == 96, said
    assert distinct["met"] and distinct["products"] == 4 * 96 and distinct["calls_spark"] == 96, said
    assert sum(storm["outcomes"].values()) == 96 and set(storm["outcomes"]) <= {"answered", "error"}
    assert storm["answered_twice"] == 0 and storm["calls"] > 96


@pytest.mark.jobs
@pytest.mark.slow
def test_kills_are_survived() -> None:
    code, figures, said = bench("kills", "--prompts", "150", "--kills", "1", "--parts", "worker,driver")
    assert code == 0, said
    assert [(row["killed"], row["complete"]) for row in figures["rows"]] == [
        ("driver", "1 of 1"),
        ("worker", "1 of 1"),
    ]


@pytest.mark.slow
def test_search_compares_with_the_bare_product() -> None:
    """Without the peer that needs an environment of its own."""
    options = ("--rows", "300,600", "--queries", "40", "--dim", "16", "--repeat", "1", "--incremental")
    code, figures, said = bench("search", *options, "--no-faiss")
    assert code == 0, said
    assert [search["rows"] for search in figures["searches"]] == [300, 600]
    assert {"product", "ours", "product + argpartition"} < set(figures["searches"][0]["ratio"])
    assert "FAISS" not in said
    changed = figures["changed"][1]
    assert changed["changed"] == 6
    shares = [changed["searched_again"][margin] for margin in ("0", "1", "2", "4")]
    assert shares == sorted(shares, reverse=True) and shares[0] < 0.5


@pytest.mark.slow
def test_ivf_finds_all_where_all_lists_are_probed() -> None:
    code, figures, said = bench("ivf", "--rows", "2000", "--queries", "50", "--dim", "16", "--clusters", "20")
    assert code == 0, said
    (found,) = figures["curves"]
    recall = [point["recall"] for point in found["curve"]]
    assert recall[0] < recall[-1] == 1.0
    assert [point["scanned"] for point in found["curve"]] == sorted(
        point["scanned"] for point in found["curve"]
    )


@pytest.mark.jobs
@pytest.mark.slow
def test_search_spark_finds_the_same_lists() -> None:
    options = ("--rows", "3000", "--queries", "300", "--dim", "16", "--pairs", "1")
    code, figures, said = bench("search_spark", *options)
    assert code == 0, said
    assert figures["same_lists"]
    assert figures["pairs"][0]["ratio"] > 0  # of so few rows, nothing that rounds to more
