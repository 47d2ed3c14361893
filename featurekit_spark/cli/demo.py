"""`featurekit demo`: a generated catalog, one run, and some of its recommendations by title.

The run is the command `featurekit run` itself, printed as it is called, so that a reader can go on from it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from featurekit_spark.cli.shared import ConfFile, Output, OutputOption, guarded

__all__ = ["demo_command"]

_MERCHANT, _MARKET = "demo", "US"


def demo_command(
    context: typer.Context,
    products: Annotated[int, typer.Option(min=1, max=9_999_999, help="Products in the catalog.")] = 3_000,
    folder: Annotated[Path, typer.Option(help="Where the catalog and the warehouse go.")] = Path("demo-data"),
    engine: Annotated[str, typer.Option(help="local (no JVM) or spark.")] = "local",
    conf_file: ConfFile = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """See it work: a generated catalog, one run, some of its results.

    Needs no network, no API key and, but for --engine spark, no Java. Run it twice: the second time nothing
    has changed and nothing is computed. Remove the folder to undo it.

    Example: featurekit demo --products 500
    """
    with guarded(output):
        from featurekit_spark.testing.samples import write_catalog

        print(f"Generating a catalog of {products} products in {folder / 'catalogs'}", file=sys.stderr)
        catalog = write_catalog(folder / "catalogs", merchant=_MERCHANT, market=_MARKET, products=products)
        words = [
            *("run", "--merchant", _MERCHANT, "--market", _MARKET, "--engine", engine),
            *(("--conf-file", str(conf_file)) if conf_file is not None else ()),
            *("--set", f"product_db.path={folder / 'catalogs'}"),
            *("--set", f"warehouse={folder / 'warehouse'}"),
            *(("--output", "json") if output is Output.JSON else ()),
        ]
        print(f"Computing recommendations: featurekit {shlex.join(words)}", file=sys.stderr)
        code = context.find_root().command.main(words, prog_name="featurekit", standalone_mode=False)
        if code:
            raise typer.Exit(code)
        if output is Output.TEXT:
            from featurekit_spark.cli.recommendations import read_titles, show_recommendations

            show_recommendations(
                str(folder / "warehouse" / "recommendations"),
                read_titles(catalog),
                merchant=_MERCHANT,
                market=_MARKET,
            )
            print(
                "\nRun it again: nothing changed, so nothing is computed again and no model is called.\n"
                "The model here is a stand-in that needs no network; docs and conf/ tell how to name a real one."
            )
