"""One process of scripts/bench/search: times the search and what it is compared with, in turn, on one thread.

Owns the data, the rounds and their medians; prints one JSON object. Started with one thread of linear algebra, by the
Python of an environment that may have FAISS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from featurekit_spark.search import FlatIndex, OldLists, kernel, merge_top_k, top_k
from featurekit_spark.search.incremental import change_between

BLOCKS = [(512, 4096), (1024, 2048), (2048, 1024), (2048, 2048), (2048, 4096), (1024, 8192), (4096, 1024)]
TRIED = 22_000  # rows with which the blocks of the bare product are chosen
MARGINS = (0, 1, 2, 4)
CHANGED = 0.01
Run = Callable[[], object]


def unit(random: np.random.Generator, rows: int, dim: int) -> Any:
    vectors = random.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def seconds(run: Run) -> float:
    """CPU seconds: of one thread that waits for nothing they are wall seconds, without those of other processes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def rounds(runs: dict[str, Run], repeat: int) -> dict[str, list[float]]:
    """Seconds of each, in turn; a first round does not count, and every other round goes backwards."""
    names = list(runs)
    for name in names:
        runs[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeat):
        for name in names if number % 2 else reversed(names):
            taken[name].append(seconds(runs[name]))
    return taken


def product(queries: Any, matrix: Any, block: tuple[int, int]) -> Run:
    """The bare product, block by block into one buffer."""
    width = min(block[0], len(queries)), min(block[1], len(matrix))
    buffer = np.empty(width[0] * width[1], dtype=np.float32)

    def run() -> None:
        for q in range(0, len(queries), width[0]):
            some = queries[q : q + width[0]]
            for m in range(0, len(matrix), width[1]):
                rows = matrix[m : m + width[1]]
                out = buffer[: len(some) * len(rows)].reshape(len(some), len(rows))
                np.matmul(some, rows.T, out=out)

    return run


def whole_rows(queries: Any, matrix: Any, k: int) -> Run:
    """The product of 512 queries with everything, then argpartition of whole rows."""

    def run() -> None:
        for q in range(0, len(queries), 512):
            scores = queries[q : q + 512] @ matrix.T
            at = np.argpartition(scores, -k, axis=1)[:, -k:]
            np.argsort(-np.take_along_axis(scores, at, axis=1), axis=1)

    return run


def ratios(taken: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(taken, base, strict=True)), 4)


def compared(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(7)
    matrix, queries = unit(random, rows, options.dim), unit(random, options.queries, options.dim)
    index, k = FlatIndex(matrix), options.k
    together = min(len(queries), kernel._QUERIES)
    ours = (together, max(kernel._LEAST_ROWS, kernel._SCORES // together))
    tried = {
        block: min(seconds(product(queries, matrix, block)) for _ in range(3)) for block in {*BLOCKS, ours}
    }
    best = min(tried, key=tried.__getitem__)
    runs: dict[str, Run] = {
        "product": product(queries, matrix, best),
        "product, our blocks": product(queries, matrix, ours),
        "ours": lambda: index.search(queries, k),
        "ours, top_k with its checks": lambda: top_k(queries, matrix, k),
        "ours, index only": lambda: FlatIndex(matrix),
    }
    if options.faiss:
        import faiss

        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(options.dim)
        flat.add(matrix)
        runs["FAISS IndexFlatIP"] = lambda: flat.search(queries, k)
        expected = flat.search(queries, k)[1]
        found = index.search(queries, k)[1]
        agree = float((np.sort(expected, axis=1) == np.sort(found, axis=1)).mean())
    if options.whole_rows:
        runs["product + argpartition"] = whole_rows(queries, matrix, k)
    taken = rounds(runs, options.repeat)
    flops = 2 * rows * len(queries) * options.dim
    report = {
        "rows": rows,
        "block": list(best),
        "our_block": list(ours),
        "gflops": round(flops / min(taken["product"]) / 1e9, 1),
        "ms": {name: round(1000 * statistics.median(times), 1) for name, times in taken.items()},
        "ratio": {name: ratios(times, taken["product"]) for name, times in taken.items()},
        "least_ratio": {name: round(min(times) / min(taken["product"]), 4) for name, times in taken.items()},
    }
    if options.faiss:
        report["same_ids_as_faiss"] = round(agree, 6)
    return report


def changed(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Lists after 1 % of rows got other vectors: merged with a search of those, against a full search."""
    random = np.random.default_rng(11)
    before, queries = unit(random, rows, options.dim), unit(random, options.queries, options.dim)
    moved = random.choice(rows, int(rows * CHANGED), replace=False)
    after = before.copy()
    after[moved] = unit(random, len(moved), options.dim)
    ids = [f"p{row:07}" for row in range(rows)]
    full, k = FlatIndex(after, ids=ids), options.k
    change = change_between(before, ids, after, ids)
    scores, found = FlatIndex(before, ids=ids).ranked(queries, k + max(MARGINS))
    lists = [
        [{"product_id": ids[row], "score": score} for row, score in zip(at, values, strict=True)]
        for at, values in zip(found.tolist(), scores.tolist(), strict=True)
    ]
    expected = full.ranked(queries, k)
    shares: dict[int, float] = {}

    def merged(margin: int) -> tuple[Any, Any]:
        old = OldLists.of([ranked[: k + margin] for ranked in lists], k, change.kept, margin=margin)
        values, at, settled = merge_top_k(full, queries, old, change)
        left = np.flatnonzero(~settled)
        shares[margin] = len(left) / len(queries)
        if len(left):
            values[left, :k], at[left, :k] = full.ranked(queries[left], k)
        return values[:, :k], at[:, :k]

    for margin in MARGINS:
        for one, other in zip(merged(margin), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    runs: dict[str, Run] = {f"merged, margin {margin}": partial(merged, margin) for margin in MARGINS}
    runs |= {
        "full search": lambda: full.ranked(queries, k),
        "what changed, once per matrix": lambda: change_between(before, ids, after, ids),
    }
    taken = rounds(runs, options.repeat)
    return {
        "rows": rows,
        "changed": len(moved),
        "ms": {name: round(1000 * statistics.median(times), 1) for name, times in taken.items()},
        "ratio": {name: ratios(times, taken["full search"]) for name, times in taken.items()},
        "searched_again": {str(margin): round(share, 4) for margin, share in shares.items()},
        "bytes_per_list": {
            str(margin): round(
                np.mean([len(json.dumps(one[: k + margin], separators=(",", ":"))) for one in lists])
            )
            for margin in MARGINS
        },
    }


def main(words: Iterable[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, action="append")
    for name in ("queries", "dim", "k", "repeat"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("faiss", "whole-rows", "incremental"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(list(words))
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    report: dict[str, Any] = {"searches": [compared(rows, options) for rows in options.rows]}
    if options.incremental:
        report["changed"] = [changed(rows, options) for rows in options.rows]
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
