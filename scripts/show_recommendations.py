"""Prints some recommendations by title: what the main job wrote, read without Spark.

scripts/show_recommendations.py TABLE CATALOG --merchant demo --market US [--products 4] [--recs 5]
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from deltalake import DeltaTable, QueryBuilder
from rich.console import Console
from rich.text import Text
from rich.tree import Tree


def main() -> int:
    parser = argparse.ArgumentParser(description="Prints some recommendations by title.")
    parser.add_argument("table", help="the recommendations table")
    parser.add_argument("catalog", type=Path, help="the CSV file with product_id and title")
    parser.add_argument("--merchant", required=True)
    parser.add_argument("--market", required=True)
    parser.add_argument("--products", type=int, default=4, help="products shown for each logic builder")
    parser.add_argument("--recs", type=int, default=5, help="recommendations shown for each product")
    options = parser.parse_args()

    titles = read_titles(options.catalog)
    rows = read_rows(options.table, merchant=options.merchant, market=options.market)
    if not rows:
        print(
            f"no recommendations for {options.merchant} in {options.market} in {options.table}",
            file=sys.stderr,
        )
        return 1
    console = Console(highlight=False)
    for logic_builder in sorted({name for name, _, _ in rows}):
        of_builder = [(product_id, recs) for name, product_id, recs in rows if name == logic_builder]
        console.print(f"\n[bold]{logic_builder}[/bold]: {len(of_builder):,} products")
        for product_id, recs in of_builder[: options.products]:
            tree = Tree(Text(titles.get(product_id) or product_id, style="cyan"))
            for rec in (recs or [])[: options.recs]:
                tree.add(Text(titles.get(rec) or rec))
            console.print(tree)
    return 0


def read_titles(catalog: Path) -> dict[str, str]:
    with catalog.open(encoding="utf-8", newline="") as file:
        return {row["product_id"]: row["title"] for row in csv.DictReader(file)}


def read_rows(table: str, *, merchant: str, market: str) -> list[tuple[str, str, list[str] | None]]:
    """(logic_builder, product_id, recs) of one merchant and market, in order of product_id."""
    query = QueryBuilder().register("recommendations", DeltaTable(table))
    where = " and ".join(
        f"{column} = '{name.replace(chr(39), chr(39) * 2)}'"
        for column, name in (("merchant", merchant), ("market", market))
    )
    rows = query.execute(
        f"select logic_builder, product_id, recs from recommendations where {where} order by 1, 2"
    ).read_all()
    columns = [rows.column(name).to_pylist() for name in ("logic_builder", "product_id", "recs")]
    return list(zip(*columns, strict=True))


if __name__ == "__main__":
    sys.exit(main())
