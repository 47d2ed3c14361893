"""What scripts/bench/warm changes between runs, and what each run may compute: a shop on disk, chains of edits, counts.

Expected counts come from the catalogs and the stand-in's answers, not from the library's own bookkeeping.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common

from featurekit_spark.apps.product_recs.suggestions import parse_suggestions, render
from featurekit_spark.testing.chat import offline_answer
from featurekit_spark.testing.samples import delete_products, edit_prices, edit_titles

TEMPLATE = "get recommendations for {title}"
OTHER_TEMPLATE = "find recommendations for {title}"
TOP_K = 10
SUGGESTIONS = 3
SOURCES = {"ProductIds", "ProductEmbeddingString"}

OWN_MODULE = '''"""A logic builder of a user's own, without a version: what it computes is known by its code."""

import pyarrow as pa

from featurekit_spark import FeatureBuilder
from featurekit_spark.apps.product_recs import LLMLogic


class Shortlist(FeatureBuilder):
    key = ("merchant", "market", "product_id")
    deps = (LLMLogic,)
    value = pa.list_(pa.string())

    def build(self, inputs, config, context):
        return [recs[:3] for recs in inputs["LLMLogic"]]
'''
COMMENTED = OWN_MODULE.replace(
    "        return", "        # The first three are shown without scrolling.\n        return"
)


@dataclass(frozen=True)
class Step:
    """An edit and the run after it. Without a `name` it only prepares the next one; `target` is for 22,000 products.

    `idle`: nothing at all may be computed, sources aside. `any_searches`: as many as it takes, the matrix is another.
    """

    name: str | None
    edit: Callable[[Shop], None] = lambda shop: None
    merchant: str = "demo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    ratio: float | None = None
    idle: bool = False
    any_searches: bool = False


@dataclass
class Known:
    """What earlier runs on a warehouse asked, embedded and searched."""

    prompts: set[str] = field(default_factory=set)
    embedded: set[str] = field(default_factory=set)
    searched: dict[tuple[Any, ...], set[str]] = field(default_factory=dict)


class Shop:
    """Catalogs, settings and a warehouse in one folder, and the runs over them."""

    def __init__(self, folder: Path, model: _common.CountingModel, *, products: int) -> None:
        self.folder, self.model = folder, model
        self.warehouse = folder / "warehouse"
        self.catalogs = _common.Catalogs(folder, {"demo": products, "other": max(products // 20, 20)})
        self.reset()

    def reset(self) -> None:
        """Catalogs, settings and own module as they were for the cold run."""
        self.catalogs.reset()
        (self.folder / "conf/merchants").mkdir(parents=True, exist_ok=True)
        settings = {
            "warehouse": str(self.warehouse),
            "product_db": {"path": str(self.catalogs.path)},
            "llm": self.model.settings,
            "search": {"top_k": TOP_K},
        }
        (self.folder / "conf/bench.yaml").write_text(json.dumps(settings))
        (self.folder / "conf/merchants/demo.yaml").unlink(missing_ok=True)
        (self.folder / "own").mkdir(exist_ok=True)
        (self.folder / "own/own_logic.py").write_text(OWN_MODULE)

    def run(self, engine: str, step: Step) -> tuple[_common.Ran, int]:
        """One run as a process of its own, and the requests that reached the model."""
        program = (
            [str(_common.SUBMIT), str(_common.ROOT / "jobs/run_logic.py")]
            if engine == "submit"
            else [str(_common.BIN / "featurekit"), "run", "--engine", engine]
        )
        command = [*program, "--merchant", step.merchant, "--market", "US", "--output", "json"]
        command += ["--conf-file", str(self.folder / "conf/bench.yaml")]
        command += [word for name, value in step.settings.items() for word in ("--set", f"{name}={value}")]
        before = self.model.requests()
        ran = _common.timed(command, cwd=self.folder, env={"PYTHONPATH": str(self.folder / "own")})
        return ran, self.model.requests() - before

    def cold(self, engine: str, repeat: int) -> dict[str, Any]:
        """Runs on an empty warehouse; the last one is kept for the changes."""
        self.reset()
        step = Step("cold")
        measured = []
        for _ in range(repeat):
            shutil.rmtree(self.warehouse, ignore_errors=True)
            measured.append((*self.run(engine, step), Expected.of(self, step, Known())))
        _common.replace_folder(self.warehouse, self.folder / f"cold.{engine}")
        return _row(step, engine, measured, None)

    def warm(
        self, engine: str, changes: Sequence[str], repeat: int, *, cold_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """A row for each change that was asked for and that the engine has."""
        for chain in CHAINS:
            names = [step.name for step in chain]
            wanted = {name for name in names if name in changes and (engine != "submit" or name == "none")}
            if not wanted:
                continue
            steps = chain[: max(names.index(name) for name in wanted) + 1]
            measured: dict[str, list[Any]] = {name: [] for name in wanted if name}
            for _ in range(repeat):
                for step, ran, calls, expected in self._follow(engine, steps):
                    if step.name in wanted:
                        measured[step.name].append((ran, calls, expected))
            for step in steps:
                if step.name in wanted:
                    yield _row(step, engine, measured[step.name], cold_seconds)

    def _follow(
        self, engine: str, steps: Sequence[Step]
    ) -> Iterator[tuple[Step, _common.Ran, int, Expected]]:
        """The steps of a chain from the cold warehouse on."""
        self.reset()
        _common.replace_folder(
            self.folder / f"cold.{'spark' if engine == 'submit' else engine}", self.warehouse
        )
        known = Known()
        Expected.of(self, Step("cold"), known)
        for step in steps:
            step.edit(self)
            expected = Expected.of(self, step, known)
            yield step, *self.run(engine, step), expected


@dataclass(frozen=True)
class Expected:
    """The counts that a run must have; None where any number will do."""

    products: int
    calls: int
    embeddings: int
    searches: int | None

    @staticmethod
    def of(shop: Shop, step: Step, known: Known) -> Expected:
        """What the run of a step lacks on a warehouse where `known` is done; afterwards that is known as well."""
        with (shop.catalogs.path / f"{step.merchant}_US.csv").open(encoding="utf-8", newline="") as file:
            titles = {row["product_id"]: row["title"] for row in csv.DictReader(file)}
        own = shop.folder / f"conf/merchants/{step.merchant}.yaml"
        template = json.loads(own.read_text())["prompt_template"] if own.exists() else TEMPLATE
        prompts = set(render(template, {"title": list(titles.values())}))
        wanted = {
            text
            for prompt in prompts
            for text in parse_suggestions(offline_answer(prompt, suggestions=SUGGESTIONS), limit=SUGGESTIONS)
        }
        embedded = wanted | set(titles.values())
        matrix = (step.merchant, step.settings.get("search.top_k", TOP_K), frozenset(titles.items()))
        searched = known.searched.setdefault(matrix, set())
        searches: int | None = len(wanted - searched)
        if step.any_searches:
            searches = None
        elif step.edit is _delete:
            searches = _lists_that_held(shop, wanted, set(titles))
        expected = Expected(
            len(titles), len(prompts - known.prompts), len(embedded - known.embedded), searches
        )
        known.prompts |= prompts
        known.embedded |= embedded
        searched |= wanted
        return expected


def _lists_that_held(shop: Shop, texts: set[str], present: set[str]) -> int:
    """Of the texts, how many had a product in their list that is no longer present."""
    from featurekit_spark.apps.product_recs import ProductEmbeddingSearcher
    from featurekit_spark.cache.delta import DeltaCache

    table = DeltaCache(str(shop.warehouse / "cache")).read(ProductEmbeddingSearcher)
    return sum(
        text in texts and any(hit["product_id"] not in present for hit in hits or ())
        for text, hits in zip(table["text"].to_pylist(), table["value"].to_pylist(), strict=True)
    )


def _row(step: Step, engine: str, measured: Sequence[Any], cold_seconds: float | None) -> dict[str, Any]:
    """One line of the table: medians, the counts of the last run, and what was wrong in any of them."""
    wrong = []
    for ran, calls, expected in measured:
        report = ran.report
        computed = {name: counts["computed"] for name, counts in report["builders"].items()}
        counts = {
            "products": report["products"],
            "calls": calls,
            "embeddings": computed.get("ProductEmbedding", 0),
            "searches": computed.get("ProductEmbeddingSearcher", 0),
        }
        for name, found in counts.items():
            must = getattr(expected, name)
            if must is not None and found != must:
                wrong.append(f"{name} {found}, must be {must}")
        others = {name: n for name, n in computed.items() if n and name not in SOURCES}
        if step.idle and others:
            wrong.append(f"computed {others}, must be nothing")
        if report["status"] != "ok":
            wrong.append(f"status {report['status']!r}")
    seconds = _common.median(ran.seconds for ran, *_ in measured)
    ratio = seconds / cold_seconds if cold_seconds else 1.0
    limit = 2.5 if engine == "submit" else step.seconds
    return {
        "change": step.name,
        "engine": engine,
        **counts,
        "expected": vars(measured[-1][2]),
        "seconds": seconds,
        "each": [round(ran.seconds, 2) for ran, *_ in measured],
        "inside_s": _common.median(ran.report["wall_seconds"] for ran, *_ in measured),
        "ratio": round(ratio, 3),
        "target": f"at most {limit} s" if limit else f"at most {step.ratio} of cold" if step.ratio else None,
        "met": seconds <= limit if limit else ratio <= step.ratio if step.ratio else None,
        "wrong": "; ".join(dict.fromkeys(wrong)),
    }


def _delete(shop: Shop) -> None:
    shop.catalogs.edit(delete_products)


def _comment(shop: Shop) -> None:
    (shop.folder / "own/own_logic.py").write_text(COMMENTED)


def _template(shop: Shop) -> None:
    (shop.folder / "conf/merchants/demo.yaml").write_text(json.dumps({"prompt_template": OTHER_TEMPLATE}))


_OWN = {"logic_builders": "[own_logic:Shortlist]"}

# Each chain starts from the cold warehouse; its steps follow one another on the same copy.
CHAINS: tuple[tuple[Step, ...], ...] = (
    (Step("none", seconds=0.6, idle=True),),
    (Step("prices", lambda shop: shop.catalogs.edit(edit_prices), seconds=1.0, idle=True),),
    (
        Step("titles", lambda shop: shop.catalogs.edit(edit_titles), ratio=0.35, any_searches=True),
        Step("titles_back", lambda shop: shop.catalogs.edit(), seconds=1.0),
    ),
    (
        Step("top_k", settings={"search.top_k": 2 * TOP_K}, ratio=0.5),
        Step("top_k_back", seconds=1.0),
    ),
    (
        Step("deleted", _delete, ratio=0.35),
        Step("deleted_back", lambda shop: shop.catalogs.edit()),
    ),
    (
        Step(None, merchant="other"),
        Step("template", _template),
        Step("template_other", merchant="other", idle=True),
    ),
    (
        Step(None, settings=_OWN),
        Step("comment", _comment, settings=_OWN, seconds=0.6, idle=True),
    ),
)
