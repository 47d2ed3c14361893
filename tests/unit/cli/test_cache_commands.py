"""`featurekit cache ...` and `featurekit invalidate` over what the main job left."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from featurekit_spark.cli import app
from featurekit_spark.locks import file_lock

Workplace = Any
Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(workplace: Workplace) -> Command:
    """A command on the workplace's cache, its JSON out."""

    def run(*arguments: str, code: int = 0, where: tuple[str, ...] | None = None) -> dict[str, Any]:
        found = where if where is not None else ("--path", str(workplace.warehouse / "cache"))
        done = CliRunner().invoke(app, [*arguments, *found, "--output", "json"], prog_name="featurekit")
        assert done.exit_code == code, done.output + done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    return run


def text(workplace: Workplace, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--path", str(workplace.warehouse / "cache")])
    assert done.exit_code == 0, done.output
    return done.stdout


def computed(ran: Any) -> dict[str, int]:
    return {name: facts["computed"] for name, facts in ran.summary["builders"].items() if facts["computed"]}


def test_stats_count_what_a_run_made(workplace: Workplace, command: Command) -> None:
    workplace.run()
    builders = command("cache", "stats")["builders"]
    completion = builders["LLMCompletion"]
    assert (completion["entries"], completion["keys"], completion["current"]) == (6, 6, 6)
    assert completion["configs"] == 1 and completion["errors"] == 0 and completion["bytes"] > 0
    assert completion["cost"]["tokens"] == completion["saves"]["tokens"] > 0
    for facts in builders.values():
        assert facts["time"]["lookup"] > 0 and facts["time"]["lookup_alone"] > 0
    assert not completion["time"]["better_inline"]  # paid for
    workplace.run("--set", "search.top_k=2")
    logic = command("cache", "stats", "--no-time")["builders"]["ProductEmbeddingSearcher"]
    assert logic["configs"] == 2 and "time" not in logic
    shown = text(workplace, "cache", "stats")
    assert "LLMCompletion" in shown and "look-up" in shown and "traces:" in shown


def test_the_cache_of_the_settings(workplace: Workplace, command: Command) -> None:
    workplace.run()
    where = ("--merchant", "abt", "--market", "US", "--set", f"warehouse={workplace.warehouse}")
    by_settings = command("cache", "stats", "--no-time", where=where)
    assert by_settings["builders"] == command("cache", "stats", "--no-time")["builders"]
    without = command("cache", "stats", "--no-time", where=where[4:])
    assert without["builders"] == by_settings["builders"]


@pytest.mark.parametrize(
    ("where", "code", "error"),
    [
        (("--path", "nowhere"), 3, "'nowhere' holds no cache: check --path"),
        ((), 3, "holds no cache: cache.path is from default"),
        (("--path", "x", "--merchant", "abt"), 2, "--path names the cache itself"),
        (("--merchant", "abt"), 2, "go together"),
        (("--set", "cache.kind=memory"), 2, "keeps nothing after a run"),
    ],
)
def test_there_is_no_cache(command: Command, where: tuple[str, ...], code: int, error: str) -> None:
    assert error in command("cache", "stats", where=where, code=code)["error"]
    assert not Path("nowhere").exists()


def test_gc_of_configs_that_are_no_longer_current(workplace: Workplace, command: Command) -> None:
    workplace.run()
    workplace.run("--set", "search.top_k=2")
    promised = command("cache", "gc", "--stale-configs", "--dry-run")
    assert promised["rows"] == promised["reasons"]["stale_config"] > 0
    done = command("cache", "gc", "--stale-configs")
    assert {**done, "dry_run": True} == promised
    assert workplace.run("--set", "search.top_k=2").computed == 0
    again = workplace.run()
    assert again.computed > 0 and again.calls == 0
    shown = text(workplace, "cache", "gc", "--older-than", "30d")
    assert shown.startswith("0 rows of entries went") and "only rows that repeat" not in shown
    assert "only rows that repeat others were looked for" in text(workplace, "cache", "gc")
    assert (
        "--older-than: 'soon' is no duration"
        in command("cache", "gc", "--older-than", "soon", code=2)["error"]
    )


def test_gc_never_under_a_run(workplace: Workplace, command: Command) -> None:
    workplace.run()
    with file_lock(workplace.warehouse / "locks" / "abt" / "US.lock", timeout_s=0, owner="abt in US"):
        failed = command("cache", "gc", code=75)
        assert "abt/US" in failed["error"]
        assert "abt/US" in command("invalidate", "LLMLogic", "--all", "--reason", "x", code=75)["error"]


def test_optimize_leaves_the_answers(workplace: Workplace, command: Command) -> None:
    workplace.run()
    workplace.run("--set", "search.top_k=2")
    tables = command("cache", "optimize")["tables"]
    assert tables["entries"]["files"] < tables["entries"]["files_before"]
    command("cache", "optimize", "--z-order")
    assert command("cache", "verify")["damage"] == []
    assert workplace.run("--set", "search.top_k=2").computed == 0
    assert "old files deleted" in text(workplace, "cache", "optimize")


def test_verify_finds_nothing_then_damage(workplace: Workplace, command: Command) -> None:
    workplace.run()
    found = command("cache", "verify")
    assert found["damage"] == [] and found["untyped"] == 0 and found["values"] == found["rows"] > 0
    assert command("cache", "verify", "LLMCompletion")["rows"] == 6
    assert "Did you mean 'LLMLogic'?" in command("cache", "verify", "LLMLogik", code=2)["error"]
    file = next((workplace.warehouse / "cache" / "entries" / "builder=LLMCompletion").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-30])
    (damage,) = command("cache", "verify", code=4)["damage"]
    assert damage["file"].endswith(file.name)
    assert (damage["builder"], damage["key"]) == ("LLMCompletion", None)
    done = CliRunner().invoke(app, ["cache", "verify", "--path", str(workplace.warehouse / "cache")])
    assert done.exit_code == 4 and "LLMCompletion (whole file): " in done.stdout


def test_export_typed(workplace: Workplace, command: Command, tmp_path: Path) -> None:
    workplace.catalog({"p1": "red \u00e4 lamp", "p2": 'blue, "lamp"', "p3": "tea cup"})
    workplace.run()
    workplace.run("--set", "search.top_k=1")
    for form in ("parquet", "csv", "jsonl"):
        told = command("cache", "export", "LLMLogic", str(tmp_path / f"out.{form}"))
        assert told["rows"] == 3 and told["typed"]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names[:4] == ["merchant", "market", "product_id", "value"]
    recs = dict(zip(table["product_id"].to_pylist(), table["value"].to_pylist(), strict=True))
    assert recs == workplace.recs()
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        assert {row["product_id"]: json.loads(row["value"]) for row in csv.DictReader(file)} == recs
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert {row["product_id"]: row["value"] for row in map(json.loads, lines)} == recs
    command("cache", "export", "ProductEmbedding", str(tmp_path / "vectors.parquet"))
    assert len(pq.read_table(tmp_path / "vectors.parquet")["value"][0].as_py()) == 384
    assert "Known: " in command("cache", "export", "LLMLogi", str(tmp_path / "x.csv"), code=2)["error"]
    assert ".parquet, .csv or .jsonl" in command("cache", "export", "LLMLogic", "x.xls", code=2)["error"]


def test_show_decodes_and_tells_the_history(workplace: Workplace, command: Command) -> None:
    workplace.run()
    workplace.catalog({"p1": "changed \u00e4", "p2": "blue table lamp", "p3": "green desk lamp"})
    workplace.run()
    found = command("cache", "show", "ProductEmbeddingString", '["abt", "US", "p1"]')
    assert [(e["current"], e["value"]) for e in found["entries"]] == [
        (True, "changed \u00e4"),
        (False, "red table lamp"),
    ]
    assert all(len(e["entry_id"]) == 32 and e["ts"] for e in found["entries"])
    shown = text(workplace, "cache", "show", "ProductEmbedding", "changed \u00e4")
    assert "float32[384]" in shown and "- current" in shown
    missing = command("cache", "show", "LLMLogic", '["abt","US","p9"]', code=2)["error"]
    assert 'Some that it has: ["abt","US","p1"]' in missing
    assert "Known: " in command("cache", "show", "Nothing", "x", code=2)["error"]
    assert "- earlier, " in text(workplace, "cache", "show", "ProductEmbeddingString", '["abt", "US", "p1"]')


def test_an_invalidated_key_is_computed_again_and_nothing_else(
    workplace: Workplace, command: Command
) -> None:
    first = workplace.run()
    recs = workplace.recs()
    key = '["abt","US","p1"]'
    promised = command("invalidate", "LLMSuggestions", "--keys", key, "--reason", "why not", "--dry-run")
    assert (promised["rows"], promised["keys"]) == (1, 1)
    assert workplace.run().computed == 0
    told = command(
        "invalidate", "LLMSuggestions", "--keys", key, "--keys", '["abt","US","p9"]', "--reason", "r"
    )
    assert told["rows"] == 1 and told["keys_without_entries"] == ['["abt","US","p9"]']
    again = workplace.run()
    assert computed(again) == {"LLMSuggestions": 1} and again.calls == 0
    assert workplace.recs() == recs
    assert workplace.run().computed == 0
    assert first.calls == 6


def test_all_of_a_paid_builder(workplace: Workplace, command: Command) -> None:
    workplace.run()
    told = command("invalidate", "LLMCompletion", "--all", "--reason", "the model was wrong")
    assert told["recompute"]["entries"] == 6 and told["recompute"]["tokens"] > 0
    again = workplace.run()
    assert computed(again) == {"LLMCompletion": 6} and again.calls == 6
    assert "6 keys went" in text(workplace, "invalidate", "LLMCompletion", "--all", "--reason", "again")


def test_which_answer_is_current_does_not_change_with_lost_proofs(
    workplace: Workplace, command: Command
) -> None:
    """Titles there and back: the first answer is current by its trace alone, which an invalidation takes away."""
    workplace.run()
    titles = {"p1": "red table lamp", "p2": "another lamp altogether", "p3": "green desk lamp"}
    first = workplace.recs()
    workplace.catalog({**titles, "p4": "espresso machine", "p5": "coffee grinder", "p6": "espresso cups"})
    workplace.run()
    workplace.catalog(
        {
            **titles,
            "p2": "blue table lamp",
            "p4": "espresso machine",
            "p5": "coffee grinder",
            "p6": "espresso cups",
        }
    )
    assert workplace.run().computed == 0
    shows = ("cache", "export", "LLMLogic")

    def current() -> dict[str, Any]:
        command(*shows, "now.jsonl")
        return {
            row["product_id"]: row["value"]
            for row in map(json.loads, Path("now.jsonl").read_text(encoding="utf-8").splitlines())
        }

    assert current() == first
    command("invalidate", "LLMSuggestions", "--keys", '["abt","US","p4"]', "--reason", "r")
    assert current() == first
    assert computed(workplace.run()) == {"LLMSuggestions": 1}
    assert current() == first


def test_the_reason_is_kept(workplace: Workplace, command: Command) -> None:
    from featurekit_spark.cache.care import CARE_GROUP
    from featurekit_spark.cache.delta import DeltaCache

    workplace.run()
    command(
        "invalidate", "LLMLogic", "--keys", '[["abt","US","p1"],["abt","US","p2"]]', "--reason", "\u00e4h"
    )
    record = DeltaCache(str(workplace.warehouse / "cache")).last_run(CARE_GROUP)
    assert record is not None
    assert record.record["reason"] == "\u00e4h" and record.record["care"] == "invalidate"
    assert record.record["keys_asked"] == ['["abt","US","p1"]', '["abt","US","p2"]']


def test_what_to_invalidate_must_be_said(workplace: Workplace, command: Command, tmp_path: Path) -> None:
    workplace.run()
    assert "--keys KEY" in command("invalidate", "LLMLogic", "--reason", "x", code=2)["error"]
    both = ("--all", "--keys", "x", "--reason", "x")
    assert "--keys KEY" in command("invalidate", "LLMLogic", *both, code=2)["error"]
    assert (
        "Did you mean 'LLMLogic'"
        in command("invalidate", "LLMLogik", "--all", "--reason", "x", code=2)["error"]
    )
    keys = tmp_path / "keys.txt"
    keys.write_text('["abt","US","p1"]\n\n["abt", "US", "p2"]\n', encoding="utf-8")
    told = command("invalidate", "LLMLogic", "--keys-file", str(keys), "--reason", "x", "--dry-run")
    assert told["keys"] == 2
