"""Recommendations in Redis: one key per product and logic builder, a JSON array of ids, best first.

Owns the layout in Redis, how keys that left are found and removed, and the switch between versions. It must
not know how the rows were computed. What lies beside the recommendations, per merchant and market:

    featurekit/{merchant}:{market}:state          JSON: run_id, rows, covered, publish, generation, ts;
                                                  if versioned also layout, and before: the state before
    featurekit/{merchant}:{market}:generations    set: every publication begun and not yet cleared away
    featurekit/{merchant}:{market}:keys:{generation}    set: the keys that this publication wrote
    {merchant}:{market}:version                   the live generation (`publish="versioned"` only)

A key is noted in its generation's set no later than it is written, so that whatever a crash leaves behind is
found and removed by the next publication.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from featurekit_spark.errors import ConfigError, FeaturekitError, ServiceError
from featurekit_spark.sinks.base import ROW_COLUMNS, Publication, PublishedState, SinkResult

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame
    from redis import Redis

__all__ = ["KEY_TEMPLATE", "KEY_TEMPLATE_OTHER", "RedisSink", "base_name", "read_recs", "redis_key"]

KEY_TEMPLATE = "{merchant}:{market}:{product_id}"
KEY_TEMPLATE_OTHER = "{merchant}:{market}:{product_id}:{logic_builder}"

_RETRIES = 2


def redis_key(template: str, **fields: str) -> str:
    """`template` with its named fields percent-encoded, so that two products never share a key."""
    return template.format_map({name: quote(value, safe="") for name, value in fields.items()})


def read_recs(
    client: Redis,
    product_id: str,
    *,
    merchant: str,
    market: str,
    logic_builder: str = "",
    template: str = KEY_TEMPLATE,
    publish: Literal["keys", "versioned"] = "keys",
) -> list[str] | None:
    """The published ids of one product, best first; None for a product that was not published.

    For a logic builder other than the first, give its name and `template=KEY_TEMPLATE_OTHER`. With
    `publish="versioned"` this is two round trips: the live generation, then the key. Who wants many products
    of one generation reads `{merchant}:{market}:version` once and puts it before each key; it stays readable
    while it is the live one or the one before.
    """
    key = redis_key(
        template, merchant=merchant, market=market, product_id=product_id, logic_builder=logic_builder
    )
    if publish == "versioned":
        generation = _text(client.get(_pointer(merchant, market)))
        if generation is None:
            return None
        key = f"{generation}:{key}"
    found = _text(client.get(key))
    return None if found is None else list(json.loads(found))


@dataclass(frozen=True)
class RedisSink:
    """`url` is `redis://`, `rediss://` or `unix://`; `ttl_s` seconds after which keys vanish, None for never.

    `publish="keys"` writes in place: each key is old or new, and keys of products that left are removed
    afterwards. `publish="versioned"` writes beside the live generation, then switches a pointer: readers
    (`read_recs`) see the old whole or the new whole. The generation before stays, older ones are removed.
    """

    url: str = field(repr=False)
    key_template: str = KEY_TEMPLATE
    key_template_other: str = KEY_TEMPLATE_OTHER
    ttl_s: int | None = None
    publish_as: Literal["keys", "versioned"] = "keys"
    batch: int = 1000
    timeout_s: float = 10.0
    name: str = "redis"

    @property
    def layout(self) -> str | None:
        if self.ttl_s is not None:
            return None
        return json.dumps([self.publish_as, self.key_template, self.key_template_other])

    def check(self) -> None:
        """One small write, which finds a wrong password, a read-only replica and full memory as well."""
        with self.client() as client:
            client.set("featurekit/check", "ok", ex=10)

    def state(self, merchant: str, market: str) -> PublishedState | None:
        with self.client() as client:
            found = _text(client.get(f"{base_name(merchant, market)}:state"))
        if found is None:
            return None
        state = json.loads(found)
        return PublishedState(state["run_id"], state["rows"], state["covered"]) if state["rows"] else None

    def publish(self, publication: Publication) -> SinkResult:
        started = time.monotonic()
        import pyarrow as pa

        base = base_name(publication.merchant, publication.market)
        with self.client() as client:
            before = json.loads(_text(client.get(f"{base}:state")) or "null")
            begun = {str(_text(name)) for name in client.smembers(f"{base}:generations")}
            generation = _unused(quote(publication.run_id, safe=""), begun)
            client.sadd(f"{base}:generations", generation)
        writer = _Writer(
            self,
            publication.merchant,
            publication.market,
            publication.logic_builders[0],
            f"{base}:keys:{generation}",
            f"{generation}:" if self.publish_as == "versioned" else "",
        )
        rows = publication.rows
        if isinstance(rows, pa.Table):
            batches = rows.select(list(ROW_COLUMNS)).to_batches(max_chunksize=self.batch)
            written, covered = writer.write(batches)
        else:
            written, covered = _write_from_workers(writer, rows)
        state = {
            "run_id": publication.run_id,
            "rows": written,
            "covered": covered,
            "publish": self.publish_as,
            "generation": generation,
            "ts": publication.ts.isoformat(),
        }
        if self.publish_as == "versioned":
            state["layout"] = self.layout
            if before and before["publish"] == "versioned":
                state["before"] = {name: value for name, value in before.items() if name != "before"}
        with self.client() as client:
            self._switch(client, publication, state, before)
            keep = before["generation"] if before and self.publish_as == "versioned" else None
            removed = sum(
                self._clear(client, publication, old, live=generation) for old in sorted(begun - {keep})
            )
        return SinkResult(
            self.name,
            rows=written,
            seconds=time.monotonic() - started,
            detail={"covered": covered, "removed": removed, "generation": generation},
        )

    def switch_back(
        self, merchant: str, market: str, run_id: str, *, dry_run: bool = False
    ) -> SinkResult | None:
        """Make the generation before the live one live again, where it is what `run_id` published and still there
        whole; None where it is not, and nothing was changed."""
        started = time.monotonic()
        base, pointer = base_name(merchant, market), _pointer(merchant, market)
        with self.client() as client:
            live = json.loads(_text(client.get(f"{base}:state")) or "null")
            before = live.get("before") if live else None
            if (
                not before
                or before["run_id"] != run_id
                or self.layout is None  # keys of it may have expired
                or before.get("layout") != self.layout
                or not client.sismember(f"{base}:generations", before["generation"])
            ):
                return None
            if not dry_run:
                live.pop("before")
                with client.pipeline(transaction=True) as pipe:
                    pipe.set(pointer, before["generation"])
                    pipe.set(f"{base}:state", json.dumps({**before, "before": live}))
                    pipe.execute()
        detail = {"covered": before["covered"], "generation": before["generation"]}
        return SinkResult(self.name, before["rows"], time.monotonic() - started, detail)

    def _switch(
        self, client: Redis, publication: Publication, state: dict[str, Any], before: dict[str, Any] | None
    ) -> None:
        """Make the new generation the live one, in one transaction."""
        base = base_name(publication.merchant, publication.market)
        pointer = _pointer(publication.merchant, publication.market)
        keys = f"{base}:keys:{state['generation']}"
        with client.pipeline(transaction=True) as pipe:
            if self.publish_as == "versioned":
                pipe.set(pointer, state["generation"], ex=self.ttl_s)
            elif before and before["publish"] == "versioned" and not client.sismember(keys, pointer):
                pipe.delete(pointer)  # unless a product's own key has that very name
            pipe.set(f"{base}:state", json.dumps(state), ex=self.ttl_s)
            if self.ttl_s is not None:
                pipe.expire(keys, self.ttl_s)
            pipe.execute()

    def _clear(self, client: Redis, publication: Publication, old: str, *, live: str) -> int:
        """Remove what an earlier generation wrote and the live one did not; the number of keys removed."""
        base = base_name(publication.merchant, publication.market)
        index = f"{base}:keys:{old}"
        # A product's own key may have had the very name that the pointer has now.
        taken = _pointer(publication.merchant, publication.market) if self.publish_as == "versioned" else None
        removed = 0
        # Scanned in steps: a set operation over a large catalog would stop the server for everyone.
        for names in _chunks(client.sscan_iter(index, count=self.batch), self.batch):
            kept = client.smismember(f"{base}:keys:{live}", names)
            gone = [
                name for name, stays in zip(names, kept, strict=True) if not stays and _text(name) != taken
            ]
            removed += client.unlink(*gone) if gone else 0
        with client.pipeline(transaction=True) as pipe:
            pipe.unlink(index)
            pipe.srem(f"{base}:generations", old)
            pipe.execute()
        return removed

    @contextmanager
    def client(self) -> Iterator[Redis]:
        """The process's client, with redis-py's errors translated into ours."""
        client = _client(self.url, self.timeout_s)
        import redis

        where = _where(client)
        try:
            yield client
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(
                f"Redis at {where} refused the user or the command: {error}; check sinks.url."
            ) from error
        except redis.TimeoutError as error:
            raise ServiceError(
                f"Redis at {where} did not answer within {self.timeout_s:g} s ({error})."
            ) from error
        except redis.ConnectionError as error:
            raise ServiceError(f"Redis at {where} cannot be reached: {error} Is it running?") from error
        except redis.RedisError as error:
            raise ServiceError(f"Redis at {where} refused a command: {error}.") from error


@dataclass(frozen=True)
class _Writer:
    """Writes rows as keys; a plain value, so that it can travel to workers."""

    sink: RedisSink
    merchant: str
    market: str
    main_builder: str
    index: str
    prefix: str

    def write(self, batches: Iterable[pa.RecordBatch]) -> tuple[int, int]:
        """Rows written, and those of them with at least one rec. Writing twice gives the same keys."""
        rows = covered = 0
        with self.sink.client() as client:
            for batch in batches:
                columns = (batch.column(name).to_pylist() for name in ROW_COLUMNS[:3])
                pairs = [
                    (self._key(product, builder), recs or [])
                    for product, builder, recs in zip(*columns, strict=True)
                ]
                if not pairs:
                    continue
                with client.pipeline(transaction=False) as pipe:
                    pipe.sadd(self.index, *(key for key, _ in pairs))
                    for key, recs in pairs:
                        value = json.dumps(recs, ensure_ascii=False, separators=(",", ":"))
                        pipe.set(key, value, ex=self.sink.ttl_s)
                    pipe.execute()
                rows += len(pairs)
                covered += sum(1 for _, recs in pairs if recs)
        return rows, covered

    def _key(self, product_id: str, logic_builder: str) -> str:
        main = logic_builder == self.main_builder
        template = self.sink.key_template if main else self.sink.key_template_other
        return self.prefix + redis_key(
            template,
            merchant=self.merchant,
            market=self.market,
            product_id=product_id,
            logic_builder=logic_builder,
        )


def _write_from_workers(writer: _Writer, rows: DataFrame) -> tuple[int, int]:
    """Write from the workers, in one action; each task sends back its counts, or why it gave up."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        import pyarrow as pa

        written, covered, failure, retryable = 0, 0, "", False
        small = (part for batch in batches for part in _split(batch, writer.sink.batch))
        try:
            written, covered = writer.write(small)
        except FeaturekitError as error:
            # As data, not as an exception: the driver's message would be a worker's traceback.
            failure, retryable = str(error), error.retryable
        yield pa.RecordBatch.from_pydict(
            {"written": [written], "covered": [covered], "failure": [failure], "retryable": [retryable]}
        )

    columns = rows.select(*ROW_COLUMNS[:3])
    counts = columns.mapInArrow(
        write, "written long, covered long, failure string, retryable boolean"
    ).collect()
    for task in counts:
        if task["failure"]:
            raise (ServiceError if task["retryable"] else ConfigError)(task["failure"])
    return sum(task["written"] for task in counts), sum(task["covered"] for task in counts)


def _split(batch: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, size):
        yield batch.slice(start, size)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@lru_cache(maxsize=8)
def _client(url: str, timeout_s: float) -> Redis:
    """One client, and so one connection pool, per process and address."""
    try:
        import redis
        from redis.backoff import ExponentialBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError("The redis sink needs the extra: pip install 'featurekit-spark[redis]'.") from error
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # redis-py's own default is ten retries, which hides an outage for minutes.
            retry=Retry(ExponentialBackoff(cap=1.0, base=0.1), _RETRIES),
        )
    except ValueError as error:
        raise ConfigError(f"sinks.url is no Redis address ({error}): write redis://host:6379/0.") from None


def _where(client: Redis) -> str:
    """The address without user and password."""
    known = client.connection_pool.connection_kwargs
    return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")


def base_name(merchant: str, market: str) -> str:
    """What every key beside the recommendations of a merchant and market begins with."""
    # The slash is encoded wherever a field has one, so that no merchant's keys begin like this.
    return f"featurekit/{quote(merchant, safe='')}:{quote(market, safe='')}"


def _pointer(merchant: str, market: str) -> str:
    return f"{quote(merchant, safe='')}:{quote(market, safe='')}:version"


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or with a number when a run publishes again: the live generation is never written into."""
    tries = (name if number == 1 else f"{name}~{number}" for number in count(1))
    return next(candidate for candidate in tries if candidate not in taken)


def _text(found: object) -> str | None:
    return found.decode() if isinstance(found, bytes) else None if found is None else str(found)
