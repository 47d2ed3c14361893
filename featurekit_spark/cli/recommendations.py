"""Recommendations by title, for a person: what a run published to Delta, read without Spark."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["shown_recommendations", "titles_of"]

Row = tuple[str, str, list[str] | None]


def titles_of(catalog: Path) -> dict[str, str]:
    """Title by product id, of a CSV file with both columns."""
    with catalog.open(encoding="utf-8", newline="") as file:
        return {row["product_id"]: row["title"] for row in csv.DictReader(file)}


def shown_recommendations(
    table: str,
    titles: Mapping[str, str],
    *,
    merchant: str,
    market: str,
    products: int = 4,
    recs: int = 5,
) -> str:
    """Some products of each logic builder, each with its first recommendations; coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    rows = _read_rows(table, merchant, market)
    console = Console(highlight=False)
    with console.capture() as captured:
        for logic_builder in sorted({name for name, _, _ in rows}):
            of_builder = [(product_id, found) for name, product_id, found in rows if name == logic_builder]
            console.print(f"\n[bold]{logic_builder}[/bold]: {len(of_builder):,} products")
            for product_id, found in of_builder[:products]:
                tree = Tree(Text(titles.get(product_id) or product_id, style="cyan"))
                for rec in (found or [])[:recs]:
                    tree.add(Text(titles.get(rec) or rec))
                console.print(tree)
    return captured.get()


def _read_rows(table: str, merchant: str, market: str) -> Sequence[Row]:
    """(logic_builder, product_id, recs) of one merchant and market, in order of product_id."""
    from deltalake import DeltaTable, QueryBuilder

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
