"""The nearest products to one text, for a process that is asked again and again.

Owns what stays open between requests. Its answers are those of `ProductEmbeddingSearcher`, but none of them is stored:
looking one up takes longer than finding it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from featurekit_spark.apps.product_recs import builders, hosted
from featurekit_spark.apps.product_recs.builders import Ranked, ranked_lists
from featurekit_spark.cache.base import FeatureCache
from featurekit_spark.controller import Controller
from featurekit_spark.embed.base import is_blank, is_hosted
from featurekit_spark.errors import NotBuiltError
from featurekit_spark.search.choice import is_mapped, is_prepared
from featurekit_spark.search.matrix import Matrix

__all__ = ["TextSearch"]


class TextSearch:
    """Searches the products of one merchant and market; may be shared by threads.

    Which matrix is the current one is looked up every `refresh_s` seconds; while it has no inverted lists yet and they
    are what is searched, the one before stays. Embeddings that are paid for go through the cache, so that each text is
    paid for once. Raises NotBuiltError where no run has made the matrix or its lists: requests make neither.
    """

    def __init__(
        self,
        context: Any,
        cache: FeatureCache,
        *,
        merchant: str,
        market: str,
        refresh_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context, self._controller = context, Controller(context, cache)
        self._group = (merchant, market)
        self._paid = is_hosted(context.embedder)
        self._builders: Any = hosted if self._paid else builders
        self._refresh_s, self._clock = refresh_s, clock
        self._lock = threading.Lock()
        self._found: tuple[Mapping[str, Any], Matrix | None] | None = None
        self._looked = -np.inf

    def nearest(self, text: str, k: int | None = None) -> Ranked | None:
        """At most `k` products (default: one more than `top_k`, as the builder), best first; None for a blank text."""
        if is_blank(text):
            return None
        query = self._vector(text)
        if query is None:
            return None
        ref, matrix = self._current()
        wanted = k or builders.top_k(self._context) + 1
        if matrix is None:
            return self._searched(ref, query, wanted)
        scores, rows = matrix.index.ranked(query[None], wanted)
        return ranked_lists(matrix.ids, scores, rows)[0]

    def _searched(self, ref: Mapping[str, Any], query: Any, wanted: int) -> Ranked:
        """By the builder's own ways, in a matrix that is not mapped."""
        import pandas as pd

        searcher, config = self._searcher()
        config = replace(config, top_k=wanted - 1)
        inputs = pd.DataFrame({"ProductEmbeddingDB": [ref], "ProductEmbedding": [query]})
        found: list[Ranked] = searcher.build(inputs, config, self._context)
        return found[0]

    def _searcher(self) -> tuple[Any, Any]:
        """The builder and its config."""
        searcher: Any = self._builders.ProductEmbeddingSearcher()
        return searcher, searcher.default_config(self._context)

    def _vector(self, text: str) -> Any:
        if self._paid:
            return self._controller.get(self._builders.ProductEmbedding, (text,)).require()
        return np.asarray(self._context.embedder.embed([text]), dtype=np.float32)[0]

    def _current(self) -> tuple[Mapping[str, Any], Matrix | None]:
        with self._lock:
            if self._found is None or self._clock() - self._looked >= self._refresh_s:
                ref: Any = self._controller.get(self._builders.ProductEmbeddingDB, self._group).require()
                self._found = self._opened(ref) or self._found
                self._looked = self._clock()
            if self._found is None:
                raise NotBuiltError(
                    f"The inverted lists of ProductEmbeddingDB{list(self._group)} were never made. Run the products of "
                    "the merchant and market first (session.run): a run makes them."
                )
            return self._found

    def _opened(self, ref: Mapping[str, Any]) -> tuple[Mapping[str, Any], Matrix | None] | None:
        """None while inverted lists are to be searched and are not there yet."""
        store, (searcher, config) = self._context.matrices, self._searcher()
        probes = searcher.probes(config)
        if probes is not None:
            return (ref, None) if is_prepared(store, ref, probes) else None
        return ref, store.open(ref) if is_mapped(store, ref) else None
