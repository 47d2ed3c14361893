"""The sample catalogs: the same bytes for a seed, everywhere and for ever."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from featurekit_spark.testing.samples import (
    _main,
    delete_products,
    edit_prices,
    edit_titles,
    write_catalog,
)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_bytes_are_pinned(tmp_path: Path) -> None:
    path = write_catalog(tmp_path, merchant="demo", market="US", products=200)
    assert path == tmp_path / "demo_US.csv"
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "2b3ca29e9718371b585f3d0a2462e95f34da4639aabd3e75c9b9666cb3e6bfe0"
    )


def test_a_longer_catalog_starts_with_the_shorter_one(tmp_path: Path) -> None:
    short = write_catalog(tmp_path / "short", products=50).read_bytes()
    long = write_catalog(tmp_path / "long", products=500).read_bytes()
    assert long.startswith(short)


def test_another_seed_gives_another_catalog(tmp_path: Path) -> None:
    first = write_catalog(tmp_path / "7", products=20, seed=7).read_bytes()
    assert first != write_catalog(tmp_path / "8", products=20, seed=8).read_bytes()


def test_what_a_catalog_looks_like(tmp_path: Path) -> None:
    rows = rows_of(write_catalog(tmp_path, products=5_000))
    assert list(rows[0]) == ["product_id", "title", "description", "brand", "price"]
    assert rows[0]["product_id"] == "demo-000001"
    assert len({row["product_id"] for row in rows}) == 5_000
    assert all(float(row["price"]) > 0 and row["title"].startswith(row["brand"]) for row in rows)
    brands = Counter(row["brand"] for row in rows)
    assert len(brands) > 500
    assert sum(n for _, n in brands.most_common(10)) > 1_000, (
        "a few brands should have a fifth of all products"
    )
    models = Counter(row["title"].rsplit(", ", 2)[0] + row["title"].rsplit(", ", 1)[1] for row in rows)
    assert 0.10 < 1 - len(models) / 5_000 < 0.15, "share of near-duplicates"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 1_000)])
def test_empty_titles_at_the_ends(tmp_path: Path, share: float, expected: int) -> None:
    rows = rows_of(write_catalog(tmp_path, products=1_000, empty_titles=share))
    assert sum(not row["title"] for row in rows) == expected


def test_some_empty_titles_leave_all_other_rows_alone(tmp_path: Path) -> None:
    full = rows_of(write_catalog(tmp_path / "full", products=1_000))
    gaps = rows_of(write_catalog(tmp_path / "gaps", products=1_000, empty_titles=0.1))
    assert 50 < sum(not row["title"] for row in gaps) < 150
    assert all(gap == row for gap, row in zip(gaps, full, strict=True) if gap["title"])


def test_no_products_is_a_header_alone(tmp_path: Path) -> None:
    assert rows_of(write_catalog(tmp_path, products=0)) == []


@pytest.mark.parametrize("wrong", [{"products": -1}, {"empty_titles": 1.5}])
def test_refuses_nonsense(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        write_catalog(tmp_path, **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("edit", "column"), [(edit_prices, "price"), (edit_titles, "title")])
def test_an_edit_changes_one_column_of_its_share(
    tmp_path: Path, edit: Callable[..., tuple[str, ...]], column: str
) -> None:
    path = write_catalog(tmp_path, products=1_000, empty_titles=0.2)
    before = rows_of(path)
    ids = edit(path, share=0.05)
    pairs = [
        (old, new) for old, new in zip(before, rows_of(path), strict=True) if old["product_id"] in set(ids)
    ]
    assert len(ids) == (50 if column == "price" else round(0.05 * sum(bool(row["title"]) for row in before)))
    assert all(new[column] != old[column] and old[column] for old, new in pairs)
    restored = {old["product_id"]: old[column] for old, _ in pairs}
    assert [
        row | {column: restored.get(row["product_id"], row[column])} for row in rows_of(path)
    ] == before, "everything else stays"


def test_deleted_products_are_gone_and_nothing_else(tmp_path: Path) -> None:
    path = write_catalog(tmp_path, products=400)
    before = path.read_text().splitlines()
    ids = delete_products(path, share=0.01)
    assert len(ids) == 4
    assert path.read_text().splitlines() == [line for line in before if line.split(",")[0] not in ids]


def test_edits_are_the_same_for_a_seed(tmp_path: Path) -> None:
    one, two, other = (write_catalog(tmp_path / name, products=300) for name in ("one", "two", "other"))
    assert edit_titles(one) == edit_titles(two)
    assert one.read_bytes() == two.read_bytes()
    edit_titles(other, seed=2)
    assert one.read_bytes() != other.read_bytes()


def test_a_small_share_edits_one_product_and_none_edits_none(tmp_path: Path) -> None:
    path = write_catalog(tmp_path, products=5)
    whole = path.read_bytes()
    assert edit_prices(path, share=0.0) == () and path.read_bytes() == whole
    assert len(edit_prices(path, share=0.01)) == 1
    with pytest.raises(ValueError, match="got 2"):
        edit_prices(path, share=2)


def test_command_line_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main([str(tmp_path), "--products", "3", "--merchant", "abt", "--market", "DE"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "abt_DE.csv")
    assert len(rows_of(tmp_path / "abt_DE.csv")) == 3
