"""Sample catalogs from a seed: retail titles with a few large brands, many small ones and near-duplicates; and edits
of them, for reruns.

Equal arguments write equal bytes on every platform, and a longer catalog starts with the rows of a shorter
one. Knows the columns of a catalog file and nothing else of the library.

    python -m featurekit_spark.testing.samples FOLDER --products 22000
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["delete_products", "edit_prices", "edit_titles", "write_catalog"]

COLUMNS: Final = ("product_id", "title", "description", "brand", "price")

# Share of products that are another one in a different finish, as real catalogs have them.
NEAR_DUPLICATES: Final = 0.12


class Category(NamedTuple):
    types: tuple[str, ...]
    sizes: tuple[str, ...]
    features: tuple[str, ...]
    use: str
    lowest_price: int  # in whole currency units


CATEGORIES: Final = (
    Category(
        ("Headphones", "Earbuds", "Bluetooth Speaker", "Soundbar", "Turntable", "Portable Radio"),
        ("10-Hour Battery", "20-Hour Battery", "40-Hour Battery"),
        ("Wireless", "Noise Cancelling", "Waterproof", "with Microphone", "Deep Bass"),
        "music at home and on the way",
        25,
    ),
    Category(
        ("Electric Kettle", "Espresso Machine", "Toaster", "Hand Blender", "Food Processor", "Stand Mixer"),
        ("800 W", "1200 W", "1500 W", "2200 W"),
        ("Stainless Steel", "Programmable", "Compact", "with Timer", "Easy to Clean"),
        "the daily kitchen",
        20,
    ),
    Category(
        ("Laptop Backpack", "Carry-On Suitcase", "Duffel Bag", "Messenger Bag", "Packing Cubes"),
        ("15 L", "25 L", "40 L", "60 L"),
        ("Water-Resistant", "Lightweight", "Expandable", "with USB Port", "Recycled Fabric"),
        "short trips and commuting",
        18,
    ),
    Category(
        (
            "Running Shoes",
            "Trail Shoes",
            "Training Shorts",
            "Rain Jacket",
            "Fleece Hoodie",
            "Merino Base Layer",
        ),
        ("Men's", "Women's", "Kids'", "Unisex"),
        ("Breathable", "Slim Fit", "Reflective", "Quick-Dry", "Windproof"),
        "training outside in any weather",
        22,
    ),
    Category(
        ("LED Desk Lamp", "Floor Lamp", "Office Chair", "Standing Desk", "Bookshelf", "Monitor Stand"),
        ("Small", "Medium", "Large", "Extra Wide"),
        ("Adjustable", "Oak Finish", "Ergonomic", "Foldable", "with Cable Tidy"),
        "a tidy and quiet workplace",
        15,
    ),
    Category(
        ("Digital Camera", "Action Camera", "Camcorder", "Tripod", "Camera Case", "Zoom Lens"),
        ("Pocket Size", "Full Size", "Travel Kit", "Studio Kit"),
        ("Image Stabilised", "Carbon Fibre", "Weather-Sealed", "Quick Release", "for Beginners"),
        "photos and films worth keeping",
        30,
    ),
    Category(
        ("Cordless Drill", "Circular Saw", "Screwdriver", "Impact Wrench", "Laser Level", "Orbital Sander"),
        ("12 V", "18 V", "36 V"),
        ("Brushless", "with Case", "Heavy Duty", "Soft Grip", "Dust Protected"),
        "repairs at home and on the building site",
        12,
    ),
    Category(
        ("Building Blocks", "Wooden Train Set", "Board Game", "Plush Bear", "Science Kit", "Jigsaw Puzzle"),
        ("Ages 3+", "Ages 6+", "Ages 8+", "Ages 12+"),
        ("Educational", "Deluxe Edition", "for the Whole Family", "Glow in the Dark", "Travel Edition"),
        "rainy afternoons with children",
        9,
    ),
)
COLOURS: Final = (
    "Black",
    "White",
    "Silver",
    "Navy Blue",
    "Red",
    "Forest Green",
    "Graphite",
    "Rose",
    "Sand",
    "Grey",
)
LINES: Final = (
    "Aero",
    "Nova",
    "Prime",
    "Terra",
    "Pulse",
    "Lumen",
    "Core",
    "Vista",
    "Echo",
    "Zen",
    "Atlas",
    "Flow",
)
SYLLABLES: Final = (
    *("bel", "cor", "dan", "fen", "gal", "hol", "jar", "kin", "lum", "mar"),
    *("nor", "pel", "quin", "ros", "sol", "tar", "ul", "vik", "wes", "zen"),
)
BRANDS: Final = tuple(
    (first + second + third).capitalize()
    for third in ("", "o", "ix", "ley")
    for first in SYLLABLES
    for second in SYLLABLES
    if first != second
)


def write_catalog(
    folder: Path | str,
    *,
    merchant: str = "demo",
    market: str = "US",
    products: int = 1_000,
    seed: int = 7,
    empty_titles: float = 0.0,
) -> Path:
    """Writes `{merchant}_{market}.csv` with `products` rows into `folder` and returns its path.

    Columns: product_id (`{merchant}-000001` on), title, description, brand, price (two decimals, without
    currency). `empty_titles` is the share of rows, 0 to 1, whose title is empty. The file appears whole or
    not at all.

    Raises ValueError for a negative number of products or a share outside 0 to 1.
    """
    if products < 0:
        raise ValueError(f"products must be 0 or more, got {products}")
    if not 0 <= empty_titles <= 1:
        raise ValueError(f"empty_titles is a share from 0 to 1, got {empty_titles}")
    target = Path(folder) / f"{merchant}_{market}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    return _write(target, _rows(merchant, products, seed, empty_titles))


def edit_prices(path: Path | str, *, share: float = 0.01, seed: int = 1) -> tuple[str, ...]:
    """Raises the price of a share of a sample catalog's products by one cent; returns their ids, in file order.

    At least one product is edited where the share is not 0. The file is replaced as a whole.
    Raises ValueError for a share outside 0 to 1.
    """

    def dearer(row: dict[str, str], draw: float) -> dict[str, str]:
        cents = round(float(row["price"]) * 100) + 1
        return row | {"price": f"{cents // 100}.{cents % 100:02d}"}

    return _edit(Path(path), share, seed, dearer)


def edit_titles(path: Path | str, *, share: float = 0.01, seed: int = 1) -> tuple[str, ...]:
    """Adds an edition to the title of a share of the products that have one; returns and raises as `edit_prices`."""

    def reissued(row: dict[str, str], draw: float) -> dict[str, str]:
        return row | {"title": f"{row['title']}, Edition {2 + int(draw * 98)}"}

    return _edit(Path(path), share, seed, reissued, only=lambda row: bool(row["title"]))


def delete_products(path: Path | str, *, share: float = 0.01, seed: int = 1) -> tuple[str, ...]:
    """Takes a share of the products out of the catalog; returns and raises as `edit_prices`."""
    return _edit(Path(path), share, seed, lambda row, draw: None)


def _edit(
    path: Path,
    share: float,
    seed: int,
    change: Callable[[dict[str, str], float], dict[str, str] | None],
    *,
    only: Callable[[dict[str, str]], bool] = lambda row: True,
) -> tuple[str, ...]:
    if not 0 <= share <= 1:
        raise ValueError(f"share goes from 0 to 1, got {share}")
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, str]] = list(csv.DictReader(file))
    draws = _Draws(seed, len(rows))
    order, how = draws.uniform("edit").argsort(kind="stable").tolist(), draws.uniform("how").tolist()
    able = [i for i in order if only(rows[i])]
    chosen = set(able[: max(round(share * len(able)), 1 if share else 0)])
    edited = (change(row, how[i]) if i in chosen else row for i, row in enumerate(rows))
    ids = tuple(rows[i]["product_id"] for i in sorted(chosen))
    _write(path, (tuple(row[name] for name in COLUMNS) for row in edited if row is not None))
    return ids


def _write(target: Path, rows: Iterator[tuple[str, ...]]) -> Path:
    unfinished = target.with_suffix(".csv.part")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return unfinished.replace(target)


def _rows(merchant: str, products: int, seed: int, empty_titles: float) -> Iterator[tuple[str, ...]]:
    draws = _Draws(seed, products)
    # Every column is taken from the model that a product is a finish of, except colour and price.
    model = _models(draws)
    category = draws.below(len(CATEGORIES), "category")[model].tolist()
    brand = draws.power_law(len(BRANDS), "brand")[model].tolist()
    line = draws.below(len(LINES), "line")[model].tolist()
    kind = draws.uniform("type")[model].tolist()
    size = draws.uniform("size")[model].tolist()
    feature = draws.uniform("feature")[model].tolist()
    number = (100 + draws.below(900, "number"))[model].tolist()
    colour = draws.below(len(COLOURS), "colour").tolist()
    price = draws.uniform("price").tolist()
    untitled = (draws.uniform("untitled") < empty_titles).tolist()

    for i in range(products):
        of = CATEGORIES[category[i]]
        what = of.types[int(kind[i] * len(of.types))]
        how_large = of.sizes[int(size[i] * len(of.sizes))]
        how = of.features[int(feature[i] * len(of.features))]
        name, hue, code = BRANDS[brand[i]], COLOURS[colour[i]], f"{what[0]}{LINES[line[i]][0]}-{number[i]}"
        title = f"{name} {LINES[line[i]]} {what}, {how}, {how_large}, {hue}, {code}"
        text = f"{what} by {name} in {hue.lower()}, {how.lower()}. Made for {of.use}. Model {code}."
        cents = int(of.lowest_price * 100 * (1 + 9 * price[i] * price[i]))
        yield (
            f"{merchant}-{i + 1:06d}",
            "" if untitled[i] else title,
            text,
            name,
            f"{cents // 100}.{cents % 100:02d}",
        )


def _models(draws: _Draws) -> npt.NDArray[np.int64]:
    """The row whose model each row is: itself, or for a near-duplicate one of the last 1,000 models."""
    is_copy = draws.uniform("copy") < NEAR_DUPLICATES
    is_copy[:1] = False
    models = np.flatnonzero(~is_copy)
    before = np.cumsum(~is_copy)
    back = (draws.uniform("of") * np.minimum(before, 1_000)).astype(np.int64)
    return np.where(is_copy, models[np.maximum(before - 1 - back, 0)], np.arange(draws.size))


class _Draws:
    """Random columns, one independent stream each, so that adding rows or columns moves no other value.

    Uniform numbers come from the generator's raw bits, which NumPy keeps stable, unlike its distributions.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def uniform(self, column: str) -> npt.NDArray[np.float64]:
        stream = np.random.PCG64(np.random.SeedSequence([self.seed, *column.encode()]))
        bits = np.atleast_1d(stream.random_raw(self.size))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, limit: int, column: str) -> npt.NDArray[np.int64]:
        return (self.uniform(column) * limit).astype(np.int64)

    def power_law(self, limit: int, column: str) -> npt.NDArray[np.int64]:
        """Rank r of `limit` with a weight of 1/(r+1): division only, which rounds alike everywhere."""
        reach = np.cumsum(1.0 / np.arange(1, limit + 1))
        return np.asarray(
            np.searchsorted(reach, self.uniform(column) * reach[-1], side="right"), dtype=np.int64
        )


def _main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m featurekit_spark.testing.samples",
        description="Writes a sample catalog, the same for a seed.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--merchant", default="demo")
    parser.add_argument("--market", default="US")
    parser.add_argument("--products", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--empty-titles", type=float, default=0.0, metavar="SHARE")
    options = vars(parser.parse_args(arguments))
    try:
        path = write_catalog(options.pop("folder"), **options)
    except ValueError as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
