"""The main job in this process: a catalog in a folder, the command line in, exit code and streams out."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable, QueryBuilder

from featurekit_spark.cli import run_logic_main

TITLES = {
    "p1": "red table lamp",
    "p2": "blue table lamp",
    "p3": "green desk lamp",
    "p4": "espresso machine",
    "p5": "coffee grinder",
    "p6": "espresso cups",
}


@dataclass(frozen=True)
class Ran:
    """What one run left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.rstrip("\n").split("\n")[-1])
        return found

    @property
    def computed(self) -> int:
        return sum(counts["computed"] + counts["error"] for counts in self.summary["builders"].values())

    @property
    def calls(self) -> int:
        return int(self.summary["builders"]["LLMCompletion"]["calls"])


class Workplace:
    """A folder with catalogs and a warehouse. Runs use the local engine."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.catalogs, self.warehouse = folder / "catalogs", folder / "warehouse"
        self.catalogs.mkdir()
        self._capfd = capfd
        self.catalog(TITLES)

    def catalog(
        self,
        titles: dict[str, str] | Sequence[tuple[str, str]],
        *,
        columns: tuple[str, ...] = ("product_id", "title"),
        merchant: str = "abt",
        market: str = "US",
    ) -> None:
        """Write a catalog anew."""
        rows = titles.items() if isinstance(titles, dict) else titles
        with (self.catalogs / f"{merchant}_{market}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([columns, *rows])

    def run(self, *options: str, merchant: str = "abt", market: str = "US", output: str = "json") -> Ran:
        self._capfd.readouterr()
        code = run_logic_main(
            [
                *("--merchant", merchant, "--market", market, "--output", output, "--engine", "local"),
                *("--set", f"product_db.path={self.catalogs}", "--set", f"warehouse={self.warehouse}"),
                *options,
            ]
        )
        return Ran(code, *self._capfd.readouterr())

    def published(self) -> list[dict[str, Any]]:
        """The rows of the recommendations table, in order of product and logic builder."""
        query = QueryBuilder().register("t", DeltaTable(str(self.warehouse / "recommendations")))
        rows = query.execute("SELECT * FROM t ORDER BY product_id, logic_builder").read_all()
        names = rows.schema.names
        return [
            dict(zip(names, values, strict=True))
            for values in zip(*(rows.column(name).to_pylist() for name in names), strict=True)
        ]

    def recs(self) -> dict[str, list[str]]:
        """The published ids by product, of one logic builder."""
        return {row["product_id"]: row["recs"] for row in self.published()}

    def version(self) -> int:
        """How often something was published, and once more for making the table."""
        return int(DeltaTable(str(self.warehouse / "recommendations")).version())


@pytest.fixture
def workplace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, capfd)
