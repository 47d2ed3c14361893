"""`featurekit demo`: a generated catalog, one run, and some of its recommendations by title.

The run is the command `featurekit run` itself, printed as it is called, so that a reader can go on from it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from featurekit_spark.cli.shared import Answer, EngineKind, Options, Output, answering, aside

__all__ = ["demo_command"]

_MERCHANT, _MARKET = "demo", "US"


@answering
def demo_command(
    options: Options,
    context: typer.Context,
    products: Annotated[int, typer.Option(min=1, max=9_999_999, help="Products in the catalog.")] = 3_000,
    folder: Annotated[Path, typer.Option(help="Where the catalog and the warehouse go.")] = Path("demo-data"),
    engine: Annotated[EngineKind, typer.Option(help="local needs no JVM.")] = EngineKind.LOCAL,
) -> Answer | None:
    """See it work: a generated catalog, one run, some of its results.

    Needs no network, no API key and, but for --engine spark, no Java. Run it twice: the second time nothing
    has changed and nothing is computed. Remove the folder to undo it.

    Example: featurekit demo --products 500
    """
    from featurekit_spark.testing.samples import write_catalog

    aside(f"Generating a catalog of {products} products in {folder / 'catalogs'}")
    catalog = write_catalog(folder / "catalogs", merchant=_MERCHANT, market=_MARKET, products=products)
    warehouse = str(folder / "warehouse")
    words = [
        *("run", "--merchant", _MERCHANT, "--market", _MARKET, "--engine", engine),
        *(("--conf-file", str(options.conf_file)) if options.conf_file is not None else ()),
        *(word for text in options.overrides or () for word in ("--set", text)),
        *("--set", f"product_db.path={folder / 'catalogs'}"),
        *("--set", f"warehouse={warehouse}"),
        *(("--output", "json") if options.output is Output.JSON else ()),
    ]
    aside(f"Computing recommendations: featurekit {shlex.join(words)}")
    code = context.find_root().command.main(words, prog_name="featurekit", standalone_mode=False)
    if code:
        raise typer.Exit(code)
    if options.output is Output.JSON:
        return None
    from featurekit_spark.cli.recommendations import shown_recommendations, titles_of
    from featurekit_spark.report.store import RunStore

    shown = shown_recommendations(
        f"{warehouse}/recommendations", titles_of(catalog), merchant=_MERCHANT, market=_MARKET
    )
    last = RunStore(warehouse).read(_MERCHANT, _MARKET, "latest")
    return Answer({}, [shown, *_last_words(warehouse, unchanged=bool(last.get("unchanged")))])


def _last_words(warehouse: str, *, unchanged: bool) -> Iterator[str]:
    yield (
        "Nothing had changed since the last time, so nothing was computed again and no model was called."
        if unchanged
        else "Run it again: nothing will have changed, so nothing is computed again and no model is called."
    )
    yield "See more of it:"
    named = shlex.quote(f"warehouse={warehouse}")
    yield f"  featurekit runs list --merchant {_MERCHANT} --market {_MARKET} --set {named}"
    yield f"  featurekit cache stats --path {shlex.quote(f'{warehouse}/cache')}"
    yield "The model here is a stand-in that needs no network; docs/configuration.md tells how to name a real one."
