"""The builders of product recommendations, from a merchant's catalog to ranked product ids.

Owns what they declare and the rules by which suggestions become recommendations. Where catalogs, models and
caches come from is the context's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from featurekit_spark.apps.product_recs.catalog import IdScan, TitleScan
from featurekit_spark.apps.product_recs.suggestions import parse_suggestions, render
from featurekit_spark.builder import FeatureBuilder, Gathered, KeySet, Source, Update, each
from featurekit_spark.embed.text import TextEmbedding
from featurekit_spark.errors import CacheError, ContextError
from featurekit_spark.llm.completion import LLMCompletion
from featurekit_spark.llm.templates import render_jinja
from featurekit_spark.search import OldLists, merge_top_k
from featurekit_spark.search.choice import is_mapped, prepare_search, queries_at_once, search_stored
from featurekit_spark.search.options import Probes
from featurekit_spark.sources.base import is_blank, resolve_dimension

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LLMLogic",
    "LLMProductPrompt",
    "LLMSuggestions",
    "ProductEmbedding",
    "ProductEmbeddingDB",
    "ProductEmbeddingSearcher",
    "ProductEmbeddingString",
    "ProductIds",
    "SimilarProducts",
]

PER_PRODUCT = ("merchant", "market", "product_id")
PER_MARKET = ("merchant", "market")
RANKED = pa.list_(pa.struct([("product_id", pa.string()), ("score", pa.float64())]))
MATRIX_REF = pa.struct(
    [("hash", pa.string()), ("rows", pa.int64()), ("dim", pa.int64()), ("path", pa.string())]
)

Ranked = list[dict[str, Any]]


def top_k(context: Any) -> int:
    """How many recommendations the merchant wants."""
    return int(context.merchant_config.get("top_k", 10))


def product_db(context: Any) -> Any:
    """`context.product_db`; a ContextError where there is none."""
    if context.product_db is None:
        raise ContextError("the context has no product_db; give it one: Context(product_db=...)")
    return context.product_db


def catalog_version(context: Any) -> str | None:
    """The snapshot that the product DB is at; None where it cannot say."""
    db = product_db(context)
    version: str | None = db.version() if hasattr(db, "version") else None
    return version


class ProductIds(KeySet):
    """(merchant, market) -> ids of all products, sorted; those without a title are among them."""

    key = PER_MARKET
    of = "product_id"
    value = pa.list_(pa.string())
    version = "1"
    needs = ("product_db",)

    def snapshot_version(self, context: Any) -> str | None:
        return catalog_version(context)

    async def build(self, inputs: pd.DataFrame, config: Any, context: Any) -> list[list[str]]:
        products = await product_db(context).get_products(set())
        ids = sorted(products)
        return [ids] * len(inputs)

    def scan(self, group: Mapping[str, Any], config: Any, context: Any) -> IdScan | None:
        """All ids as one column, `product_id`; None where the product DB cannot read itself at once."""
        db = product_db(context)
        return IdScan(db.scan([], dimensions={})) if hasattr(db, "scan") else None


class ProductEmbeddingString(Source[str]):
    """product_id -> the title in the market's dimensions; null where it is missing or white space."""

    key = PER_PRODUCT
    value = pa.string()
    version = "1"
    needs = ("product_db",)

    @dataclass(frozen=True)
    class Config:
        """`attribute`: id of the title. `dimensions`: which variant of a value counts, such as {"locale":
        "de_DE"}."""

        attribute: str = "title"
        dimensions: Mapping[str, str] = field(default_factory=dict)

    def default_config(self, context: Any) -> Config:
        merchant = context.merchant_config
        return self.Config(merchant.get("title_attribute", "title"), merchant.get("dimensions", {}))

    def snapshot_version(self, context: Any) -> str | None:
        return catalog_version(context)

    async def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[str | None]:
        wanted = set(inputs["product_id"])
        products = await product_db(context).get_products({config.attribute}, wanted)
        titles: list[str | None] = []
        for product_id in inputs["product_id"]:
            variants = products.get(product_id, {}).get(config.attribute, {})
            title = resolve_dimension(variants, config.dimensions)
            titles.append(None if is_blank(title) else title)
        return titles

    def scan(self, group: Mapping[str, Any], config: Config, context: Any) -> TitleScan | None:
        """All titles as two columns, `product_id` and `value`; None where the product DB cannot do that."""
        db = product_db(context)
        if not hasattr(db, "scan"):
            return None
        return TitleScan(db.scan([config.attribute], dimensions=config.dimensions), config.attribute)


class ProductEmbedding(TextEmbedding):
    """text -> its vector."""

    version = "1"


class ProductEmbeddingDB(FeatureBuilder[dict[str, Any]]):
    """(merchant, market) -> reference to the matrix of all products' vectors, in order of ids.

    Products without a title are left out. Each embedder has a matrix of its own: queries of one never meet the
    matrix of another, and a new one answers once it is whole (`NotBuiltError` until then).
    """

    key = PER_MARKET
    deps = (ProductEmbedding.on(text=ProductEmbeddingString).over(ProductIds),)
    value = MATRIX_REF
    version = "1"
    needs = ("embedder", "matrices")

    @dataclass(frozen=True)
    class Config:
        """Whose vectors are in the matrix: the embedder's identity."""

        embedder: str

    @dataclass(frozen=True)
    class Rounded(Config):
        """And the type that they are rounded to."""

        storage: str

    def default_config(self, context: Any) -> Config:
        storage = context.merchant_config.get("storage", "float32")
        if storage == "float32":
            return self.Config(context.embedder.identity)
        return self.Rounded(context.embedder.identity, storage)

    def build_one(self, inputs: dict[str, Any], config: Config, context: Any) -> dict[str, Any]:
        if config.embedder != context.embedder.identity:
            raise ContextError(
                f"{self.name} is configured for {config.embedder!r}, but context.embedder is "
                f"{context.embedder.identity!r}. Give the context the embedder you mean; the config follows."
            )
        gathered: Gathered[Any] = inputs["ProductEmbedding"]
        rows = sorted((k, v) for k, v in zip(gathered.keys, gathered.values, strict=True) if v is not None)
        ids = [product_id for product_id, _ in rows]
        vectors = (
            np.stack([vector for _, vector in rows])
            if rows
            else np.empty((0, context.embedder.dim), np.float32)
        )
        storage = config.storage if isinstance(config, self.Rounded) else "float32"
        ref = context.matrices.put(ids, vectors, storage=storage)
        return {"hash": ref.hash, "rows": ref.rows, "dim": ref.dim, "path": ref.path}


class ProductEmbeddingSearcher(FeatureBuilder[Ranked]):
    """text -> the nearest products with their scores (cosine, 6 decimals), best first, equal ones by id."""

    key = ("merchant", "market", "text")
    deps = (ProductEmbeddingDB, ProductEmbedding)
    follows = ProductEmbeddingDB
    value = RANKED
    version = "1"
    needs = ("matrices",)

    @dataclass(frozen=True)
    class Config:
        """One product more than `top_k` is searched, so that `top_k` are left without the product itself."""

        top_k: int = 10

    @dataclass(frozen=True)
    class Approximate(Config):
        """Of inverted lists: how many there are (null: by the matrix), and at how many of them a query looks."""

        lists: int | None = None
        nprobe: int = 16

    @staticmethod
    def probes(config: Config) -> Probes | None:
        """What an approximate search looks at; None for an exact one. Of the config alone, as it names the value."""
        searcher = ProductEmbeddingSearcher
        return Probes(config.nprobe, config.lists) if isinstance(config, searcher.Approximate) else None

    def default_config(self, context: Any) -> Config:
        options = getattr(context.matrices, "options", None)
        if options is not None and options.mode == "ivf":
            return self.Approximate(top_k(context), options.lists, options.nprobe)
        return self.Config(top_k(context))

    def distributes(self, shared: Mapping[str, Any], config: Config, context: Any) -> int:
        ref, probes = shared["ProductEmbeddingDB"], self.probes(config)
        if probes is not None:
            prepare_search(context.matrices, ref, probes)
        elif is_mapped(context.matrices, ref):
            return 0
        return queries_at_once(ref)

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[Ranked]:
        ref = inputs["ProductEmbeddingDB"].iloc[0]
        queries = np.stack(list(inputs["ProductEmbedding"]))
        probes = self.probes(config)
        if probes is not None or not is_mapped(context.matrices, ref):
            found = search_stored(context.matrices, ref, queries, config.top_k + 1, probes=probes)
            return [
                [
                    {"product_id": hit, "score": score}
                    for hit, score in zip(ids, scores, strict=True)
                    if hit is not None
                ]
                for ids, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True)
            ]
        matrix = context.matrices.open(ref)
        scores, rows = matrix.index.ranked(queries, config.top_k + 1)
        return ranked_lists(matrix.ids, scores, rows)

    def update(self, inputs: pd.DataFrame, before: pd.DataFrame, config: Config, context: Any) -> list[Any]:
        """Earlier lists, with the products that are new or have another vector merged in."""
        now, then = inputs["ProductEmbeddingDB"].iloc[0], before["ProductEmbeddingDB"].iloc[0]
        if self.probes(config) is not None or not is_mapped(context.matrices, now):
            return [Update.REBUILD] * len(inputs)
        try:
            matrix, change = context.matrices.open(now), context.matrices.change(then, now)
        except CacheError:  # the earlier matrix is no longer there
            return [Update.REBUILD] * len(inputs)
        if change.too_large:
            return [Update.REBUILD] * len(inputs)
        old = OldLists.of(before["value"], config.top_k + 1, change.kept)
        queries = np.stack(list(inputs["ProductEmbedding"]))
        scores, rows, settled = merge_top_k(matrix.index, queries, old, change)
        same = settled & ((rows == old.rows) & (scores == old.scores)).all(axis=1)
        new = settled & ~same
        found: list[Any] = [Update.KEEP if kept else Update.REBUILD for kept in same.tolist()]
        for row, ranked in zip(
            np.flatnonzero(new), ranked_lists(matrix.ids, scores[new], rows[new]), strict=True
        ):
            found[row] = ranked
        return found


class LLMProductPrompt(FeatureBuilder[str]):
    """product_id -> what the model is asked about it; null without a title."""

    key = PER_PRODUCT
    deps = (ProductEmbeddingString,)
    value = pa.string()
    version = "1"
    light = True

    @dataclass(frozen=True)
    class Config:
        """`engine` fields: text with the named field `{title}`; `{{` and `}}` stand for braces. `engine` jinja: a Jinja
        template that reads `title`."""

        template: str = "get recommendations for {title}"
        engine: Literal["fields", "jinja"] = "fields"

    def default_config(self, context: Any) -> Config:
        merchant = context.merchant_config
        return self.Config(
            merchant.get("prompt_template", self.Config.template),
            merchant.get("template_engine", self.Config.engine),
        )

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> Sequence[str | Exception]:
        fields = {"title": list(inputs["ProductEmbeddingString"])}
        if config.engine == "jinja":
            return render_jinja(config.template, fields)
        return render(config.template, fields)


class LLMSuggestions(FeatureBuilder[list[str]]):
    """product_id -> the descriptions in the model's answer, in its order, no two alike; empty without an
    answer."""

    key = PER_PRODUCT
    deps = (LLMCompletion.on(prompt=LLMProductPrompt),)
    value = pa.list_(pa.string())
    version = "1"
    light = True
    accepts_null = True

    @dataclass(frozen=True)
    class Config:
        """At most `limit` suggestions are taken from an answer."""

        limit: int = 10

    def default_config(self, context: Any) -> Config:
        return self.Config(context.merchant_config.get("suggestions", self.Config.limit))

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[list[str]]:
        return [parse_suggestions(answer, limit=config.limit) for answer in inputs["LLMCompletion"]]


class LLMLogic(FeatureBuilder[list[str]]):
    """product_id -> recommended ids, best first, never itself: what is nearest to the model's suggestions.

    A product's score is its best over all suggestions; equal scores go by id. Null without a title.
    """

    hosted = "featurekit_spark.apps.product_recs.hosted:LLMLogic"
    key = PER_PRODUCT
    deps = (
        ProductEmbeddingString,
        LLMSuggestions,
        ProductEmbeddingSearcher.on(text=each(LLMSuggestions)),
    )
    value = pa.list_(pa.string())
    version = "1"
    light = True

    @dataclass(frozen=True)
    class Config:
        """How many products are recommended."""

        top_k: int = 10

    def default_config(self, context: Any) -> Config:
        return self.Config(top_k(context))

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[list[str]]:
        return [
            [product_id for product_id, _ in merged(found, leave_out=itself)[: config.top_k]]
            for itself, found in zip(inputs["product_id"], inputs["ProductEmbeddingSearcher"], strict=True)
        ]


class SimilarProducts(FeatureBuilder[Ranked]):
    """product_id -> the products with the nearest titles and their scores, never itself; needs no model."""

    hosted = "featurekit_spark.apps.product_recs.hosted:SimilarProducts"
    key = PER_PRODUCT
    deps = (ProductEmbeddingSearcher.on(text=ProductEmbeddingString),)
    value = RANKED
    version = "1"
    light = True

    @dataclass(frozen=True)
    class Config:
        """How many products are recommended."""

        top_k: int = 10

    def default_config(self, context: Any) -> Config:
        return self.Config(top_k(context))

    def build(self, inputs: pd.DataFrame, config: Config, context: Any) -> list[Ranked]:
        return without_itself(inputs["product_id"], inputs["ProductEmbeddingSearcher"], config.top_k)


def without_itself(products: Iterable[str], lists: Iterable[Ranked], top_k: int) -> list[Ranked]:
    """The best of each product's list that are another product."""
    return [
        [hit for hit in found if hit["product_id"] != itself][:top_k]
        for itself, found in zip(products, lists, strict=True)
    ]


def ranked_lists(ids: Sequence[str], scores: Any, rows: Any) -> list[Ranked]:
    """Searches' answers (both [q, k], empty places score -inf) as values."""
    return [
        [
            {"product_id": ids[row], "score": score}
            for row, score in zip(row_numbers, row_scores, strict=True)
            if score > -np.inf
        ]
        for row_numbers, row_scores in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def merged(lists: list[Ranked | None], *, leave_out: str) -> list[tuple[str, float]]:
    """Several rankings as one: each product with its best score, best first, then by id; a null list is
    none."""
    best: dict[str, float] = {}
    for ranked in lists:
        for hit in ranked or ():
            product_id, score = hit["product_id"], hit["score"]
            if score > best.get(product_id, -np.inf):
                best[product_id] = score
    best.pop(leave_out, None)
    return sorted(best.items(), key=lambda item: (-item[1], item[0]))
