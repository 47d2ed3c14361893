"""Taking products out of what is published: their own rows, and where others recommend them.

Owns how each kind of sink is rewritten for that. Must not know why a product has to go. Nobody may publish meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from featurekit_spark.errors import ServiceError
from featurekit_spark.locks import table_lock
from featurekit_spark.sinks.redis import RedisSink, base_name, redis_key

__all__ = ["remove_from_delta", "remove_from_redis"]

Concerned = Callable[[str, str, str], bool]
"""(merchant, market, product_id) -> whether it has to go."""


def remove_from_delta(path: str, concerned: Concerned, *, dry_run: bool = False) -> dict[str, Any]:
    """Rows removed and rows whose lists were shortened in the Delta table at `path`, and which (merchant, market) that
    concerned. Its history goes as well, and with it what could be rolled back to."""
    import pyarrow as pa
    from deltalake import DeltaTable, QueryBuilder, write_deltalake
    from deltalake.exceptions import DeltaError, TableNotFoundError

    from featurekit_spark.cache.upkeep import forget_log
    from featurekit_spark.sinks.delta import recommendations_schema

    told: dict[str, Any] = {"rows": 0, "lists": 0, "groups": []}
    try:
        table = DeltaTable(path)
    except TableNotFoundError:
        return told
    try:
        with table_lock(path, owner="cache purge"):
            table.update_incremental()
            groups = QueryBuilder().register("t", table).execute("SELECT DISTINCT merchant, market FROM t")
            found = groups.read_all()
            pairs = zip(*(found.column(name).to_pylist() for name in ("merchant", "market")), strict=True)
            for merchant, market in sorted(pairs):
                where = _where(merchant=merchant, market=market)
                rows = pa.table(
                    QueryBuilder().register("t", table).execute(f"SELECT * FROM t WHERE {where}").read_all()
                ).to_pylist()
                left, gone, shorter = _without(rows, partial(concerned, merchant, market))
                if not gone and not shorter:
                    continue
                told["rows"] += gone
                told["lists"] += shorter
                told["groups"].append([merchant, market])
                if not dry_run:
                    new = pa.Table.from_pylist(left, schema=recommendations_schema())
                    write_deltalake(path, new, mode="overwrite", predicate=where)
            if not dry_run and told["groups"]:
                table = DeltaTable(path)
                table.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)
        if not dry_run and told["groups"]:
            forget_log(path)
    except (DeltaError, OSError) as error:
        raise ServiceError(
            f"products could not be removed from {path!r}: {error}. Run the purge again."
        ) from error
    return told


def remove_from_redis(
    sink: RedisSink,
    merchant: str,
    market: str,
    products: Collection[str],
    *,
    logic_builders: Sequence[str],
    dry_run: bool = False,
) -> dict[str, int]:
    """Keys removed, and keys whose lists were shortened, in every generation of one merchant and market."""
    told = {"keys": 0, "lists": 0}
    base, gone = base_name(merchant, market), set(products)
    templates = [
        sink.key_template if number == 0 else sink.key_template_other for number in range(len(logic_builders))
    ]
    own = {
        redis_key(template, merchant=merchant, market=market, product_id=product, logic_builder=builder)
        for template, builder in zip(templates, logic_builders, strict=True)
        for product in products
    }
    with sink.client() as client:
        for generation in sorted(_text(name) for name in client.smembers(f"{base}:generations")):
            index = f"{base}:keys:{generation}"
            for raw in client.sscan_iter(index, count=sink.batch):
                name = _text(raw)
                if name in own or name.removeprefix(f"{generation}:") in own:
                    told["keys"] += 1
                    if not dry_run:
                        client.unlink(name)
                        client.srem(index, name)
                    continue
                value = client.get(name)
                recs = json.loads(_text(value)) if value is not None else []
                left = [rec for rec in recs if rec not in gone]
                if len(left) < len(recs):
                    told["lists"] += 1
                    if not dry_run:
                        text = json.dumps(left, ensure_ascii=False, separators=(",", ":"))
                        client.set(name, text, keepttl=True)
    return told


def _without(
    rows: list[dict[str, Any]], gone: Callable[[str], bool]
) -> tuple[list[dict[str, Any]], int, int]:
    """(rows that stay, how many went, how many became shorter)."""
    left, went, shorter = [], 0, 0
    for row in rows:
        if gone(row["product_id"]):
            went += 1
            continue
        recs = row["recs"] or []
        stay = [i for i, rec in enumerate(recs) if not gone(rec)]
        if len(stay) < len(recs):
            shorter += 1
            scores = row["scores"]
            row = {**row, "recs": [recs[i] for i in stay]}
            row["scores"] = None if scores is None else [scores[i] for i in stay]
        left.append(row)
    return left, went, shorter


def _where(**columns: str) -> str:
    return " AND ".join(
        f"{name} = '{value.replace(chr(39), chr(39) * 2)}'" for name, value in columns.items()
    )


def _text(found: Any) -> str:
    return found.decode() if isinstance(found, bytes) else str(found)
