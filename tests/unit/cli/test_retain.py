"""`featurekit cache retain`: by settings or by options, as text and as JSON, and the run after it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from featurekit_spark.cli import app

Workplace = Any


def retain(workplace: Workplace, *arguments: str, code: int = 0, output: str = "json") -> Any:
    where = ("--set", f"warehouse={workplace.warehouse}", "--merchant", "abt", "--market", "US")
    done = CliRunner().invoke(app, ["cache", "retain", *where, *arguments, "--output", output])
    assert done.exit_code == code, done.output + done.stderr
    return json.loads(done.stdout) if output == "json" and code == 0 else done.stdout + done.stderr


def test_settings_say_what_is_kept(workplace: Workplace) -> None:
    assert workplace.run().calls == 6
    assert "there is nothing to do" in retain(workplace, code=2, output="text")
    rule = ("--set", "llm.retention.prompts=hash", "--set", "llm.retention.after_days=0")
    looked = retain(workplace, *rule, "--dry-run")
    assert looked["hash"] == ["prompts"] and looked["dry_run"] is True
    done = retain(workplace, *rule)
    assert done["prompts"] == looked["prompts"] == {"LLMCompletion": 6}
    assert done["repeated_in"] == {"LLMProductPrompt": 6}
    again = workplace.run("--set", "search.top_k=2")
    assert again.code == 0 and again.calls == 0
    assert retain(workplace, *rule)["prompts"] == {}
    cost = CliRunner().invoke(app, ["cost", "--path", f"{workplace.warehouse}/cache", "--output", "json"])
    assert json.loads(cost.stdout)["total"]["calls"] == 6 and json.loads(cost.stdout)["total"]["failed"] == 0


def test_options_stand_in_for_settings(workplace: Workplace) -> None:
    workplace.run()
    assert "no text was stored more than" in retain(workplace, "--hash", "prompts,answers", output="text")
    told = retain(workplace, "--hash", "prompts, answers", "--after", "0s", output="text")
    assert "6 prompts of LLMCompletion are hashes now" in told
    assert "6 answers of LLMCompletion went; whatever needs one again asks and pays again" in told
    assert "earlier versions of the tables" in told
    assert workplace.run().computed == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--hash", "prompt"), "Did you mean 'prompts'?"),
        (("--hash", "answers", "--after", "soon"), "--after"),
    ],
)
def test_wrong_words_are_refused(workplace: Workplace, arguments: tuple[str, ...], told: str) -> None:
    workplace.run()
    assert told in retain(workplace, *arguments, code=2, output="text")
