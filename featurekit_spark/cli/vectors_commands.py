"""`featurekit vectors export`, `search` and `show`: a vector index outside, filled from what runs computed.

Computes no matrix: `featurekit run` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurekit_spark.cli.shared import Answer, DryRun, GroupOptions, answering, command_app
from featurekit_spark.cli.wording import counted, shown_seconds, table
from featurekit_spark.errors import ConfigError, UsageError, known_names

if TYPE_CHECKING:
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.builder import FeatureBuilder
    from featurekit_spark.search.index import Hit

__all__ = ["vectors_app"]

vectors_app = command_app("vectors", "Vectors in Qdrant or LanceDB: export them, search them.")

_MATRIX = "ProductEmbeddingDB"
Matrix = Annotated[
    str,
    typer.Option(
        "--builder", help="The matrix's builder: one of logic_builders' graph, or package.module:Class."
    ),
]


@vectors_app.command("export")
@answering
def export_command(
    options: GroupOptions,
    builder: Matrix = _MATRIX,
    in_place: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Up to this share of changed rows they change in place; else all go anew."
        ),
    ] = 0.2,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are sent at once.")] = 1000,
    dry_run: DryRun = False,
) -> Answer:
    """Bring the vectors of one merchant and market to the index that `vector_index` names.

    What is there already is not sent. A new generation is switched to when it is whole; run it again after a crash.

    Example: featurekit vectors export --merchant demo --market US --conf-file conf/prod.yaml
    """
    settings, merchant, market = options.settings(), options.merchant, options.market
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.controller import Controller
    from featurekit_spark.pipelines.vectors import export_matrix
    from featurekit_spark.search.choice import open_stored
    from featurekit_spark.search.index import IndexSpec
    from featurekit_spark.sources.base import ScannableProductDB

    boot = Bootstrap(settings, merchant=merchant, market=market)
    try:
        with boot.run_lock():
            made = Controller(boot.context, boot.cache).get(
                _built(boot, builder), {"merchant": merchant, "market": market}
            )
            ref: Any = made.require()
            spec = IndexSpec(
                ref["dim"], "ip", settings.vector_index.fields, source=boot.context.embedder.identity
            )
            products = boot.context.product_db
            if not isinstance(products, ScannableProductDB):
                raise ConfigError(
                    f"{type(products).__name__} cannot give its whole catalog, whose fields go along."
                )
            index = boot.get_vector_index(spec)
            try:
                done = export_matrix(
                    index,
                    open_stored(boot.context.matrices, ref),
                    products,
                    dimensions=settings.product_db.dimensions.get(market, {}),
                    batch=batch,
                    in_place=in_place,
                    dry_run=dry_run,
                )
            finally:
                index.close()
    finally:
        boot.close()
    facts = {
        "status": "ok",
        "merchant": merchant,
        "market": market,
        "index": index.store.place,
        "matrix": ref["hash"],
        "dry_run": dry_run,
        **{name: getattr(done, name) for name in done.__dataclass_fields__},
    }
    return Answer(facts, _exported(facts))


@vectors_app.command("search")
@answering
def search_command(
    options: GroupOptions,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is searched for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="brand=Sony, 'price<=99.5' or 'brand in Sony,LG'; all must be met."
        ),
    ] = None,
    builder: Matrix = _MATRIX,
) -> Answer:
    """Find the products nearest to a text in the index that `vector_index` names.

    The text's vector comes from the cache, or from the embedder, which may be paid for it.

    Example: featurekit vectors search "garden chair" --merchant demo --market US --where 'price<50'
    """
    settings, merchant, market = options.settings(), options.merchant, options.market
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.controller import Controller
    from featurekit_spark.search.filters import parse_filter

    boot = Bootstrap(settings, merchant=merchant, market=market)
    try:
        index = boot.get_vector_index(None)
        try:
            spec, embedder = index.spec, boot.context.embedder.identity
            if spec.source != embedder:
                raise ConfigError(
                    f"{index.store.place} holds vectors of {spec.source!r}, and the embedder is {embedder!r}: export "
                    "to it anew, or name the embedder it was made with."
                )
            embedding = _text_embedding(boot, builder)
            vector: Any = Controller(boot.context, boot.cache).get(embedding, (text,)).require()
            if vector is None:
                raise UsageError("there is nothing in the text to search for")
            (hits,) = index.search([vector], k, filter=parse_filter(where or (), spec.fields))
        finally:
            index.close()
    finally:
        boot.close()
    facts = {
        "status": "ok",
        "index": index.store.place,
        "hits": [{"id": hit.id, "score": hit.score, "payload": dict(hit.payload)} for hit in hits],
    }
    return Answer(facts, _found(hits, list(spec.fields)))


@vectors_app.command("show")
@answering
def show_command(options: GroupOptions) -> Answer:
    """Say what is in the index that `vector_index` names: rows, dimensions, fields, generation.

    Example: featurekit vectors show --merchant demo --market US --conf-file conf/prod.yaml
    """
    from featurekit_spark.bootstrap import Bootstrap

    boot = Bootstrap(options.settings(), merchant=options.merchant, market=options.market)
    try:
        index = boot.get_vector_index(None)
        try:
            state = index.describe()
        finally:
            index.close()
    finally:
        boot.close()
    if state is None:
        raise UsageError(f"{index.store.place} holds nothing yet: featurekit vectors export writes to it.")
    facts = {"status": "ok", **state.to_json()}
    return Answer(facts, _shown(facts))


def _built(boot: Bootstrap, name: str) -> type[FeatureBuilder[Any]]:
    from featurekit_spark.builder import load_builder
    from featurekit_spark.graph import Graph

    if ":" in name:
        return load_builder(name)
    found = {builder.name: builder for builder in Graph(boot.get_logic_builders())}
    if name not in found:
        raise UsageError(f"no builder {name!r} among those of logic_builders. {known_names(name, found)}")
    return found[name]


def _text_embedding(boot: Bootstrap, name: str) -> type[FeatureBuilder[Any]]:
    """What makes a vector of a text for the matrix of that name."""
    from featurekit_spark.graph import Graph

    matrix = _built(boot, name)
    for builder in Graph([matrix]).inputs_of(matrix):
        if builder.key == ("text",):
            return builder
    raise UsageError(f"builder {name!r} is not made of texts' vectors, so that no text can be searched for")


def _exported(facts: Mapping[str, Any]) -> Iterator[str]:
    rows, place = counted(facts["rows"], "vector"), facts["index"]
    dry = facts["dry_run"]
    yield f"{facts['merchant']} {facts['market']}: {rows} {'would be' if dry else 'are'} in {place}"
    how = {
        "unchanged": "nothing had changed",
        "changed": "changed in place",
        "replaced": "a new generation, switched to",
    }[facts["how"]]
    took = "" if dry else f" ({shown_seconds(facts['seconds'])})"
    yield f"  {how}: {facts['sent']} sent, {facts['same']} there already, {facts['removed']} removed{took}"


def _found(hits: Sequence[Hit], fields: Sequence[str]) -> Iterator[str]:
    if not hits:
        yield "nothing found"
        return
    rows = [("score", "product", *fields)]
    for hit in hits:
        shown = ("" if hit.payload[name] is None else str(hit.payload[name]) for name in fields)
        rows.append((f"{hit.score:.6f}", hit.id, *shown))
    yield from table(rows, align=">" + "<" * (len(fields) + 1))


def _shown(facts: Mapping[str, Any]) -> Iterator[str]:
    spec = facts["spec"]
    yield facts["store"]
    yield f"  {counted(facts['rows'], 'row')}, {spec['dim']} dimensions, {spec['metric']}, of {spec['source'] or '?'}"
    fields = ", ".join(f"{name} ({kind})" for name, kind in spec["fields"].items())
    yield f"  fields: {fields or 'none'}"
    content = facts["content"] or "none: rows were changed since the last export, or that goes on"
    yield f"  generation {facts['generation']}, content {content}"
    if not facts["exact"]:
        yield "  searched by the store's own index, which may miss neighbours"
